"""What one `cache-teacher` command asks for, and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from cache.plan import Storage
from dkdetr.data.prompts import read_templates, templates_of_sets
from dkdetr.defaults import DEFAULT_PROMPTS, DEFAULT_TEACHER
from dkdetr.errors import UsageError
from dkdetr.experiment_file import flatten, parse_override
from pipeline.crops import CropRule
from pipeline.decoding import DecoderChoice
from pipeline.executor import Executor
from pipeline.places import (
    absolute_experiment,
    absolute_proposals,
    absolute_split,
    absolute_teacher,
)
from pipeline.recall import Recall
from pipeline.teacher import EncoderChoice, Precision
from pipeline.teacher_model import usual_batch


@dataclass(frozen=True, kw_only=True)
class CacheRequest:
    """Everything that `cache-teacher` can be told; the defaults are method B.4 to B.6's."""

    split: str
    out: Path
    data_root: Path = Path("data")
    teacher: str = DEFAULT_TEACHER
    precision: Precision = "auto"
    proposals: str = "fit"
    keep: int = 300
    """Proposals kept of an image."""
    storage: Storage = "fp16"
    crops: CropRule = field(default_factory=CropRule)
    prompts: str = DEFAULT_PROMPTS
    """Sets by name, joined by commas; `file` where `templates` were read from one."""
    templates: tuple[str, ...] = ()
    """Of a file: kept here, so that a repair does not need it. Empty: those of the sets."""
    executor: Executor = field(default_factory=Executor)
    device: str = "auto"
    crop_batch: int | None = None
    """Crops at once; None: `usual_batch`. Part of the fingerprint."""
    image_batch: int = 8
    """Images at once through a proposal network. Part of the fingerprint."""
    decoder: DecoderChoice = "auto"
    """`torchvision`: JPEGs by nvJPEG on a GPU; `auto`: where there is one, else `pillow`. What was
    chosen is part of the fingerprint."""
    encoder: EncoderChoice = "auto"
    """Whose code computes the teacher's image tower. Part of the fingerprint."""
    max_bad: float = 0.001
    """Share of unreadable images that is set aside; one image is, however small the split."""
    experiment: str | None = None
    """Whose network `fit` trains; None: the split's."""
    overrides: tuple[str, ...] = ()
    fit_epochs: int | None = None
    """None: a sixth of the experiment's epochs (12 of LVIS's 70), at least 2."""
    only_proposals: bool = False
    """Stop when the network of `fit` is trained."""
    neighbors: bool = True
    command: str = ""
    """As typed; kept in the provenance."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UsageError(f"--keep {self.keep}: keep at least one proposal an image")
        if not 0 <= self.max_bad <= 1:
            raise UsageError(f"--max-bad {self.max_bad}: a share between 0 and 1")
        if self.fit_epochs is not None and self.fit_epochs < 1:
            raise UsageError(
                f"--fit-epochs {self.fit_epochs}: train at least one; without the option it is a "
                "sixth of the experiment's, and --proposals file: or student: train nothing"
            )
        if self.only_proposals and self.proposals != "fit":
            raise UsageError(f"--only-proposals: --proposals {self.proposals} trains none")

    def prompt_templates(self) -> tuple[str, ...]:
        """Returns the sentences that names are put into; raises UsageError for an unknown set."""
        return self.templates or templates_of_sets(self.prompts)

    def crops_at_once(self, device: torch.device) -> int:
        """Returns how many crops the teacher is given at once on this device."""
        return self.crop_batch or usual_batch(device)


def placed(request: CacheRequest) -> CacheRequest:
    """Returns the request with the paths in its words made absolute; `out` stays as typed."""
    return replace(
        request,
        split=absolute_split(request.split),
        teacher=absolute_teacher(request.teacher),
        proposals=absolute_proposals(request.proposals),
        experiment=absolute_experiment(request.experiment),
    )


def request_record(request: CacheRequest) -> dict[str, Any]:
    """Returns the request as plain data, for the provenance: what `cache repair` runs again."""
    there = replace(placed(request), data_root=request.data_root.resolve())
    return TypeAdapter(CacheRequest).dump_python(there, mode="json")


def recorded_request(record: Any, where: Path) -> CacheRequest:
    """Returns the request that `request_record` kept.

    Raises:
        UsageError: there is none, or not one of this version.
    """
    try:
        return TypeAdapter(CacheRequest).validate_python(record)
    except ValidationError as error:
        raise UsageError(
            f"the provenance of {where} does not say how it was made ({error.error_count()} "
            "settings are missing or unknown): run its own cache-teacher command again, which "
            "makes what is missing"
        ) from None


@dataclass(frozen=True)
class CacheSummary:
    """What is in the cache now."""

    path: Path
    split: str
    teacher: str
    random_teacher: bool
    num_images: int
    num_regions: int
    num_shards: int
    num_made: int
    """Shards that this command made; the others stood already."""
    quarantined: Mapping[int, str]
    merkle_root: str
    bytes_on_disk: int
    seconds: float
    recall: tuple[Recall, ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Returns the summary as a person reads it."""
        stood = self.num_shards - self.num_made
        resumed = f" ({stood} shards stood already)" if stood else ""
        mark = "  RANDOM WEIGHTS: for trials only" if self.random_teacher else ""
        text = [
            f"cache      {self.path}: {self.num_images:,} images, {self.num_regions:,} regions, "
            f"{gigabytes(self.bytes_on_disk)}, {self.seconds:.0f} s{resumed}",
            f"teacher    {self.teacher}{mark}",
        ]
        text += [f"recall     {recall.line()}" for recall in self.recall if recall.shares]
        text += [f"set aside  image {number}: {why}" for number, why in self.quarantined.items()]
        return text + [f"note       {note}" for note in self.notes]

    def as_json(self) -> dict[str, Any]:
        """Returns the summary as plain data."""
        return {
            **{key: value for key, value in vars(self).items() if key != "recall"},
            "path": str(self.path),
            "quarantined": {str(number): why for number, why in self.quarantined.items()},
            "recall": {recall.group: recall.as_json() for recall in self.recall},
        }


