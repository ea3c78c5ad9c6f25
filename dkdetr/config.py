"""Every setting of an experiment. `experiment_file` loads, overrides and dumps them.

The defaults are the paper's LVIS run (70 epochs); an experiment file states what it changes.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

_STRICT = ConfigDict(extra="forbid")

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]

MASK_UPSAMPLING = 4
"""How much finer a mask is than the student's finest level (method A.4)."""


Precision = Literal["auto", "fp32", "tf32", "fp16", "bf16"]


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
    """A student file to start from (`dkdetr convert`, `dkdetr export`); "none" = a fresh start."""
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
    denoising: Count = 0
    """Groups of denoising queries in training (DN-DETR); 0 = the paper."""
    denoising_box_noise: Fraction = 0.4
    denoising_label_noise: Fraction = 0.2
    mask_head: bool = False
    """SOIT's dynamic mask head (method A.4); off: boxes only, no polygon is read."""
    masks_at_once: Annotated[int, Field(ge=1)] = 32
    """Masks that stand in memory at a time, in training and at inference."""

    @property
    def mask_stride(self) -> float:
        """Pixels of the view to a pixel of a mask."""
        return 2 ** self.backbone.stages[0] / MASK_UPSAMPLING

    def mask_side(self, image_size: int) -> int:
        """Returns the side of the masks of a square input."""
        return MASK_UPSAMPLING * math.ceil(image_size / 2 ** self.backbone.stages[0])


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Cosine similarity to text embeddings: logit = cos / temperature (+ bias)."""

    __pydantic_config__ = _STRICT
    temperature: float = 0.05
    bias_init: float | None = None
    """Start of a learnable logit bias; "none" = no bias, the paper."""


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
    weight_dice: Annotated[float, Field(ge=0)] = 8.0
    """Of the masks' dice loss; asked for only where `student.mask_head` is on."""
    weight_mask_bce: Annotated[float, Field(ge=0)] = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    encoder_tokens: Literal["all", "valid"] = "all"
    """Whose objectness is judged: `all` as released, or no tokens of padding and border."""
    loss_class: Literal["focal", "fed"] = "focal"
    """`fed`: only a batch's own classes and sampled ones count as negatives (Detic)."""
    fed_classes: Annotated[int, Field(ge=1)] = 50
    """Classes that take part in a batch of `fed`, its own included."""
    fed_power: NotNegative = 0.5
    """Others are drawn in proportion to the number of their training images to this power."""


@dataclass(frozen=True, kw_only=True)
class SemanticKDConfig:
    """SKD: each KD feature finds its own region's teacher embedding (paper Eq. 3, 4)."""

    __pydantic_config__ = _STRICT
    weight: NotNegative = 0.1
    """0 switches SKD off."""
    loss: Literal["bce", "l1", "infonce", "siglip_bias", "centred"] = "bce"
    """`bce` and `l1` are the paper's; the others are ours (losses/README.md)."""
    temperature: Positive = 0.05
    """Of `siglip_bias`: where its learnable scale starts."""
    bias: float = 0.0
    """Added to every logit of `bce` and `centred`, 0 = the paper; of `siglip_bias`: its start."""
    duplicate_similarity: Fraction = 0.0
    """Regions whose teacher embeddings are more alike than this are no negatives; 0: all are."""


@dataclass(frozen=True, kw_only=True)
class RelationalKDConfig:
    """RKD: similarities among KD features imitate those among teacher embeddings (Eq. 5)."""

    __pydantic_config__ = _STRICT
    weight: NotNegative = 2.0
    """0 switches RKD off."""
    temperature: Positive = 0.2
    relations: Annotated[tuple[Literal["image", "batch"], ...], Field(min_length=1)] = (
        "image",
        "batch",
    )
    include_self: bool = True
    """Whether a region's similarity to itself stands in its row."""
    reverse: bool = False
    """KL(student || teacher) instead of KL(teacher || student)."""
    cross_only: bool = False
    """Leave pairs of one image out of the batch's relations (but for a region with itself)."""
    gather: bool = False
    """Relations of the batch reach over all ranks, with exact gradients."""
    neighbor_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a rank's batch that is related to its other images; our addition, 0 = the paper."""


@dataclass(frozen=True, kw_only=True)
class RegionSelectionConfig:
    """Which cached regions of an augmented view may be distilled (method B.3, B.5)."""

    __pydantic_config__ = _STRICT
    max_base_iou: Fraction = 0.5
    nms_iou: Fraction = 0.5
    min_visible: Fraction = 0.7
    min_side: NotNegative = 16.0
    """Pixels of the augmented view."""


