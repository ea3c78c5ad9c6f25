"""Norms inside their convolution: the same numbers and names, and only where they stand still."""

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.resnet import Bottleneck, ResNet

from dkdetr.student import conv_norm as folding
from dkdetr.student.backbone import Backbone, resnet50, slim_resnet

STAGES = {"used_stages": (3, 4, 5), "weights": "random"}
# Of the largest number: the same products and sums in another order, over up to 16 blocks.
SHARE = {torch.float64: 1e-10, torch.float32: 1e-4}


def awake(backbone: Backbone) -> Backbone:
    """With norms that do something."""
    torch.manual_seed(0)
    for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.data.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            tensor.data.normal_(0.0, 0.2)
    return backbone


def in_two_steps(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    return norm(conv(x))


def maps_and_gradients(backbone: Backbone, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    maps = backbone(torch.randn(2, 3, 64, 64, dtype=dtype))
    learning = [p for p in backbone.parameters() if p.requires_grad]
    total = torch.stack([m.square().mean() for m in maps]).sum()
    grads = torch.autograd.grad(total, learning) if learning else ()
    return [*maps, *grads]


@pytest.mark.parametrize(
    ("norm", "training", "frozen_stages"),
    [("frozen", True, 1), ("frozen", True, 0), ("batch", False, 0), ("batch", True, 1)],
)
@pytest.mark.parametrize(
    ("make", "dtype"),
    [(slim_resnet, torch.float64), (slim_resnet, torch.float32), (resnet50, torch.float64)],
)
def test_equals_convolution_then_norm(
    make, dtype, norm: str, training: bool, frozen_stages: int, monkeypatch: pytest.MonkeyPatch
):
    """Maps and gradients of convolutions and, where they learn, of norms."""
    options = {"width": 8} if make is slim_resnet else {}
    backbone = awake(make(norm=norm, frozen_stages=frozen_stages, **STAGES, **options))
    backbone = backbone.to(dtype).train(training)
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    found = maps_and_gradients(backbone, dtype)
    backbone.load_state_dict(state)
    monkeypatch.setattr(folding, "conv_norm", in_two_steps)
    for one, other in zip(found, maps_and_gradients(backbone, dtype), strict=True):
        assert (one - other).abs().max() <= SHARE[dtype] * other.abs().max()


def test_statistics_that_move_are_not_folded():
    backbone = slim_resnet(norm="batch", frozen_stages=1, width=8, **STAGES).train()
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))
    moved = {key for key, value in backbone.named_buffers() if not torch.equal(value, before[key])}
    moving = {key for key in before if not key.startswith(("stem.", "stages.0."))}
    assert moved == moving


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_and_comes_closer(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    backbone = awake(slim_resnet(norm="frozen", frozen_stages=0, width=8, **STAGES))
    pixels = torch.randn(2, 3, 64, 64)

    def coarsest() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            return backbone(pixels)[-1]

    with torch.no_grad():
        exact = backbone(pixels)[-1]
    folded = coarsest()
    monkeypatch.setattr(folding, "conv_norm", in_two_steps)
    apart = coarsest()
    assert folded.dtype == dtype
    # Torchvision's norm gives float32 back: twice the memory to write and to read.
    assert apart.dtype == torch.float32
    rounding = torch.finfo(dtype).eps
    assert (folded - exact).abs().max() < 3 * rounding * exact.abs().max()


def test_names_and_shapes_are_torchvision_s():
    trunk = ResNet(folding.FoldingBottleneck, [3, 4, 6, 3])
    theirs = torchvision.models.resnet50(weights=None)
    assert issubclass(folding.FoldingBottleneck, Bottleneck)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in trunk.state_dict().items()} == shapes
    trunk.load_state_dict(theirs.state_dict())
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        found, wanted = (model.double().eval()(pixels) for model in (trunk, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("device", "last"), [("cuda", True), ("cpu", False)])
def test_on_a_gpu_channels_lie_side_by_side(device: str, last: bool):
    """On a fake one: whatever were laid out anew on the way would show at the maps."""
    with FakeTensorMode(), torch.device(device):
        backbone = slim_resnet(norm="frozen", frozen_stages=0, width=8, **STAGES).train()
        maps = backbone(torch.zeros(2, 3, 64, 64))
    assert len(maps) == 3
    for feature_map in maps:
        assert feature_map.is_contiguous(memory_format=torch.channels_last) is last
        assert feature_map.is_contiguous() is not last


@pytest.mark.gpu
def test_a_gpu_gets_channels_side_by_side():
    backbone = slim_resnet(norm="frozen", frozen_stages=0, width=8, **STAGES).cuda()
    for feature_map in backbone(torch.randn(2, 3, 64, 64, device="cuda")):
        assert feature_map.is_contiguous(memory_format=torch.channels_last)