@dataclass(frozen=True)
class ProposalsReady:
    """A trained proposal network, where no more was asked for; or the end of a helping rank."""

    network: Path
    is_first: bool

    def lines(self) -> list[str]:
        """Returns where the network is; nothing on a helping rank."""
        return [f"proposals  {self.network}: trained"] if self.is_first else []

    def as_json(self) -> dict[str, Any]:
        """Returns the same as plain data."""
        return {"network": str(self.network)} if self.is_first else {}


def prompts_of(word: str) -> tuple[str, tuple[str, ...]]:
    """Returns a request's `prompts` and `templates`, of sets' names or of a file of templates.

    Raises:
        UsageError: an unknown set and no such file, or a line without `{}`.
    """
    templates = read_templates(word)
    if Path(word).is_file():
        return "file", templates
    return ",".join(name.strip() for name in word.split(",")), ()


_TRAIN_ALONE = (
    "optim.precision",
    "optim.ema_decay",
    "optim.warmup_iterations",
    "optim.warmup_ratio",
    "optim.lr_drop_factor",
    "compute.compile",
    "compute.cuda_graphs",
    "compute.rank_timeout_s",
)
"""How a training goes, where `fit` has one way of its own."""


def fit_overrides(given: Sequence[str]) -> tuple[str, ...]:
    """Returns the settings that `--set` gives to `fit`'s network.

    What a student is behind its first stage and how it distils may be among them: one list serves
    both stages. Not so what would be taken for the network's own: `student.weights`, which an
    experiment file may hold for the training that comes after, and how that training goes.

    Raises:
        ConfigError: one is no KEY=VALUE.
        UsageError: one names the student's weights, or is read by `train` alone.
    """
    for override in given:
        typed = flatten(parse_override(override))
        if typed.get("student.weights", "none") != "none":
            raise UsageError(
                f"--set {override}: `fit` starts from the backbone's weights alone; leave it to "
                "train, or let that student propose: --proposals student:FILE"
            )
        if unread := [key for key in typed if key in _TRAIN_ALONE]:
            raise UsageError(
                f"--set {override}: `fit` does not read {', '.join(unread)}: leave it to train "
                "(memory: compute.micro_batches, compute.activation_checkpointing)"
            )
    return tuple(given)


def default_out(split: str) -> Path:
    """Returns the folder of a split's cache where none is named.

    Raises:
        UsageError: a split of a user's own has no short name.
    """
    if ":" in split:
        raise UsageError(f"name the cache of '{split}': --out cache/NAME")
    return Path("cache") / split.removesuffix("_train")


def gigabytes(count: int) -> str:
    """Returns a number of bytes as people read it."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
