"""AdamW with DK-DETR's parameter groups, and the learning rate as a function of progress."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW

from dkdetr.config import OptimConfig
from dkdetr.student.detector import KD_PREFIX

_SLOW_NAMES = ("backbone", "sampling_offsets", "reference_points")
_NORMS = (nn.LayerNorm, nn.GroupNorm)


def parameter_groups(student: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Returns the groups of the released configuration (method A.1), each with its `lr_scale`.

    The backbone, sampling offsets and reference points learn slower. Norms outside the backbone
    do not decay; the backbone's do, because in that configuration the slower rate's rule
    overrides the norm's. Biases decay, but a learnable calibration of SKD does not.
    """
    groups = {
        "slow": {"lr_scale": config.slow_lr_factor, "weight_decay": config.weight_decay},
        "norm": {"lr_scale": 1.0, "weight_decay": 0.0},
        "rest": {"lr_scale": 1.0, "weight_decay": config.weight_decay},
    }
    members: dict[str, dict[str, nn.Parameter]] = {name: {} for name in groups}
    for name, parameter, owner in _named_parameters(student):
        if any(slow in name for slow in _SLOW_NAMES):
            members["slow"][name] = parameter
        elif isinstance(owner, _NORMS) or name.startswith("kd_calibration."):
            members["norm"][name] = parameter
        else:
            members["rest"][name] = parameter
    return [
        {
            "params": list(members[name].values()),
            "param_names": list(members[name]),
            "lr": config.lr * options["lr_scale"],
            "name": name,
            **options,
        }
        for name, options in groups.items()
        if members[name]
    ]


def make_optimizer(student: nn.Module, config: OptimConfig) -> AdamW:
    """Returns AdamW over `parameter_groups`; frozen stages are left out.

    On GPUs one kernel updates many parameters (`fused`). Its state knows the parameters' names
    (`param_names`), so that another student can take it over.
    """
    return AdamW(
        parameter_groups(student, config),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=_may_fuse(student.parameters()) or None,
    )


def load_optimizer(optimizer: AdamW, state: Mapping[str, Any]) -> None:
    """Takes over a saved state; how it is computed stays as this machine has it."""
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    groups = [saved | {"fused": own["fused"]} for saved, own in pairs]
    optimizer.load_state_dict({**state, "param_groups": groups})


def learning_rate_factor(config: OptimConfig, *, epoch: int, iteration: int) -> float:
    """Returns the factor on every group's rate: linear warm-up times the drops behind us.

    A function of progress alone, so that a resumed run needs no scheduler's memory.
    """
    factor = config.lr_drop_factor ** sum(epoch >= drop for drop in config.lr_drop_epochs)
    if iteration < config.warmup_iterations:
        missing = 1 - iteration / config.warmup_iterations
        factor *= 1 - missing * (1 - config.warmup_ratio)
    return factor


def set_learning_rate(optimizer: AdamW, config: OptimConfig, factor: float) -> float:
    """Sets every group's rate and returns the full one."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr * group["lr_scale"] * factor
    return config.lr * factor


def _may_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    return all(parameter.is_cuda for parameter in parameters)


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    owners: Mapping[str, nn.Module] = dict(module.named_modules())
    # KD parameters have no gradient during burn-in but must keep their place in the optimiser.
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or name.startswith(KD_PREFIX):
            yield name, parameter, owners[name.rpartition(".")[0]]
