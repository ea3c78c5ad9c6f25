"""What a cache will cost, and whether there is room for it: before anything is made."""

import shutil

import numpy as np

from cache.plan import Plan, make_plan
from cache.spec import DiskFullError
from dkdetr.data.splits import Split, load_split
from pipeline.crops import CropRule
from pipeline.fit import fit_plan
from pipeline.proposal_sources import NETWORK_FILE, ProposalSpec, parse_proposals
from pipeline.request import CachePrice, CacheRequest
from pipeline.teacher import teacher_embed_dim


def price_cache(request: CacheRequest) -> CachePrice:
    """Returns what a cache would cost; loads no weights and writes nothing.

    Raises:
        DiskFullError: there is not enough room.
        DkdetrError: unknown split, teacher or proposals; missing images.
    """
    split = load_split(request.split, request.data_root)
    split.require_images()
    spec = parse_proposals(request.proposals)
    embed_dim = teacher_embed_dim(request.teacher)
    price = price_of(request, split, spec, embed_dim)
    require_room(request, price)
    return price


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
    )


def price_of(request: CacheRequest, split: Split, spec: ProposalSpec, embed_dim: int) -> CachePrice:
    """Returns the price of a cache whose teacher's vectors have `embed_dim` numbers."""
    plan = plan_cache(split, request, embed_dim, crop_batch=0)
    num_base_boxes = len(split.base_table.category_ids)
    bytes_a_value = 1 if request.storage == "int8" else 2
    a_region = plan.embed_dim * bytes_a_value + 4 * 4 + 4 + 4 + 4
    a_truth = plan.embed_dim * 2 + 4 * 4 + 8
    an_image = plan.max_regions * a_region + plan.max_gt * a_truth + plan.embed_dim * 2 + 64
    parent = next(folder for folder in (request.out, *request.out.parents) if folder.exists())
    trains = spec.kind == "fit" and not spec.path and not (request.out / NETWORK_FILE).is_file()
    scales = len(CropRule().scales)
    return CachePrice(
        split=split.name,
        num_images=plan.num_images,
        num_base_names=sum(category.is_base for category in split.categories),
        num_novel_names=sum(not category.is_base for category in split.categories),
        num_base_boxes=num_base_boxes,
        max_crops=plan.num_images * (plan.max_regions * scales + 1) + num_base_boxes * scales,
        num_shards=plan.num_shards,
        embed_dim=plan.embed_dim,
        bytes_needed=plan.num_images * an_image,
        bytes_free=shutil.disk_usage(parent).free,
        fit_iterations=fit_plan(request, split).num_iterations if trains else 0,
    )


def require_room(request: CacheRequest, price: CachePrice) -> None:
    """Returns if the cache fits on its disk, what is there already counted in.

    Raises:
        DiskFullError: says what to do.
    """
    present = sum(
        file.stat().st_size for file in (request.out / "data.zarr").rglob("*") if file.is_file()
    )
    if price.bytes_needed - present > price.bytes_free:
        raise DiskFullError(
            f"{request.out} needs {price.bytes_needed / 1e9:.1f} GB and only "
            f"{price.bytes_free / 1e9:.1f} GB are free: make room, name another disk with "
            "--out, keep fewer proposals (--keep 100 is a third of the size) or store int8"
        )