@dataclass(frozen=True, kw_only=True)
class KDConfig:
    """Distillation: which queries carry it and what they learn (method B.2)."""

    __pydantic_config__ = _STRICT
    start_epoch: Count = 40
    """Burn-in: epochs before this one train the plain detector."""
    regions_per_image: Count = 20
    """0 switches distillation off altogether."""
    layers: Literal["last", "all"] = "last"
    auxiliary_queries: bool = True
    """False: detection queries carry the distillation (Table 5, row 4)."""
    alignment: Literal["cached", "iou", "hybrid", "online"] = "cached"
    """Anchors of KD queries: cached boxes; the student's own, each given a cached box by IoU; both;
    or the student's own, whose crops the teacher embeds during training (the paper)."""
    content: Literal["shared", "slots"] = "shared"
    """One learned content for all KD queries, or one a place (the paper)."""
    align_iou: Fraction = 0.5
    """Least IoU of a query's own anchor with the cached box whose embedding it is given."""
    candidates_per_image: Count = 100
    """Cached regions offered to the student's own anchors (`iou`, `hybrid`)."""
    exclude: Literal["iou", "matched"] = "iou"
    """Own anchors left out: those that overlap a base object, or only those matched to one."""
    hybrid_queries: Count = 0
    """A control: extra detection queries in training, without distillation (H-DETR)."""
    hybrid_repeats: Annotated[int, Field(ge=1)] = 6
    """How many of the extra queries each object is matched to."""
    skd: SemanticKDConfig = field(default_factory=SemanticKDConfig)
    rkd: RelationalKDConfig = field(default_factory=RelationalKDConfig)
    selection: RegionSelectionConfig = field(default_factory=RegionSelectionConfig)

    def __post_init__(self) -> None:
        """Raises ValueError for settings that contradict each other."""
        if not self.auxiliary_queries and self.alignment == "hybrid":
            raise ValueError("alignment = hybrid wants KD queries, so auxiliary_queries = true")
        if not self.auxiliary_queries and self.content == "slots":
            raise ValueError("content = slots is for KD queries and wants auxiliary_queries = true")
        if self.alignment == "hybrid" and self.regions_per_image == 1:
            raise ValueError("alignment = hybrid halves regions_per_image: give it at least 2")
        if (self.rkd.gather or self.rkd.cross_only) and "batch" not in self.rkd.relations:
            raise ValueError("rkd.gather and rkd.cross_only want 'batch' among rkd.relations")

    @property
    def enabled(self) -> bool:
        """True if any epoch of the run can distil."""
        return self.regions_per_image > 0 and (self.skd.weight > 0 or self.rkd.weight > 0)

    @property
    def has_start(self) -> bool:
        """True if epochs from `start_epoch` on differ from those before: the burn-in ends."""
        return self.enabled or self.hybrid_queries > 0

    def begun(self, epoch: int) -> bool:
        """Returns True for the epochs behind the burn-in."""
        return epoch >= self.start_epoch

    @property
    def paired_from_start(self) -> bool:
        """True if query and embedding belong together before the forward pass."""
        return self.alignment == "cached" and self.auxiliary_queries

    @property
    def offered_regions(self) -> int:
        """Cached regions that a batch brings for each image."""
        if self.alignment == "cached":
            return self.regions_per_image
        if self.alignment == "online":
            return 0
        return max(self.candidates_per_image, self.regions_per_image)

    @property
    def anchored_regions(self) -> int:
        """The first of the offered regions, at whose boxes KD queries are anchored."""
        if self.paired_from_start:
            return self.regions_per_image
        return self.regions_per_image // 2 if self.alignment == "hybrid" else 0


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
    precision: Precision = "fp32"
    """`auto`: bf16 where the GPU has it, else fp16 with a loss scaler; fp32 on a CPU. `tf32`:
    float32, multiplied with 10 bits of mantissa where the GPU can; so is what bf16, fp16 and auto
    leave in float32."""
    ema_decay: float = 0.0
    """Decay of a running average of the weights, scored by `eval --ema`; 0 = none, the paper."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Batches and augmentation: large-scale jitter, crop, flip, pad (method A.1)."""

    __pydantic_config__ = _STRICT
    batch_size: int = 128
    """Images a step over all ranks; must divide by the number of ranks."""
    workers: int = 8
    """Loader processes a rank, at most one a core; 0 loads in the training process."""
    cache_mode: Literal["stored", "resident"] = "stored"
    """How the cache is read: as it lies on the disk, or its selectable regions in shared memory."""
    sampler: Literal["repeat_factor", "uniform"] = "repeat_factor"
    repeat_threshold: float = 1e-3
    image_size: int = 1024
    """Side of the square view in training; longest side in evaluation."""
    scale_range: tuple[float, float] = (0.1, 2.0)
    flip_probability: float = 0.5
    augment: Literal["auto", "loader", "device"] = "loader"
    """Where training views are resampled: in the loader processes, or where the student computes;
    then those only decode. `auto`: there if it is a GPU, else in the loader. The same views but for
    their rounding to grey levels. `eval` does so too, on a GPU."""


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
    """Parts that a rank computes its share of a batch in, one after the other: k equal k ranks, but
    for batch-norm statistics, which cover one part of every rank."""
    activation_checkpointing: bool = False
    """Computes encoder and decoder layers twice instead of keeping what backward needs."""
    compile: Literal["off", "inductor", "aot_eager", "eager"] = "off"
    """The backend of torch.compile for the student."""
    cuda_graphs: bool = False
    """Replays the compiled student's forward and backward pass as CUDA graphs; wants a GPU,
    `compile = "inductor"` and one micro-batch."""
    rank_timeout_s: float = 600.0
    """How long a rank waits for the others before it gives the job up."""


@dataclass(frozen=True, kw_only=True)
class OpsConfig:
    """Which code does what can be done in several ways. A run may be resumed with other values."""

    __pydantic_config__ = _STRICT
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Of deformable attention; `auto`: the Triton kernel on GPUs that run it, else PyTorch."""


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
    ops: OpsConfig = field(default_factory=OpsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
