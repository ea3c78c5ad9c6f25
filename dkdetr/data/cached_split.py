"""The data that a cache was made of, found by what the cache remembers of them."""

from pathlib import Path

from dkdetr.data.splits import Split, load_split
from dkdetr.errors import DataError


def load_cached_split(name: str, data_root: Path) -> Split:
    """Returns the split of a cache or run; of a user's own data it remembers absolute paths.

    Args:
        name: as the cache has it.
        data_root: of the data sets with names.

    Raises:
        DataError: they are not there (any more), or malformed.
    """
    try:
        return load_split(name, data_root)
    except DataError as error:
        if ":" not in name:
            raise
        raise DataError(
            f"{error}. The cache was made of '{name}'. If the data have moved, let them be found "
            "there (a link, or docker run -v), or give their new place to the command that made "
            "the cache, dkdetr cache-teacher --split: it keeps all that is whole"
        ) from None
