"""Weights that have a URL and no repository: fetched whole, or not at all.

open_clip writes such a download under its last name and asks for no length: a line that breaks, or
a kill, leaves a part there that is taken for the whole ever after. So the download is made here,
into the folder and by the names that open_clip knows.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

from dkdetr.atomic_file import atomic_file
from dkdetr.offline import is_offline
from dkdetr.progress import progress

_BLOCK = 1 << 20
_MB = 1_000_000
_PATIENCE_S = 60.0
_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"


def url_weights_folder() -> Path:
    """Returns where open_clip keeps weights that have a URL and no repository."""
    return Path("~/.cache/clip").expanduser()


def fetch_url_weights(url: str, announce: Callable[[str], None]) -> Path:
    """Returns the file that a URL names, downloaded if it is not here or only a part of it is.

    Args:
        url: http or https; its last part is the file's name.
        announce: told, before a download, from where and why.

    Raises:
        ValueError: the URL is another kind's, or names no file.
        OSError: it cannot be reached.
        RuntimeError: what came was cut short or is another file; nothing of it is kept.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"'{url}' is no http or https URL")
    if parts.path.rsplit("/", 1)[-1] in ("", ".", ".."):
        raise ValueError(f"'{url}' names no file")
    path = url_weights_folder() / url.rsplit("/", 1)[-1]
    why = why_not_whole(path, known_sha256(url)) if path.is_file() else ""
    if path.is_file() and not why:
        return path
    if is_offline():
        raise OSError(f"offline; '{path}' {why}" if why else "offline")
    announce(f"{url} ('{path}' {why})" if why else url)
    _download(url, path)
    return path


def known_sha256(url: str) -> str:
    """Returns the first digits of a file's sha256 that its publisher put into its URL, or ""."""
    if "openaipublic" in url:
        return url.split("/")[-2]
    if "mlfoundations" in url:
        return url.rsplit("/", 1)[-1].rpartition(".")[0].rpartition("-")[2]
    return ""


def why_not_whole(path: Path, sha256: str = "", *, suffix: str | None = None) -> str:
    """Returns why a file of weights is only a part, or another one; "" if nothing says so.

    A safetensors file says how long it is, a zip (`torch.save`) ends with its table of contents.
    Pickles from before PyTorch 1.6 have neither: only a hash tells. What begins as none of these is
    no weights at all, but a page that a network puts in their place, say.

    Args:
        path: the file.
        sha256: the first digits of its hash, where they are known.
        suffix: what its name will end with, where it has another yet.
    """
    with path.open("rb") as file:
        if sha256:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return "" if digest.startswith(sha256) else f"has another sha256 than {sha256}..."
        start, size = file.read(8), path.stat().st_size
        if (suffix or path.suffix) == ".safetensors":
            wanted = _safetensors_bytes(file.read(min(int.from_bytes(start, "little"), size)))
            if wanted is None:
                return "has no whole header"
            return "" if size == wanted else f"is cut: {size:,} bytes, not {wanted:,}"
    if len(start) < 8 or (start.startswith(_ZIP) and not zipfile.is_zipfile(path)):
        return f"is cut: {size:,} bytes without an end"
    if not start.startswith((_ZIP, _PICKLE)):
        return f"is no file of weights: it begins with {start!r}"
    return ""


def _safetensors_bytes(header: bytes) -> int | None:
    """Returns how long the file of a header must be; None if that is no whole header."""
    try:
        table = json.loads(header)
        ends = (each["data_offsets"][1] for name, each in table.items() if name != "__metadata__")
        return 8 + len(header) + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _download(url: str, path: Path) -> None:
    """Writes what a URL gives under a name of its own, and gives it `path`'s once it is whole."""
    with urlopen(url, timeout=_PATIENCE_S) as source, atomic_file(path, large=True) as file:
        announced = int(source.headers.get("Content-Length") or 0)
        came = 0
        with progress(f"{path.name}, MB", announced // _MB) as advance:
            while block := _block(source):
                file.write(block)
                came += len(block)
                advance(came // _MB, "")
        file.flush()
        size = Path(file.name).stat().st_size
        if announced and size != announced:
            raise RuntimeError(f"the download was cut: {size:,} of {announced:,} bytes came")
        if why := why_not_whole(Path(file.name), known_sha256(url), suffix=path.suffix):
            raise RuntimeError(f"what came {why}")


def _block(source: HTTPResponse) -> bytes:
    """Returns the next part of a body, b"" at its end; the line's errors are not the disk's."""
    try:
        return source.read(_BLOCK)
    except (OSError, HTTPException) as error:
        raise RuntimeError(f"the download was cut: {error!r}") from error
