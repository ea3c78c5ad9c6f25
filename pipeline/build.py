"""Builds a teacher's cache: the one function behind `dkdetr cache-teacher`.

Order: look at what is named and at every input, load the teacher, settle the proposals, and only
then plan and fingerprint; make the missing shards; write the text; seal; build the neighbour lists.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from cache.damage import Damage, uncommit
from cache.layout import CACHE_FILE, changed_rows, load_provenance
from cache.lock import Lease
from cache.manifest import ShardManifest
from cache.plan import Plan
from cache.store import open_cache
from cache.writer import CacheWriter, create_or_resume
from dkdetr.data.splits import Split, load_split
from dkdetr.data.vocabulary import build_vocabulary
from dkdetr.engine.allocator import keep_freed_memory
from dkdetr.engine.distributed import is_first_rank, pick_device
from dkdetr.engine.interruption import end_on_sigterm
from dkdetr.progress import progress
from dkdetr.student.attention_backend import Backend
from pipeline.canary import canary_embeddings, check_canary, pack_canary
from pipeline.crops import CropRule
from pipeline.decoding import DecoderChoice, choose_decoder, decoder_name
from pipeline.executor import run_shards
from pipeline.fingerprint import cache_parts, cache_provenance
from pipeline.fit import fit_proposals, proposing_backend
from pipeline.leaks import remarks
from pipeline.neighbor_stage import add_neighbors
from pipeline.pre_checks import (
    check_pictures,
    check_settings,
    check_source,
    check_trainable,
    check_words,
)
from pipeline.price import plan_cache, price_of, require_room
from pipeline.proposal_sources import (
    NETWORK_FILE,
    REMADE_FILE,
    ProposalSpec,
    open_source,
    prepare_source,
)
from pipeline.proposals import ProposalRule
from pipeline.recall import cache_recall
from pipeline.request import CacheRequest, CacheSummary, ProposalsReady, placed
from pipeline.resampling import resampling_on
from pipeline.shard_worker import (
    ShardJob,
    ShardReport,
    ShardTimes,
    ShardTools,
    begin_shard,
    busy_note,
    make_shard,
)
from pipeline.source_images import ImageCheck, check_images, require_few
from pipeline.teacher import load_teacher, teacher_embed_dim
from pipeline.teacher_model import Teacher

_RECALL_IMAGES = 2000
_MADE_ANEW = "make the cache anew (another --out): this one belongs to the files as they are"
_STOPPED = "stopped by SIGTERM; what was finished stands, and the same command goes on from there"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Repair:
    """What of a cache is to be made again.

    It is taken out once all that it takes is there, and known to make the same cache.
    """

    damage: Damage
    network_lost: bool
    """The network of `fit` cannot be used: another is trained, and takes its place by then."""


def run_stage_one(
    request: CacheRequest, say: Say = lambda _: None, repair: Repair | None = None
) -> CacheSummary | ProposalsReady:
    """Returns what the request was for: a sealed cache, or a proposal network alone.

    Under torchrun all ranks train the network of `fit`; then the first one goes on by itself, and
    the others return.

    Args:
        request: what is wanted.
        say: told in a line what is going on.
        repair: of the cache that is there.

    Raises:
        DkdetrError, CacheError: each with its exit code; what was committed stays, and the same
            command goes on from there.
    """
    request = placed(request)
    if is_first_rank():
        # Everything is made whole beside its place and then moved there. `fit` asks a flag
        # instead: its ranks must stop at the same step, and save it.
        with end_on_sigterm(_STOPPED):
            return _first_rank(request, say, repair)
    spec = check_words(request)
    split = load_split(request.split, request.data_root)
    network = fit_proposals(request, split, None, say) if spec.trains else request.out
    return ProposalsReady(network, is_first=False)


def cache_teacher(
    request: CacheRequest, say: Say = lambda _: None, repair: Repair | None = None
) -> CacheSummary:
    """Returns the summary of a sealed cache; see `run_stage_one`."""
    made = run_stage_one(request, say, repair)
    assert isinstance(made, CacheSummary)
    return made


def _first_rank(
    request: CacheRequest, say: Say, repair: Repair | None
) -> CacheSummary | ProposalsReady:
    started = time.monotonic()
    keep_freed_memory()
    spec = check_words(request)
    split = load_split(request.split, request.data_root)
    for note in split.notes:
        say(f"{split.name}: {note}")
    # A GPU's kernel that was asked for is no demand on the machine that repairs.
    if repair is not None and proposing_backend(request, split) == "triton":
        request = replace(request, overrides=(*request.overrides, "ops.backend=auto"))
    check_trainable(request, split, spec)
    embed_dim = teacher_embed_dim(request.teacher)
    if not request.only_proposals:
        require_room(request, price_of(request, split, spec, embed_dim))
    device = pick_device(request.device)
    teacher = load_teacher(
        request.teacher, device, precision=request.precision, encoder=request.encoder
    )
    _introduce(teacher, request.decoder, say)
    has_head = repair is None or CACHE_FILE not in repair.damage.files
    if has_head:
        check_settings(request, split, spec, teacher, repairing=repair is not None)
    images = check_images(split, decode=False)
    if repair is not None and has_head:
        check_pictures(request, images)
    if spec.trains:
        anew = repair is not None and repair.network_lost
        network = fit_proposals(request, split, images, say, anew=anew)
        if request.only_proposals:
            return ProposalsReady(network, is_first=True)
        spec = ProposalSpec("fit", str(network))
    prepared = prepare_source(spec, request.out, split)
    return _fill(request, split, images, teacher, prepared, started, say, repair)


def _fill(
    request: CacheRequest,
    split: Split,
    images: ImageCheck,
    teacher: Teacher,
    prepared: str,
    started: float,
    say: Say,
    repair: Repair | None,
) -> CacheSummary:
    """Returns the sealed cache's summary, once the proposals are settled."""
    backend = proposing_backend(request, split)
    source = open_source(prepared, teacher.device, batch_size=request.image_batch, backend=backend)
    leaks = check_source(source, split, request)
    notes = list(remarks(leaks, split))
    for note in notes:
        say(note)
    rule = teacher.resolve(request.crops)
    crop_batch = request.crops_at_once(teacher.device)
    plan = plan_cache(split, request, teacher.embed_dim, crop_batch=crop_batch)
    parts = cache_parts(request, split, images, source, teacher, plan, rule)
    own_canary = pack_canary(canary_embeddings(teacher))
    provenance = cache_provenance(request, split, teacher, leaks, own_canary)
    if repair is not None:
        uncommit(repair.damage, parts)
        if repair.network_lost:
            prepared = _adopt_remade(request.out, split)
    with create_or_resume(request.out, parts=parts, plan=plan, provenance=provenance) as writer:
        canary = str(load_provenance(request.out)["canary"])
        check_canary(canary, teacher, where=f"the cache {request.out}")
        job = _job(
            request, writer.fingerprint, teacher, canary, prepared, backend, crop_batch, rule
        )
        tools = ShardTools(plan, split, teacher, source)
        made = _make_shards(request, writer, job, tools, say)
        quarantined = _quarantined(request.out, range(plan.num_shards))
        if not writer.text_is_current():
            say(f"embedding {len(split.categories)} names")
            vocabulary = build_vocabulary(split.categories, request.prompt_templates(), teacher)
            writer.write_text(vocabulary.metadata(), vocabulary.embeddings)
        # Always: under the seal of a finished cache a lost shard may have been made again.
        for note in changed_rows(request.out, writer.old_roots, writer.seal()):
            say(note)
            notes.append(note)
    if request.neighbors:
        notes += add_neighbors(request.out)
    return _summary(request, split, plan, made, quarantined, notes, time.monotonic() - started)


