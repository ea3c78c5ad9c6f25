"""The processes of one torchrun that train a proposal network together."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed

from dkdetr.engine.distributed import Ranks
from dkdetr.errors import PeerFailedError

PATIENCE_S = 6 * 3600.0
"""The first rank hashes and decodes every picture while the others wait. A rank that dies is
noticed by torchrun, which ends them all, whatever this says."""


class FirstRankError(PeerFailedError):
    """The first rank stopped before the training, and says why itself."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("the first rank stopped; its own message says why")
        self.exit_code = exit_code


def share_from_first(ranks: Ranks, message: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the first rank's message, plain JSON data, on every rank; the others give None."""
    text = json.dumps(dict(message)).encode() if message is not None else b""
    if ranks.world_size > 1:
        length = torch.tensor([len(text)], device=ranks.device)
        distributed.broadcast(length, src=0)
        data = torch.zeros(int(length.item()), dtype=torch.uint8)
        if ranks.is_first:
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        data = data.to(ranks.device)
        distributed.broadcast(data, src=0)
        text = data.cpu().numpy().tobytes()
    return json.loads(text)
