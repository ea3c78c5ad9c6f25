"""Whether the network of `fit` that a cache was made with still lies with it."""

import contextlib
import tempfile
from pathlib import Path

from cache.layout import Head, load_provenance
from cache.location import CachePath
from cache.spec import CorruptCacheError
from dkdetr.errors import CorruptArtefactError
from pipeline.proposal_network import load_network
from pipeline.proposal_sources import NETWORK_FILE
from pipeline.teacher_model import tensors_sha256


def why_lost(cache: CachePath) -> str:
    """Returns why a cache has not the network of its own `fit` any more.

    Empty: it has, or nobody knows that it ever had one. Exports have none, and are not asked.

    Args:
        cache: a folder or a URL.
    """
    try:
        record = load_provenance(cache).get("request")
    except (FileNotFoundError, CorruptCacheError):
        return ""
    if not isinstance(record, dict) or record.get("proposals") != "fit":
        return ""
    file = cache / NETWORK_FILE
    if not file.is_file():
        return (
            f"{file}: the network of fit is missing, by which other splits' caches propose; a "
            "training does without it"
        )
    try:
        weights = _weights_sha256(file)
    except CorruptArtefactError as error:
        return str(error)
    with contextlib.suppress(FileNotFoundError, CorruptCacheError):
        if Head.load(cache).parts["proposals"].get("weights_sha256") not in (None, weights):
            return f"{file}: another network than the cache was made with"
    return ""


def _weights_sha256(file: CachePath) -> str:
    """Returns the hash of a network's weights; one behind a URL is copied to be read."""
    if isinstance(file, Path):
        return tensors_sha256(load_network(file)[0])
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        copy.write_bytes(file.read_bytes())
        try:
            return tensors_sha256(load_network(copy)[0])
        except CorruptArtefactError as error:
            raise CorruptArtefactError(str(error).replace(str(copy), str(file))) from None
