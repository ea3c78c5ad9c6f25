"""`--offline`: no network call, by us or by the libraries that would make one for us."""

import os
import sys

from dkdetr.switches import is_switched_on

_OURS = "DKDETR_OFFLINE"
_THEIRS = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "offline"}


def go_offline() -> None:
    """Forbids the network to this process and its children; to be called before heavy imports."""
    os.environ |= {_OURS: "1", **_THEIRS}
    # Imported already, it has read its variable.
    if (hub := sys.modules.get("huggingface_hub.constants")) is not None:
        hub.HF_HUB_OFFLINE = True  # pyright: ignore[reportAttributeAccessIssue]


def is_offline() -> bool:
    """Returns True if the network is forbidden, by `go_offline` or by `DKDETR_OFFLINE=1`.

    Raises:
        UsageError: the variable says neither yes nor no.
    """
    return is_switched_on(_OURS)
