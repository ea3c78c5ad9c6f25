"""Where a cache is read from: a local folder, or any URL that fsspec knows (s3://, memory://, ...).

Readers take either. Writers take local folders alone: their promises rest on fsync and rename.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from cache.spec import CacheError, CorruptCacheError

_HERE = {"file", "local", "memory"}
_OFF = {"", "0", "false", "no", "off"}


class RemotePath:
    """A folder or a file behind a URL: the few methods of pathlib.Path that readers use.

    It pickles as its URL; credentials come from fsspec's own configuration or the environment.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self._url}/{name}")

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other._url == self._url

    def __hash__(self) -> int:
        return hash(self._url)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self._url.rpartition("/")[2]

    def is_file(self) -> bool:
        """Returns True if there is such a file."""
        files, path = self._files()
        return bool(files.isfile(path))

    def read_bytes(self) -> bytes:
        """Returns the content; raises FileNotFoundError."""
        files, path = self._files()
        return cast("bytes", files.cat_file(path))

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Returns a stream of the content."""
        files, path = self._files()
        return cast("IO[bytes]", files.open(path, mode))

    def size(self) -> int:
        """Returns the file's bytes; raises FileNotFoundError."""
        files, path = self._files()
        return int(files.size(path))

    def total_size(self) -> int:
        """Returns the bytes of all files of a folder."""
        files, path = self._files()
        return int(files.du(path))

    def read_range(self, offset: int, length: int) -> bytes:
        """Returns at most `length` bytes from `offset` on."""
        files, path = self._files()
        return cast("bytes", files.cat_file(path, start=offset, end=offset + length))

    def _files(self) -> tuple[Any, str]:
        # fsspec keeps one instance a process and thread, so this is a look-up.
        _refuse_offline(self._url)
        import fsspec  # pyright: ignore[reportMissingTypeStubs]

        try:
            return cast("tuple[Any, str]", fsspec.core.url_to_fs(self._url))  # pyright: ignore
        except (ValueError, ImportError) as error:
            raise CacheError(f"{self._url} cannot be opened: {error}") from None


def _refuse_offline(url: str) -> None:
    # As dkdetr.switches reads it; a word that means neither, which commands refuse, forbids here.
    offline = os.environ.get("DKDETR_OFFLINE", "").strip().lower() not in _OFF
    if offline and url.partition("://")[0] not in _HERE:
        raise CacheError(f"{url} is behind a network, and --offline forbids it; copy the cache")


CachePath = Path | RemotePath


def cache_path(place: str | CachePath) -> CachePath:
    """Returns the place a user named: a folder, or a URL."""
    if isinstance(place, RemotePath):
        return place
    return RemotePath(str(place)) if "://" in str(place) else Path(place)


def local_folder(place: str | CachePath, *, to: str) -> Path:
    """Returns the folder; raises CacheError for a URL, saying that one cannot `to` there."""
    found = cache_path(place)
    if isinstance(found, RemotePath):
        raise CacheError(f"{found} is a URL: one can read a cache there, and not {to}; copy it")
    return found


def mending(place: CachePath, options: str = "") -> str:
    """Returns the command that mends a cache; nothing is written behind a URL."""
    if isinstance(place, RemotePath):
        return (
            f"dkdetr cache repair FOLDER{options}, on the folder that {place} was copied from, and "
            "copy it there again"
        )
    return f"dkdetr cache repair {place}{options}"


def member(root: CachePath, name: str) -> CachePath:
    """Returns the file `name` of a cache; raises CorruptCacheError for a name that leads out."""
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or "\0" in name or {"..", "", "."} & {*parts}:
        raise CorruptCacheError(f"{root} names a file that is not its own: {name!r}")
    return root / name


def file_size(path: CachePath) -> int:
    """Returns the bytes of a file; raises FileNotFoundError."""
    return path.size() if isinstance(path, RemotePath) else path.stat().st_size


def total_size(path: CachePath) -> int:
    """Returns the bytes of all files of a folder; a writer beside may rename some meanwhile."""
    if isinstance(path, RemotePath):
        return path.total_size()
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(folder) / name).stat().st_size
    return total


def read_range(path: CachePath, offset: int, length: int) -> bytes:
    """Returns at most `length` bytes of a file from `offset` on; raises FileNotFoundError."""
    if isinstance(path, RemotePath):
        return path.read_range(offset, length)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)
