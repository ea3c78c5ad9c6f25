"""What a person may name as pictures: files, folders, globs, lists on stdin, videos."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dkdetr.cores import cores_at_hand
from dkdetr.data.picture_input import rgb_pixels
from dkdetr.errors import DataError, UsageError
from dkdetr.read_ahead import done_ahead

PICTURE_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".bmp": "image/bmp",
}
PICTURE_SUFFIXES = frozenset(PICTURE_TYPES)
VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".gif"})

_DECODERS = min(8, cores_at_hand())
"""Threads; Pillow lets the interpreter go while it works."""
_MOST_AHEAD = 2 * _DECODERS


@dataclass(frozen=True, eq=False)
class NamedPicture:
    """RGB pixels [height, width, 3] and what documents call them; a frame's name has its number.

    `files_done` counts the files that are through with this picture; a frame ends none.
    """

    name: str
    pixels: np.ndarray
    files_done: int = 0


def find_sources(words: Sequence[str], *, stdin: Iterable[str] | None = None) -> dict[Path, str]:
    """Returns the files that the words mean, in their order, each once, and their names.

    A folder means its pictures and videos (not those of folders below it), a pattern with `*`,
    `?` or `[` what it matches, `-` the paths on stdin (or in `stdin`), one a line. A file is called
    by its path as it was given, one of a folder by its path within; where two would be called the
    same, the folder's own path stands before it. Names have forward slashes.

    Raises:
        DataError: a word means nothing that exists, or a file is no picture nor video.
    """
    found: dict[Path, str] = {}
    for path, name in _files_of(words, sys.stdin if stdin is None else stdin):
        found.setdefault(path, name)
    shared = Counter(found.values())
    return {
        path: (path.as_posix() if shared[name] > 1 and name == path.name else name)
        for path, name in found.items()
    }


def _files_of(words: Sequence[str], lines: Iterable[str]) -> Iterator[tuple[Path, str]]:
    for word in words:
        if word == "-":
            named = [line.strip() for line in lines if line.strip()]
            yield from _files_of([each for each in named if each != "-"], ())
            continue
        path = Path(word)
        if path.is_dir():
            inside = sorted(each for each in path.iterdir() if _is_known(each))
            if not inside:
                raise DataError(f"the folder '{word}' holds no picture and no video{_deeper(path)}")
            yield from ((each, each.name) for each in inside)
        elif path.is_file():
            if not _is_known(path):
                known = " ".join(sorted(PICTURE_SUFFIXES | VIDEO_SUFFIXES))
                raise DataError(f"'{word}' is neither a picture nor a video ({known})")
            yield path, _as_posix(word)
        else:
            matches = sorted(glob.glob(word, recursive=True))  # noqa: PTH207
            inside = [each for each in matches if Path(each).is_file() and _is_known(Path(each))]
            if not inside:
                if "://" in word:
                    raise DataError(
                        f"'{word}' is an address, and nothing is fetched: download it, and name "
                        "the file"
                    )
                raise DataError(f"no picture, folder or video '{word}'")
            yield from ((Path(each), _as_posix(each)) for each in inside)


def _deeper(folder: Path) -> str:
    """Returns the end of a sentence: how to name pictures of folders in this one, if it has any."""
    if not any(each.is_dir() for each in folder.iterdir()):
        return ""
    pattern = f"{glob.escape(folder.as_posix())}/**/*"
    return f"; folders in it are not looked into, but by a pattern, in quotes: '{pattern}'"


def _as_posix(word: str) -> str:
    """Returns a path as it was typed, which `Path` would tidy, with forward slashes."""
    return word.replace(os.sep, "/")


def open_pictures(
    sources: Mapping[Path, str], *, every: int = 1, unreadable: list[DataError] | None = None
) -> Iterator[NamedPicture]:
    """Yields the pictures of files; of a video each `every`-th frame, from the first.

    Files are decoded ahead by threads, at most `_MOST_AHEAD` of them; what is wrong with one is
    told at its place.

    Args:
        sources: pictures and videos, and their names.
        every: see above.
        unreadable: takes the errors of files that cannot be read, and these are left out (of a
            video what comes after the fault); None: the first such error is raised.

    Raises:
        DataError: a file cannot be read; with `unreadable`, none of them can.
        UsageError: a video, and PyAV is not installed; `every` below 1.
    """
    if every < 1:
        raise UsageError(f"--every {every}: at least 1")
    _require_video_reader(sources)
    any_read = False
    with (
        ThreadPoolExecutor(_DECODERS) as pool,
        closing(done_ahead(pool, _decoded, sources, _MOST_AHEAD)) as decoded,
    ):
        for number, (path, pixels) in enumerate(decoded):
            files_done = number if _is_video(path) else number + 1
            try:
                for each in _named(path, sources[path], pixels, every):
                    any_read = True
                    yield replace(each, files_done=files_done)
            except DataError as error:
                if unreadable is None:
                    raise
                unreadable.append(error)
    if unreadable and not any_read:
        others = f"; nor can any other of the {len(sources)} files be read"
        raise DataError(f"{unreadable[0]}{others if len(sources) > 1 else ''}")


def require_all_read(unreadable: Sequence[DataError], num_sources: int, out: Path) -> None:
    """Raises DataError if files could not be read; called when all else is written to `out`."""
    if unreadable:
        raise DataError(
            f"{len(unreadable)} of {num_sources} files could not be read, or not to the end, and "
            f"were left out; what was found in the others is in '{out}'"
        )


def _decoded(path: Path) -> np.ndarray | DataError | None:
    """Returns pixels, why there are none, or None for a video, which is read as it is shown."""
    if _is_video(path):
        return None
    try:
        return rgb_pixels(path)
    except DataError as error:
        return error


def _named(
    path: Path, name: str, decoded: np.ndarray | DataError | None, every: int
) -> Iterator[NamedPicture]:
    """Yields the pictures of one file, given what `_decoded` returned for it."""
    if isinstance(decoded, DataError):
        raise decoded
    if decoded is None:
        yield from _frames(path, name, every)
    else:
        yield NamedPicture(name, decoded)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES | VIDEO_SUFFIXES


def _require_video_reader(sources: Iterable[Path]) -> None:
    """Raises UsageError for the first video if PyAV is missing, before pictures are looked at."""
    video = next(filter(_is_video, sources), None)
    if video is None:
        return
    try:
        import av  # noqa: F401
    except ImportError:
        raise UsageError(f"'{video}' is a video: pip install 'dkdetr[video]'") from None


def _frames(path: Path, name: str, every: int) -> Iterator[NamedPicture]:
    import av
    from av.error import FFmpegError

    number = 0
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                if number % every == 0:
                    pixels = np.asarray(frame.to_ndarray(format="rgb24"))
                    # Phones store portrait videos lying, with a note by how much to turn them.
                    upright = np.rot90(pixels, round(frame.rotation / 90))
                    # With its suffix: clip.mov may lie beside clip.mp4.
                    yield NamedPicture(f"{name}_{number:06d}.jpg", np.ascontiguousarray(upright))
                number += 1
    except (FFmpegError, IndexError) as error:
        place = f", frame {number}" if number else ""
        raise DataError(f"video {path}{place}: {error}") from None
