"""Full batches across pictures, windows across pictures, and the clock around the encoder."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import encode_stream
from pipeline.encode_stream import BusyClock, embed_stream
from pipeline.request import CacheRequest
from pipeline.resampling import cut_by_matrices, cut_together
from pipeline.window_fit import Look


@pytest.mark.parametrize("sizes", [[3, 4, 0, 9], [0, 0, 5], [8, 8], [1], [16, 0], [40, 0, 41]])
def test_stream_gives_every_stack_its_rows_in_full_batches(sizes: list[int]) -> None:
    seen: list[int] = []

    def encode(crops: torch.Tensor) -> torch.Tensor:
        seen.append(len(crops))
        return crops[:, :1, 0, 0].float()

    numbers = iter(range(1, 100))
    stacks = [
        torch.tensor([next(numbers) for _ in range(size)], dtype=torch.uint8)
        .view(-1, 1, 1, 1)
        .expand(-1, 3, 2, 2)
        for size in sizes
    ]
    rows = list(embed_stream(stacks, encode, batch_size=8))
    assert [len(row) for row in rows] == sizes
    assert set(seen) == {8}
    assert len(seen) == -(-sum(sizes) // 8)
    for row, stack in zip(rows, stacks, strict=True):
        assert row[:, 0].tolist() == stack[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(("device", "usual"), [("cpu", 64), ("cuda", 256)])
def test_a_device_s_batch_is_the_one_that_was_asked_for_or_its_usual(device, usual) -> None:
    request = {"split": "lvis_train", "out": Path("c")}
    for asked, wanted in ((None, usual), (7, 7)):
        found = CacheRequest(**request, crop_batch=asked).crops_at_once(torch.device(device))
        assert found == wanted


def test_no_more_than_a_few_batches_are_under_way() -> None:
    launched = 0
    most = 0

    def encode(crops: torch.Tensor) -> torch.Tensor:
        nonlocal launched
        launched += 1
        return crops[:, :1, 0, 0].float()

    stacks = (torch.zeros((4, 3, 2, 2), dtype=torch.uint8) for _ in range(20))
    for done, _ in enumerate(embed_stream(stacks, encode, batch_size=4), start=1):
        most = max(most, launched - done)
    assert launched == 20
    assert most == encode_stream._IN_FLIGHT


def test_the_clock_sums_what_the_encoder_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"s": 10.0}
    monkeypatch.setattr(encode_stream.time, "perf_counter", lambda: now["s"])

    def encode(crops: torch.Tensor) -> torch.Tensor:
        now["s"] += 2.5
        return crops

    clock = BusyClock(torch.device("cpu"))
    measured = clock.around(encode)
    for _ in range(3):
        measured(torch.zeros(1))
        now["s"] += 100  # somebody else's
    assert clock.seconds() == 7.5


@pytest.mark.parametrize("placement", ["squash", "clip_center", "pad_square"])
def test_windows_of_several_pictures_are_cut_as_those_of_one(placement: str) -> None:
    random = np.random.default_rng(0)
    sizes, counts = [(40, 60), (70, 30), (9, 9), (50, 90), (20, 20)], [50, 0, 3, 100, 0]
    images = [torch.from_numpy(random.integers(0, 256, (3, *size), dtype=np.uint8))
              for size in sizes]  # fmt: skip
    windows = []
    for (height, width), count in zip(sizes, counts, strict=True):
        low = random.uniform(0, 0.5, (count, 2)) * (width, height)
        high = low + random.uniform(0.1, 0.5, (count, 2)) * (width, height)
        windows.append(np.concatenate((np.floor(low), np.ceil(high)), axis=1).astype(np.int64))
    look = Look((24, 32), placement, "bicubic", (9, 8, 7))  # type: ignore[arg-type]
    together = list(cut_together(images, windows, look, dtype=torch.float32))
    assert [len(crops) for crops in together] == counts
    for image, wanted, crops in zip(images, windows, together, strict=True):
        alone = cut_by_matrices(image, wanted, look, dtype=torch.float32)
        # Sums of another length may round another way.
        assert len(wanted) == 0 or (crops.int() - alone.int()).abs().max() <= 1
