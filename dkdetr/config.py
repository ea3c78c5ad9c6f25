"""Every setting of an experiment, and the one way to load, override and dump them.

The defaults are the paper's LVIS run (70 epochs); an experiment file states what it changes.
Order: dataclass default < the file an experiment `extends` < the experiment file < `--set a.b=c`.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import tomli_w
from pydantic import ConfigDict, TypeAdapter, ValidationError

from dkdetr.errors import UsageError

_STRICT = ConfigDict(extra="forbid")


class ConfigError(UsageError):
    """A setting is unknown, missing or has an impossible value; names its dotted path."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The convolutional trunk and which of its stages feed the neck."""

    __pydantic_config__ = _STRICT
    arch: Literal["resnet50", "slim_resnet"] = "resnet50"
    weights: str = "imagenet"
    """`imagenet` (torchvision IMAGENET1K_V1), `pictograms` (shipped), `random`, or a file."""
    norm: Literal["sync_batch", "batch", "frozen"] = "sync_batch"
    frozen_stages: int = 1
    """Stages that do not learn: 0 none, 1 the stem and stage 1, ..."""
    width: int = 64
    """Channels of the first stage; `resnet50` knows only 64."""
    stages: tuple[int, ...] = (3, 4, 5)
    """C-numbers of the stages used; C3 has stride 8."""
    extra_levels: int = 1
    """Further levels of the neck, each a stride-2 convolution."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Two-stage, box-refining Deformable DETR (method A.2)."""

    __pydantic_config__ = _STRICT
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    neck_bias: bool = False
    """Biases of the neck's convolutions: the original Deformable DETR has them, DK-DETR none."""
    embed_dim: int = 256
    num_heads: int = 8
    num_points: int = 4
    ffn_dim: int = 1024
    dropout: float = 0.1
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    num_queries: int = 300


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Cosine similarity to text embeddings: logit = cos / temperature (+ bias)."""

    __pydantic_config__ = _STRICT
    temperature: float = 0.05
    bias_init: float | None = None
    """Start of a learnable logit bias; absent = no bias, the paper."""


@dataclass(frozen=True, kw_only=True)
class DetectionLossConfig:
    """Matching costs, weights and the focal loss of the base detector (method A.3)."""

    __pydantic_config__ = _STRICT
    cost_class: float = 2.0
    cost_bbox: float = 5.0
    cost_giou: float = 2.0
    weight_class: float = 2.0
    weight_bbox: float = 5.0
    weight_giou: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0


@dataclass(frozen=True, kw_only=True)
class SemanticKDConfig:
    """SKD: each KD feature finds its own region's teacher embedding (paper Eq. 3, 4)."""

    __pydantic_config__ = _STRICT
    weight: float = 0.1
    """0 switches SKD off."""
    loss: Literal["bce", "l1"] = "bce"
    temperature: float = 0.05
    bias: float = 0.0
    """Added to every similarity logit of `bce`; 0 = the paper."""


@dataclass(frozen=True, kw_only=True)
class RelationalKDConfig:
    """RKD: similarities among KD features imitate those among teacher embeddings (Eq. 5)."""

    __pydantic_config__ = _STRICT
    weight: float = 2.0
    """0 switches RKD off."""
    temperature: float = 0.2
    relations: tuple[Literal["image", "batch"], ...] = ("image", "batch")


@dataclass(frozen=True, kw_only=True)
class RegionSelectionConfig:
    """Which cached regions of an augmented view may be distilled (method B.3, B.5)."""

    __pydantic_config__ = _STRICT
    max_base_iou: float = 0.5
    nms_iou: float = 0.5
    min_visible: float = 0.7
    min_side: float = 16.0
    """Pixels of the augmented view."""