def _adopt_remade(cache: Path, split: Split) -> str:
    """Returns the prepared source of the network trained anew, now in the lost one's place.

    Its weights are in the fingerprint, by which the cache was found to be made with them.
    """
    with Lease(cache):
        (cache / REMADE_FILE).replace(cache / NETWORK_FILE)
    return prepare_source(ProposalSpec("fit", str(cache)), cache, split)


def _introduce(teacher: Teacher, choice: DecoderChoice, say: Say) -> None:
    say(f"teacher {teacher.identity} on {teacher.device}, {teacher.precision}, {teacher.encoder}")
    decoder = decoder_name(choose_decoder(choice, teacher.device), teacher.device)
    say(f"pictures decoded by {decoder}; crops cut by {resampling_on(teacher.device)}")
    if teacher.random:
        say("RANDOM WEIGHTS: the cache is for trials only and is marked as such")
    if teacher.note:
        say(teacher.note)


def _job(
    request: CacheRequest,
    fingerprint: str,
    teacher: Teacher,
    canary: str,
    prepared: str,
    backend: Backend,
    crop_batch: int,
    rule: CropRule,
) -> ShardJob:
    return ShardJob(
        cache_path=request.out.resolve(),
        fingerprint=fingerprint,
        split=request.split,
        data_root=request.data_root.resolve(),
        teacher=request.teacher,
        teacher_identity=teacher.identity,
        precision=teacher.precision,
        encoder=teacher.encoder,
        decoder=choose_decoder(request.decoder, teacher.device),
        device=request.device,
        resampling=resampling_on(teacher.device),
        canary=canary,
        proposals=prepared,
        ops_backend=backend,
        proposal_rule=ProposalRule(keep=request.keep),
        crop_rule=rule,
        crop_batch=crop_batch,
        image_batch=request.image_batch,
        threads=0 if request.executor.in_process else 1,
    )


