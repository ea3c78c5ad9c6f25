"""The results of all ranks, brought once to the first one, as the bytes that will stand on disk."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, distributed

from dkdetr.evaluation.results_writer import ResultsWriter


@dataclass(frozen=True)
class RankShare:
    """Which share of the images this process has; the first of all scores and writes."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """True on the rank that writes."""
        return self.rank == 0


def gather_results(writer: ResultsWriter, share: RankShare, device: torch.device) -> None:
    """Adds every other rank's results to the first rank's writer; a rank may have none.

    Nothing is sent before all ranks have come here. `device` is where the process group wants its
    tensors.
    """
    if share.world_size == 1:
        return
    places = _places(writer)
    own = torch.tensor([len(places), writer.num_bytes], device=device)
    sizes = [torch.empty_like(own) for _ in range(share.world_size)]
    distributed.all_gather(sizes, own)
    if not share.is_first:
        if len(places):
            _send(places, device)
            for piece in writer.pieces():
                _send(torch.frombuffer(bytearray(piece), dtype=torch.uint8), device)
        return
    for rank in range(1, share.world_size):
        num_images, num_bytes = sizes[rank].tolist()
        if num_images:
            table = _receive((num_images, 3), torch.int64, rank, device).tolist()
            writer.absorb(
                {image_id: (offset, size) for image_id, offset, size in table},
                _received_pieces(num_bytes, writer.piece_bytes, rank, device),
            )


def _places(writer: ResultsWriter) -> Tensor:
    rows = [(image_id, *place) for image_id, place in writer.places.items()]
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, 3))


def _send(tensor: Tensor, device: torch.device) -> None:
    distributed.send(tensor.to(device), dst=0)


def _receive(shape: tuple[int, ...], dtype: torch.dtype, rank: int, device: torch.device) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=device)
    distributed.recv(tensor, src=rank)
    return tensor.cpu()


def _received_pieces(
    num_bytes: int, piece_bytes: int, rank: int, device: torch.device
) -> Iterator[bytes]:
    for start in range(0, num_bytes, piece_bytes):
        size = min(piece_bytes, num_bytes - start)
        yield _receive((size,), torch.uint8, rank, device).numpy().tobytes()