@dataclass(frozen=True, kw_only=True)
class KDConfig:
    """Distillation through auxiliary queries anchored at cached boxes (decision 1)."""

    __pydantic_config__ = _STRICT
    start_epoch: int = 40
    """Burn-in: epochs before this one train the plain detector."""
    regions_per_image: int = 20
    """0 switches distillation off altogether."""
    layers: Literal["last", "all"] = "last"
    skd: SemanticKDConfig = field(default_factory=SemanticKDConfig)
    rkd: RelationalKDConfig = field(default_factory=RelationalKDConfig)
    selection: RegionSelectionConfig = field(default_factory=RegionSelectionConfig)

    @property
    def enabled(self) -> bool:
        """True if any epoch of the run can distil."""
        return self.regions_per_image > 0 and (self.skd.weight > 0 or self.rkd.weight > 0)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its parameter groups and the shape of its learning rate (method A.1)."""

    __pydantic_config__ = _STRICT
    lr: float = 8e-4
    """Learning rate at `data.batch_size` images a step."""
    slow_lr_factor: float = 0.1
    """For the backbone, sampling offsets and reference points."""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 0.1
    warmup_iterations: int = 2000
    warmup_ratio: float = 0.001
    epochs: int = 70
    lr_drop_epochs: tuple[int, ...] = (55,)
    lr_drop_factor: float = 0.1
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "fp32"
    """`auto`: bf16 where the GPU has it, else fp16 with a loss scaler; fp32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Batches and augmentation: large-scale jitter, crop, flip, pad (method A.1)."""

    __pydantic_config__ = _STRICT
    batch_size: int = 128
    """Images a step over all ranks; must divide by the number of ranks."""
    workers: int = 8
    """Loader processes a rank; 0 loads in the training process."""
    sampler: Literal["repeat_factor", "uniform"] = "repeat_factor"
    repeat_threshold: float = 1e-3
    image_size: int = 1024
    """Side of the square view in training; longest side in evaluation."""
    scale_range: tuple[float, float] = (0.1, 2.0)
    flip_probability: float = 0.5


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is kept of an image's detections, and how many images at once."""

    __pydantic_config__ = _STRICT
    max_detections: int = 300
    batch_size: int = 8


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One experiment, whole. `name` is the experiment file's."""

    __pydantic_config__ = _STRICT
    name: str
    seed: int = 0
    checkpoint_every_s: float = 600.0
    student: StudentConfig = field(default_factory=StudentConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    detection: DetectionLossConfig = field(default_factory=DetectionLossConfig)
    kd: KDConfig = field(default_factory=KDConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration and, for every dotted key that a file or `--set` gave, who gave it."""

    config: ExperimentConfig
    origins: Mapping[str, str]


_ADAPTER = TypeAdapter(ExperimentConfig)


def shipped_experiments() -> list[str]:
    """Returns the names of the experiment files that come with the package."""
    entries = files("dkdetr.experiments").iterdir()
    return sorted(entry.name[:-5] for entry in entries if entry.name.endswith(".toml"))


def load_experiment(experiment: str, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Returns the resolved configuration of a shipped name or a TOML file, with `a.b=c` overrides.

    Raises:
        ConfigError: unknown experiment or key, or an impossible value; names the dotted path.
    """
    tables = _read_chain(experiment, seen=())
    merged, origins = dict[str, Any](), dict[str, str]()
    for source, table in tables:
        _merge(merged, table, origins, source, prefix="")
    for override in overrides:
        _merge(merged, _parse_override(override), origins, "--set", prefix="")
    merged.setdefault("name", Path(experiment).stem)
    return ResolvedConfig(config=config_from_dict(merged), origins=origins)


def config_from_dict(table: Mapping[str, Any]) -> ExperimentConfig:
    """Returns the configuration of a plain table; raises ConfigError with the dotted path."""
    try:
        return _ADAPTER.validate_python(dict(table))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            raise ConfigError(f"unknown setting '{path}'{_nearest_keys(path)}") from None
        raise ConfigError(f"setting '{path}': {first['msg']}, got {first['input']!r}") from None


def config_to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Returns a plain table that `config_from_dict` reads back; absent options are left out."""
    return _without_none(asdict(config))


def dump_toml(config: ExperimentConfig) -> str:
    """Returns the whole configuration as TOML."""
    return tomli_w.dumps(config_to_dict(config))


def config_hash(config: ExperimentConfig) -> str:
    """Returns 8 hex digits that change with any setting."""
    canonical = json.dumps(config_to_dict(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns `{"a.b": value}` for nested tables."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_chain(experiment: str, seen: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    if experiment in seen:
        raise ConfigError(f"experiment '{experiment}' extends itself: {' -> '.join(seen)}")
    path = Path(experiment)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(f"no experiment file '{experiment}'")
        text = path.read_text(encoding="utf-8")
    elif experiment in shipped_experiments():
        text = (files("dkdetr.experiments") / f"{experiment}.toml").read_text(encoding="utf-8")
    else:
        known = ", ".join(shipped_experiments())
        raise ConfigError(f"unknown experiment '{experiment}'; shipped: {known}, or a .toml file")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"experiment '{experiment}' is not TOML: {error}") from None
    parent = table.pop("extends", None)
    if parent is None:
        return [(experiment, table)]
    if str(parent).endswith(".toml"):
        parent = str(path.parent / str(parent))
    return [*_read_chain(str(parent), (*seen, experiment)), (experiment, table)]


def _merge(
    into: dict[str, Any],
    table: Mapping[str, Any],
    origins: dict[str, str],
    source: str,
    prefix: str,
) -> None:
    for key, value in table.items():
        if isinstance(value, Mapping):
            inner = cast("Mapping[str, Any]", value)
            _merge(into.setdefault(key, {}), inner, origins, source, f"{prefix}{key}.")
        else:
            into[key] = value
            origins[f"{prefix}{key}"] = source


def _parse_override(override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set wants KEY=VALUE, got '{override}'")
    try:
        nested: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        nested = text
    for part in reversed(path.split(".")):
        nested = {part: nested}
    return nested


def _nearest_keys(path: str) -> str:
    parent: Any = ExperimentConfig
    for part in path.split(".")[:-1]:
        parent = next((f.type for f in fields(parent) if f.name == part), None)
        if not is_dataclass(parent):
            return ""
    return "; known here: " + ", ".join(f.name for f in fields(parent))


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(cast("dict[str, Any]", value)) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
