"""What a cache will cost, and whether there is room for it: before anything is made."""

import shutil
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cache.arrays import DATA_FOLDER
from cache.neighbor_lists import NEIGHBORS_MANIFEST
from cache.neighbors import NeighborSettings
from cache.plan import Plan, make_plan
from cache.spec import DiskFullError
from dkdetr.data.splits import Split
from dkdetr.engine.distributed import num_ranks
from dkdetr.progress import format_duration
from pipeline.fit import FitPlan, fit_plan
from pipeline.proposal_sources import ProposalSpec
from pipeline.request import CacheRequest, gigabytes


@dataclass(frozen=True)
class StagePrice:
    """One stage: how much work, and how long it takes; None where that was not measured."""

    stage: str
    amount: str
    seconds: float | None

    def line(self) -> str:
        """Returns the stage as a person reads it."""
        time = "" if self.seconds is None else f": about {format_duration(self.seconds)}"
        return f"{self.stage:<10} {self.amount}{time}"


@dataclass(frozen=True)
class CachePrice:
    """What a cache will cost, before anything is made."""

    split: str
    num_images: int
    num_base_names: int
    num_novel_names: int
    num_base_boxes: int
    max_crops: int
    num_shards: int
    embed_dim: int
    num_texts: int
    bytes_needed: int
    bytes_free: int
    fit_iterations: int
    """0 where no proposal network has to be trained."""
    fit_batch_size: int = 0
    fit_ranks: int = 1
    """Processes of torchrun that share its batches."""
    fit_parts: int = 1
    """Micro-batches in which a rank takes its share."""
    bytes_neighbors: int = 0
    """Beside `bytes_needed`: the neighbour lists and, while they are built, what is searched."""
    only_proposals: bool = False
    """The network of `fit` alone: the cache's counts are 0."""
    stages: tuple[StagePrice, ...] = ()
    """With their times, once they were measured (pipeline.calibrate)."""
    calibration: str = "not measured"
    """On what the times were measured, or why they were not."""

    def lines(self) -> list[str]:
        """Returns the price as a person reads it."""
        more = gigabytes(self.bytes_neighbors)
        lists = f", {more} more while neighbour lists are built" if self.bytes_neighbors else ""
        return [
            f"split      {self.split}: {self.num_images:,} images, {self.num_base_names} base and "
            f"{self.num_novel_names} novel names, {self.num_base_boxes:,} base boxes",
            *(stage.line() for stage in self.stages or self.work()),
            f"disk       {gigabytes(self.bytes_needed)} needed{lists}, "
            f"{gigabytes(self.bytes_free)} free",
            f"times      {self.calibration}",
        ]

    def work(self) -> tuple[StagePrice, ...]:
        """Returns the stages without their times."""
        where = f"on {self.fit_ranks} ranks" if self.fit_ranks > 1 else "in one process"
        parts = f", {self.fit_parts} micro-batches each" if self.fit_parts > 1 else ""
        fit = (
            f"{self.fit_iterations:,} training steps of {self.fit_batch_size} images first, "
            f"{where}{parts}"
        )
        trained = StagePrice("fit", fit if self.fit_iterations else "nothing to train", None)
        if self.only_proposals:
            return (trained,)
        return (
            trained,
            StagePrice(
                "shards", f"at most {self.max_crops:,} crops in {self.num_shards} shards", None
            ),
            StagePrice("text", f"{self.num_texts:,} prompts", None),
        )

    def as_json(self) -> dict[str, Any]:
        """Returns the price as plain data."""
        stages = [vars(stage) for stage in self.stages or self.work()]
        return {**vars(self), "stages": stages}


def plan_cache(split: Split, request: CacheRequest, embed_dim: int, *, crop_batch: int) -> Plan:
    """Returns the cache's rows and shards; a price needs no true `crop_batch`."""
    counts = np.diff(split.base_table.offsets)
    return make_plan(
        [image.image_id for image in split.images],
        max_regions=request.keep,
        embed_dim=embed_dim,
        max_gt=int(counts.max(initial=0)),
        storage=request.storage,
        batch_layout={"crop_batch": crop_batch, "image_batch": request.image_batch},
        flipped=request.crops.views == "orig,flip",
    )