def _make_shards(
    request: CacheRequest, writer: CacheWriter, job: ShardJob, tools: ShardTools, say: Say
) -> int:
    """Returns how many shards were made now; stops when too many images are bad."""
    missing = writer.missing_shards()
    standing = writer.plan.num_shards - len(missing)
    if standing:
        again = f", {len(missing)} to make" if missing else ""
        say(f"resuming: {standing}/{writer.plan.num_shards} shards verified{again}")
    num_images = writer.plan.num_images
    bad = _quarantined(writer.path, sorted({*range(writer.plan.num_shards)} - {*missing}))
    # The shard with one too many is committed: without this the same command would seal.
    require_few(bad, num_images, request.max_bad, fetched_again=_MADE_ANEW)
    if not missing:
        return 0

    def make_here(job: ShardJob, shard: int, _worker_number: int) -> Future[ShardReport]:
        return begin_shard(job, shard, tools, writing)

    make: Callable[[ShardJob, int, int], ShardReport | Future[ShardReport]]
    make = make_here if request.executor.in_process else make_shard
    done = num_images - sum(len(writer.plan.shard_rows(shard)) for shard in missing)
    times: list[ShardTimes] = []
    # Closed at once, whatever happens: a cluster of its own must not outlive this. A shard that is
    # being written then is written whole.
    with (
        ThreadPoolExecutor(1) as writing,
        closing(run_shards(request.executor, make, job, missing, say)) as reports,
        progress("embedding", num_images, done=done) as advance,
    ):
        for _, report in reports:
            done += report.num_images
            bad.update(report.quarantined)
            times.append(report.times)
            notes = [busy_note(times)] + ([f"{len(bad)} images set aside"] if bad else [])
            advance(done, ", ".join(notes))
            require_few(bad, num_images, request.max_bad, fetched_again=_MADE_ANEW)
    say(busy_note(times))
    return len(missing)


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
    notes: Iterable[str],
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
        notes=tuple(notes),
    )
