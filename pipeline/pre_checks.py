"""What a command is refused for: looked at before anything is trained or written, and priced."""

from typing import Any

from cache.beginning import refuse_foreign_folder, stale_cache
from cache.layout import CACHE_FILE, Head
from cache.spec import diff_parts
from dkdetr.data.splits import Split
from dkdetr.engine.distributed import num_ranks
from dkdetr.errors import DataError, UsageError
from dkdetr.experiment_file import flatten, parse_override
from pipeline.decoding import choose_decoder, decoder_name
from pipeline.file_proposals import FileProposals
from pipeline.fingerprint import settled_parts
from pipeline.fit import fit_plan
from pipeline.fit_training import refuse_impossible
from pipeline.leaks import LeakCheck, check_leaks
from pipeline.price import plan_cache
from pipeline.proposal_sources import ProposalSpec, parse_proposals
from pipeline.proposals import ProposalRule, ProposalSource
from pipeline.request import CacheRequest
from pipeline.source_images import ImageCheck
from pipeline.teacher import teacher_embed_dim
from pipeline.teacher_model import Teacher


def check_words(request: CacheRequest) -> ProposalSpec:
    """Returns the proposals asked for; raises for words that mean nothing, before any reading.

    Raises:
        UsageError, DataError: a word, or what it names, is not there.
        CacheError: `--out` is a folder of something else.
    """
    spec = parse_proposals(request.proposals)
    if not spec.trains:
        _refuse_words_of_fit(request, spec)
    teacher_embed_dim(request.teacher)
    request.prompt_templates()
    spec.require()
    refuse_foreign_folder(request.out)
    return spec


def _refuse_words_of_fit(request: CacheRequest, spec: ProposalSpec) -> None:
    of_networks: set[str] = set() if spec.kind == "file" else {"ops.backend"}
    words = {
        "--experiment": request.experiment,
        "--set": [
            each for each in request.overrides if flatten(parse_override(each)).keys() - of_networks
        ],
        "--fit-epochs": request.fit_epochs,
    }
    if given := [word for word, value in words.items() if value]:
        raise UsageError(
            f"--proposals {request.proposals} trains no network, and {', '.join(given)} would be "
            "of it: leave it out"
        )


def check_trainable(
    request: CacheRequest, split: Split, spec: ProposalSpec, *, lost: bool = False
) -> None:
    """Raises UsageError if `fit` is to train and cannot on this split, or on so many ranks.

    `lost` is True where the network that is there will not be reused.
    """
    if not spec.trains:
        return
    if not split.is_train:
        raise UsageError(
            f"--proposals fit learns from base boxes, and {split.name} is no training split: "
            "make its train split's cache first, then use --proposals fit:CACHE"
        )
    plan = fit_plan(request, split)
    # A network that is there may be reused; `fit_proposals` knows, and asks again if it is not.
    if lost or spec.trains_in(request.out):
        refuse_impossible(plan.config, world_size=num_ranks())


def check_settings(
    request: CacheRequest,
    split: Split,
    spec: ProposalSpec,
    teacher: Teacher,
    *,
    repairing: bool = False,
) -> None:
    """Raises StaleCacheError if the cache in `--out` has other settings.

    What costs time to know, the pictures' content and a proposal network, is left to
    `create_or_resume`: hours of `fit` do not come before a refusal that needed none of them, nor
    before one for pictures that cannot be read, which `fit` counts itself.
    """
    # A folder for the network alone, or one without its head: no cache to contradict.
    if request.only_proposals or not (request.out / CACHE_FILE).is_file():
        return
    plan = plan_cache(
        split, request, teacher.embed_dim, crop_batch=request.crops_at_once(teacher.device)
    )
    decoder = choose_decoder(request.decoder, teacher.device)
    known: dict[str, Any] = {
        **settled_parts(request, split, teacher, plan, teacher.resolve(request.crops)),
        "images": {"decoder": decoder_name(decoder, teacher.device)},
        "proposals": {"source": spec.kind, **ProposalRule(keep=request.keep).parts()},
    }
    parts = Head.load(request.out).parts
    cached = {name: parts[name] for name in known}
    for name in ("images", "proposals"):
        cached[name] = {key: value for key, value in cached[name].items() if key in known[name]}
    if lines := diff_parts(cached, known):
        raise stale_cache(request.out, lines, repairing=repairing)


def check_pictures(request: CacheRequest, images: ImageCheck) -> None:
    """Raises StaleCacheError if the cache that is repaired was made from other pictures.

    For where a network of `fit` is trained before `create_or_resume` can compare all parts.
    """
    if not (request.out / CACHE_FILE).is_file():
        return
    cached = Head.load(request.out).parts["images"]
    known = images.parts()
    if lines := diff_parts({"images": {name: cached[name] for name in known}}, {"images": known}):
        raise stale_cache(request.out, lines, repairing=True)


def check_source(source: ProposalSource, split: Split, request: CacheRequest) -> LeakCheck:
    """Returns what the source has seen.

    Raises:
        DataError: it leaks novel boxes, or is a file of another split.
    """
    if isinstance(source, FileProposals):
        _check_coverage(source, split, request)
    return check_leaks(source.seen, split)


def _check_coverage(source: FileProposals, split: Split, request: CacheRequest) -> None:
    known = source.image_ids
    lacking = [image.image_id for image in split.images if image.image_id not in known]
    # A detector may find nothing in a picture or two; half of them means another data set.
    if 2 * len(lacking) > len(split.images):
        raise DataError(
            f"{request.proposals} has boxes for {len(split.images) - len(lacking):,} of the "
            f"{len(split.images):,} images of {split.name}: it belongs to another split; first "
            f"images without: {', '.join(map(str, lacking[:20]))}"
        )
