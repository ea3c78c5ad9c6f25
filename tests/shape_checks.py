"""The type checker that conftest.py hangs into dkdetr's functions: beartype, where it can."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

# An int will do where a float is asked for, as in every type checker.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with its arguments and result checked against its annotations.

    A method annotated with `typing.Self` stays as it is: beartype takes those only on whole
    classes, which jaxtyping's import hook does not decorate.
    """
    try:
        return _beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function
