"""Environment variables that switch something on or off."""

import os

from dkdetr.errors import UsageError

ON = ("1", "true", "yes", "on")
OFF = ("", "0", "false", "no", "off")


def is_switched_on(variable: str) -> bool:
    """Returns whether an environment variable says yes, in any case; False if it is not set.

    Raises:
        UsageError: it says neither yes nor no.
    """
    said = os.environ.get(variable, "").strip().lower()
    if said in ON:
        return True
    if said in OFF:
        return False
    raise UsageError(
        f"{variable}={os.environ[variable]!r} is neither yes ({', '.join(ON)}) nor no "
        f"({', '.join(OFF[1:])}, empty)"
    )
