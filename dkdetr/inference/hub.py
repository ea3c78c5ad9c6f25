"""Where a student file comes from: a path, a folder, or the Hugging Face hub."""

import re
import sys
from pathlib import Path

from dkdetr.defaults import DEFAULT_RUNS
from dkdetr.errors import DataError, UsageError
from dkdetr.offline import is_offline

FILE_NAME = "model.safetensors"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_SUFFIXES = (".safetensors", ".pt")


def fetch_student_file(path_or_hub_id: str, *, revision: str | None = None) -> Path:
    """Returns the path of a student file; a hub's is downloaded into its usual cache.

    A line on stderr says so before. Offline (`dkdetr.offline`) that cache alone is looked into.

    Args:
        path_or_hub_id: a file, a folder with `model.safetensors`, or `owner/name`.
        revision: a commit's hash, a tag or a branch of the repository.

    Raises:
        UsageError: a revision of a file or folder.
        DataError: neither a file, a folder with `model.safetensors`, nor a repository in reach.
    """
    path = Path(path_or_hub_id)
    if revision is not None and path.exists():
        raise UsageError(f"'{path}' lies here and has no revision: leave revision={revision} out")
    if path.is_dir():
        path = path / FILE_NAME
        if not path.is_file():
            raise DataError(
                f"'{path.parent}' holds no {FILE_NAME}; of a run make one with "
                f"`dkdetr export {path.parent}`"
            )
    if path.is_file() or not _HUB_ID.fullmatch(path_or_hub_id):
        if not path.is_file():
            raise DataError(f"no student file '{path}'")
        return path
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        kept = try_to_load_from_cache(path_or_hub_id, FILE_NAME, revision=revision)
        if not isinstance(kept, str) and not is_offline():
            told = f"fetching the student {path_or_hub_id} from the hub, once"
            print(told, file=sys.stderr, flush=True)
        return Path(
            hf_hub_download(
                path_or_hub_id, FILE_NAME, revision=revision, local_files_only=is_offline()
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise DataError(
            f"'{path_or_hub_id}' is neither a file here nor a repository with {FILE_NAME} on the "
            f"hub that can be reached{' offline' if is_offline() else ''}: {first_line}"
        ) from None


def student_place(place: Path) -> Path:
    """Returns a place as it was given, but for `owner/name` of the hub the student file's path.

    What lies in a folder that is here, in `runs`, or is called as a file, is never asked of the
    hub: a run whose name is mistyped is no repository.

    Raises:
        DataError: neither here nor a repository in reach.
    """
    in_reach = place.exists() or place.parent.is_dir() or place.parent == Path(DEFAULT_RUNS)
    if in_reach or place.suffix in _FILE_SUFFIXES or not _HUB_ID.fullmatch(place.as_posix()):
        return place
    return fetch_student_file(place.as_posix())