def price_of_proposals(price: CachePrice, network_bytes: int) -> CachePrice:
    """Returns what of a cache's price is that of its network of `fit` alone.

    On the disk: the weights and Adam's two moments, twice while one state follows another.
    """
    needed = 2 * 3 * network_bytes if price.fit_iterations else 0
    return replace(
        price,
        max_crops=0,
        num_shards=0,
        num_texts=0,
        bytes_needed=needed,
        bytes_neighbors=0,
        only_proposals=True,
    )


def price_of(request: CacheRequest, split: Split, spec: ProposalSpec, embed_dim: int) -> CachePrice:
    """Returns the price of a cache whose teacher's vectors have `embed_dim` numbers."""
    plan = plan_cache(split, request, embed_dim, crop_batch=0)
    num_base_boxes = len(split.base_table.category_ids)
    bytes_a_vector = plan.embed_dim * (1 if request.storage == "int8" else 2) + 4
    a_region = bytes_a_vector * (2 if plan.flipped else 1) + 4 * 4 + 4 + 4
    an_image = plan.max_regions * a_region + plan.embed_dim * 2 + 64
    a_truth = plan.embed_dim * 2 + 4 * 4 + 8  # without padding: as many as there are
    parent = next(folder for folder in (request.out, *request.out.parents) if folder.exists())
    trains = spec.trains_in(request.out)
    fitted: FitPlan | None = fit_plan(request, split) if trains else None
    templates = request.prompt_templates()
    return CachePrice(
        split=split.name,
        num_images=plan.num_images,
        num_base_names=sum(category.is_base for category in split.categories),
        num_novel_names=sum(not category.is_base for category in split.categories),
        num_base_boxes=num_base_boxes,
        max_crops=max_crops(request, plan.num_images, num_base_boxes),
        num_shards=plan.num_shards,
        embed_dim=plan.embed_dim,
        num_texts=len(split.categories) * len(templates),
        bytes_needed=plan.num_images * an_image + num_base_boxes * a_truth,
        bytes_free=shutil.disk_usage(parent).free,
        fit_iterations=fitted.num_iterations if fitted else 0,
        fit_batch_size=fitted.config.data.batch_size if fitted else 0,
        fit_ranks=num_ranks() if fitted else 1,
        fit_parts=fitted.config.compute.micro_batches if fitted else 1,
        bytes_neighbors=_neighbor_bytes(request, plan),
    )


def _neighbor_bytes(request: CacheRequest, plan: Plan) -> int:
    """Returns the most that neighbour lists take; 0 where they are not wanted or already there."""
    if not request.neighbors or (request.out / NEIGHBORS_MANIFEST).is_file():
        return 0
    settings = NeighborSettings()
    a_region = 2 * plan.embed_dim + settings.k * (4 + 2) + 4 + 4
    an_image = min(settings.per_image, plan.max_regions) * a_region
    return plan.num_images * (an_image + settings.related_images * (4 + 4))


def max_crops(request: CacheRequest, num_images: int, num_base_boxes: int) -> int:
    """Returns the most crops that may have to be encoded."""
    rule = request.crops
    of_proposals = num_images * request.keep * len(rule.scales)
    others = num_images + num_base_boxes * len(rule.scales)
    if rule.views == "orig,flip":
        return 2 * of_proposals + others
    return rule.views_per_box * (of_proposals + others)


def require_room(request: CacheRequest, price: CachePrice) -> None:
    """Returns if the cache fits on its disk, what is there already counted in.

    Raises:
        DiskFullError: says what to do.
    """
    present = sum(
        file.stat().st_size for file in (request.out / DATA_FOLDER).rglob("*") if file.is_file()
    )
    if price.bytes_needed - present > price.bytes_free:
        raise DiskFullError(
            f"{request.out} needs {price.bytes_needed / 1e9:.1f} GB and only "
            f"{price.bytes_free / 1e9:.1f} GB are free: make room, name another disk with "
            "--out, keep fewer proposals (--keep 100 is a third of the size) or store int8"
        )
