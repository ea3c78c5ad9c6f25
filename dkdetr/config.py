"""Every setting of an experiment. `experiment_file` loads, overrides and dumps them.

The defaults are the paper's LVIS run (70 epochs); an experiment file states what it changes.
"""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid")


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
    weights: str | None = None
    """A student file to start from (`dkdetr convert`, `dkdetr export`); absent = a fresh start."""
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
    ema_decay: float = 0.0
    """Decay of a running average of the weights, scored by `eval --ema`; 0 = none, the paper."""


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
class ComputeConfig:
    """How the machines at hand do the work. A run may be resumed with other values."""

    __pydantic_config__ = _STRICT
    micro_batches: int = 1
    """Parts that a rank computes its share of a batch in, one after the other: k equal k ranks."""
    activation_checkpointing: bool = False
    """Computes encoder and decoder layers twice instead of keeping what backward needs."""
    compile: Literal["off", "inductor", "aot_eager", "eager"] = "off"
    """The backend of torch.compile for the student."""
    rank_timeout_s: float = 600.0
    """How long a rank waits for the others before it gives the job up."""


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
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
