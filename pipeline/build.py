"""Builds a teacher's cache: the one function behind `dkdetr cache-teacher`.

Order: look at every input, settle the proposals, load the teacher, and only then plan and
fingerprint; make the missing shards; write the text; seal; build the neighbour lists.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from math import ceil
from pathlib import Path

import torch

from cache.layout import load_provenance
from cache.lock import Lease
from cache.manifest import ShardManifest
from cache.plan import Plan
from cache.store import open_cache
from cache.writer import CacheWriter, create_or_resume
from dkdetr.data.prompts import prompt_set
from dkdetr.data.splits import Split, load_split
from dkdetr.data.vocabulary import build_vocabulary
from dkdetr.engine.allocator import keep_freed_memory
from dkdetr.engine.distributed import pick_device
from dkdetr.engine.interruption import stop_on_sigterm
from dkdetr.errors import DataError, PreemptedError, UsageError
from dkdetr.progress import progress
from pipeline.canary import canary_embeddings, check_canary, pack_canary
from pipeline.crops import CropRule
from pipeline.executor import run_shards
from pipeline.fingerprint import cache_parts, cache_provenance
from pipeline.fit import fit_proposals
from pipeline.neighbor_stage import add_neighbors
from pipeline.price import plan_cache, price_of, require_room
from pipeline.proposal_sources import (
    ProposalSpec,
    open_source,
    parse_proposals,
    prepare_source,
)
from pipeline.proposals import FileProposals, ProposalRule, ProposalSource
from pipeline.recall import cache_recall
from pipeline.request import CacheRequest, CacheSummary
from pipeline.shard_worker import ShardJob, make_shard
from pipeline.source_images import ImageCheck, check_images
from pipeline.teacher import load_teacher, teacher_embed_dim
from pipeline.teacher_model import Teacher

_RECALL_IMAGES = 2000

Say = Callable[[str], None]


def cache_teacher(request: CacheRequest, say: Say = lambda _: None) -> CacheSummary:
    """Returns the summary of a sealed cache: made now, resumed, or found finished.

    Args:
        request: what to make.
        say: told in a line what is going on.

    Raises:
        DkdetrError, CacheError: each with its exit code; what was committed stays, and the same
            command goes on from there.
    """
    started = time.monotonic()
    keep_freed_memory()
    split = load_split(request.split, request.data_root)
    for note in split.notes:
        say(f"{split.name}: {note}")
    spec = parse_proposals(request.proposals)
    embed_dim = teacher_embed_dim(request.teacher)
    require_room(request, price_of(request, split, spec, embed_dim))
    device = pick_device(request.device)
    teacher = load_teacher(request.teacher, device, precision=request.precision)
    _introduce(teacher, say)
    images = check_images(split, decode=False)
    prepared = _settle_proposals(request, split, spec, images, device, say)
    source = open_source(prepared, device, batch_size=request.image_batch)
    _check_coverage(source, split, request)

    crop_batch = request.crop_batch or (256 if device.type == "cuda" else 64)
    plan = plan_cache(split, request, teacher.embed_dim, crop_batch=crop_batch)
    parts = cache_parts(request, split, images, source, teacher, plan)
    provenance = cache_provenance(request, teacher, source, pack_canary(canary_embeddings(teacher)))
    with create_or_resume(request.out, parts=parts, plan=plan, provenance=provenance) as writer:
        canary = str(load_provenance(request.out)["canary"])
        check_canary(canary, teacher, where=f"the cache {request.out}")
        job = _job(request, teacher, canary, prepared, crop_batch)
        made = _make_shards(request, writer, job, say)
        quarantined = _quarantined(request.out, range(plan.num_shards))
        if not writer.text_is_current():
            say(f"embedding {len(split.categories)} names")
            prompts = prompt_set(request.prompts).templates
            vocabulary = build_vocabulary(split.categories, prompts, teacher)
            writer.write_text(vocabulary.metadata(), vocabulary.embeddings)
        if not writer.sealed:
            writer.seal()
    notes = add_neighbors(request.out) if request.neighbors else ()
    return _summary(request, split, plan, made, quarantined, notes, time.monotonic() - started)


def _introduce(teacher: Teacher, say: Say) -> None:
    say(f"teacher {teacher.identity} on {teacher.device}, {teacher.precision}")
    if teacher.random:
        say("RANDOM WEIGHTS: the cache is for trials only and is marked as such")
    if teacher.note:
        say(teacher.note)


def _settle_proposals(
    request: CacheRequest,
    split: Split,
    spec: ProposalSpec,
    images: ImageCheck,
    device: torch.device,
    say: Say,
) -> str:
    """Returns the prepared source; trains the network first where `fit` has none yet."""
    if spec.kind != "fit" or spec.path:
        return prepare_source(spec, request.out)
    if not split.is_train:
        raise UsageError(
            f"--proposals fit learns from base boxes, and {split.name} is no training split: "
            "make its train split's cache first, then use --proposals fit:CACHE"
        )
    request.out.mkdir(parents=True, exist_ok=True)
    with Lease(request.out):
        fit_proposals(request, split, images, device, say)
    return prepare_source(ProposalSpec("fit", str(request.out)), request.out)


def _check_coverage(source: ProposalSource, split: Split, request: CacheRequest) -> None:
    if not isinstance(source, FileProposals):
        return
    known = source.image_ids
    lacking = [image.image_id for image in split.images if image.image_id not in known]
    # A detector may find nothing in a picture or two; half of them means another data set.
    if 2 * len(lacking) > len(split.images):
        raise DataError(
            f"{request.proposals} has boxes for {len(split.images) - len(lacking):,} of the "
            f"{len(split.images):,} images of {split.name}: it belongs to another split; first "
            f"images without: {', '.join(map(str, lacking[:20]))}"
        )


def _rule(request: CacheRequest) -> ProposalRule:
    return ProposalRule(keep=request.keep)


def _job(
    request: CacheRequest, teacher: Teacher, canary: str, prepared: str, crop_batch: int
) -> ShardJob:
    return ShardJob(
        cache_path=request.out.resolve(),
        split=request.split,
        data_root=request.data_root.resolve(),
        teacher=request.teacher,
        teacher_identity=teacher.identity,
        precision=teacher.precision,
        device=request.device,
        canary=canary,
        proposals=prepared,
        proposal_rule=_rule(request),
        crop_rule=CropRule(mode=request.crop_mode),
        crop_batch=crop_batch,
        image_batch=request.image_batch,
        threads=0 if request.executor.in_process else 1,
    )


def _make_shards(request: CacheRequest, writer: CacheWriter, job: ShardJob, say: Say) -> int:
    """Returns how many shards were made now; stops when too many images are bad."""
    missing = writer.missing_shards()
    standing = writer.plan.num_shards - len(missing)
    if standing:
        again = f", {len(missing)} to make" if missing else ""
        say(f"resuming: {standing}/{writer.plan.num_shards} shards verified{again}")
    if not missing:
        return 0
    num_images = writer.plan.num_images
    done = num_images - sum(len(writer.plan.shard_rows(shard)) for shard in missing)
    bad = _quarantined(writer.path, sorted({*range(writer.plan.num_shards)} - {*missing}))
    limit = _max_bad(request, num_images)
    with (
        stop_on_sigterm() as stop,
        progress("embedding", num_images, done=done) as advance,
    ):
        for _, report in run_shards(request.executor, make_shard, job, missing):
            done += report.num_images
            bad.update(report.quarantined)
            advance(done, f"{len(bad)} images set aside" if bad else "")
            if len(bad) > limit:
                raise DataError(
                    f"{len(bad)} of {num_images:,} images cannot be read, more than --max-bad "
                    f"{request.max_bad:g} allows ({limit}): " + "; ".join(list(bad.values())[:20])
                )
            if stop.is_set:
                raise PreemptedError(
                    f"stopped by SIGTERM after {done:,} of {num_images:,} images; "
                    "the same command goes on from there"
                )
    return len(missing)


def _max_bad(request: CacheRequest, num_images: int) -> int:
    return max(1, ceil(request.max_bad * num_images)) if request.max_bad else 0


def _quarantined(path: Path, shards: Iterable[int]) -> dict[int, str]:
    """Returns the images that these committed shards have set aside, and why."""
    manifests = (ShardManifest.load(path, shard) for shard in shards)
    return {int(key): why for each in manifests for key, why in each.quarantined.items()}


def _summary(
    request: CacheRequest,
    split: Split,
    plan: Plan,
    made: int,
    quarantined: Mapping[int, str],
    notes: tuple[str, ...],
    seconds: float,
) -> CacheSummary:
    reader = open_cache(request.out)
    return CacheSummary(
        path=request.out,
        split=split.name,
        teacher=reader.info.teacher,
        random_teacher=reader.info.random_teacher,
        num_images=plan.num_images,
        num_regions=reader.info.num_regions,
        num_shards=plan.num_shards,
        num_made=made,
        quarantined=quarantined,
        merkle_root=reader.info.merkle_root,
        bytes_on_disk=reader.info.bytes_on_disk,
        seconds=seconds,
        recall=cache_recall(reader, split, max_images=_RECALL_IMAGES),
        notes=notes,
    )
