"""`--offline`: no network call, by us or by the libraries that would make one for us."""

import os

_OURS = "DKDETR_OFFLINE"
_THEIRS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def go_offline() -> None:
    """Forbids the network to this process and its children; to be called before heavy imports."""
    for variable in (_OURS, *_THEIRS):
        os.environ[variable] = "1"


def is_offline() -> bool:
    """Returns True if the network is forbidden, by `go_offline` or by `DKDETR_OFFLINE=1`."""
    return os.environ.get(_OURS, "") not in ("", "0")
