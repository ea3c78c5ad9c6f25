"""Batch norm over ranks where there is one rank alone, and its names; more in tests/distributed."""

import pytest
import torch
from torch import distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from dkdetr.student import sync_norm
from dkdetr.student.backbone import slim_resnet
from dkdetr.student.sync_norm import SyncBatchNorm2d, by_formula, by_kernels, own_statistics


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_torch_s_batch_norm_bit_by_bit(training: bool):
    ours, theirs = SyncBatchNorm2d(4).train(training), nn.BatchNorm2d(4).train(training)
    torch.manual_seed(0)
    maps = torch.randn(2, 4, 5, 3) + 1
    for _ in range(2):
        assert torch.equal(ours(maps), theirs(maps))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_by_its_own_statistics_it_asks_no_rank_and_stays_as_it_was(monkeypatch):
    monkeypatch.setattr(sync_norm, "_num_ranks", lambda: 2)
    monkeypatch.setattr(sync_norm, "by_formula", lambda *_: pytest.fail("asked the other rank"))
    norm, theirs = SyncBatchNorm2d(4).eval(), nn.BatchNorm2d(4).train()
    norm.running_mean.fill_(float("nan"))
    before = {name: value.clone() for name, value in norm.named_buffers()}
    maps = torch.randn(2, 4, 5, 3) + 1
    with own_statistics(nn.Sequential(norm)):
        assert torch.equal(norm(maps), theirs(maps))
    assert not norm.training
    assert norm(maps).isnan().all()
    for name, value in norm.named_buffers():
        torch.testing.assert_close(value, before.pop(name), rtol=0, atol=0, equal_nan=True)
    assert not before


def test_what_a_frozen_stage_goes_by_stays_while_others_go_by_their_own() -> None:
    norm = SyncBatchNorm2d(4).eval().requires_grad_(False)
    norm.running_mean.fill_(3.0)
    maps = torch.randn(2, 4, 5, 3)
    wanted = norm(maps)
    with own_statistics(nn.Sequential(norm)):
        assert torch.equal(norm(maps), wanted)
    assert not norm.training


def test_checkpoints_of_either_norm_load_into_the_other():
    ours, torch_s = SyncBatchNorm2d(4), nn.SyncBatchNorm(4)
    ours.load_state_dict(torch_s.state_dict())
    torch_s.load_state_dict(ours.state_dict())
    options = {"weights": "random", "frozen_stages": 1, "used_stages": (3, 4, 5), "width": 8}
    synced, plain = (slim_resnet(norm=norm, **options) for norm in ("sync_batch", "batch"))
    synced.load_state_dict(plain.state_dict())
    plain.load_state_dict(synced.state_dict())
    pixels = torch.randn(1, 3, 64, 64)
    for one, other in zip(synced.eval()(pixels), plain.eval()(pixels), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_the_kernels_are_the_formula():
    distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        found = []
        for way in (by_formula, by_kernels):
            torch.manual_seed(0)
            norm = SyncBatchNorm2d(8).cuda()
            maps = torch.randn(4, 8, 16, 16, device="cuda") + 3
            maps = maps.contiguous(memory_format=torch.channels_last).requires_grad_()
            result = way(norm, maps)
            result.sin().sum().backward()
            found.append([result, maps.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    finally:
        distributed.destroy_process_group()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
