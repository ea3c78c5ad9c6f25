"""The command line: each command parses, builds and calls one function.

Nothing heavy is imported before a command needs it, so that `dkdetr --help` is quick.
"""

import contextlib
import errno
import functools
import inspect
import json
import os
import select
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperGroup

from dkdetr.defaults import DEFAULT_PORT, DEFAULT_PROMPTS, DEFAULT_TEACHER, DEFAULT_THRESHOLD

_FIRST = ("predict", "cache-teacher", "train", "eval", "doctor")
_EXIT_CODES = """\b
Exit codes:
  0   done
  1   a check failed, or a mistake of ours (-v shows where)
  2   usage: unknown split, setting or option, missing extra, place that is not ours
  3   data missing, malformed, or leaking novel boxes
  4   cache unsealed or made of something else; run of another experiment
  5   a file is damaged
  6   disk full; what was finished stands
  7   another process is writing this cache, run or folder
  8   the loss is not finite; the last checkpoint stands
  9   out of device memory
  75  stopped by SIGTERM; the same command goes on
  130 Ctrl-C          141 the reader of the output went away
"""
_EXAMPLES: dict[str, tuple[str, ...]] = {
    "predict": (
        'dkdetr predict photos/ --model runs/mine -c "cat, traffic cone"',
        "dkdetr predict photos/ -c @coco --class-threshold cat=0.5 --nms 0.7",
        "dkdetr predict clip.mp4 --model student.safetensors --vocab tools.vocab --every 10",
        "dkdetr predict photos/ --model new.safetensors -c cat --teacher ViT-B-32-quickgelu:openai",
    ),
    "cache-teacher": (
        "dkdetr cache-teacher --split lvis_train --dry-run",
        "dkdetr cache-teacher --split ovcoco:images:train.json --out cache/mine",
    ),
    "train": (
        "dkdetr train --cache cache/lvis",
        "dkdetr train --cache cache/lvis --eval-every 5",
        "dkdetr train --cache cache/mine --experiment trial --set optim.lr=2e-4",
        "torchrun --nproc-per-node 8 --no-python -- dkdetr train --cache cache/lvis",
    ),
    "eval": (
        "dkdetr eval",
        "dkdetr eval runs/mine --split coco_val",
        "dkdetr eval --predictions results.json --split lvis_val",
    ),
    "doctor": ("dkdetr doctor",),
    "demo": ("dkdetr demo --serve",),
    "serve": ("dkdetr serve runs/mine --cache cache/mine --pictures photos/",),
    "ablate": (
        "dkdetr ablate --cache cache/lvis --table 5 --dry-run",
        "dkdetr ablate --cache cache/lvis --table 5 --eval-every 6",
        "dkdetr ablate --cache cache/lvis --table 5 --set compute.micro_batches=16 "
        "--set compute.activation_checkpointing=true",
    ),
    "report": ("dkdetr report runs/baseline runs/mine",),
    "export": (
        "dkdetr export runs/mine --out student.safetensors",
        "dkdetr export runs/mine --format onnx --vocab tools.vocab",
        "dkdetr export runs/mine --class-threshold cat=0.5",
    ),
    "convert": ("dkdetr convert deformable_detr_two_stage.pth start.safetensors",),
    "cache info": ("dkdetr cache info cache/lvis",),
    "cache verify": ("dkdetr cache verify cache/lvis --crop-modes all",),
    "cache repair": ("dkdetr cache repair cache/lvis",),
    "cache diff": ("dkdetr cache diff cache/one cache/other",),
    "cache export": ("dkdetr cache export cache/lvis exported/lvis",),
    "cache import": (
        "dkdetr cache import hdovd features.zip --split lvis_train --out cache/hdovd "
        "--text-bank bank.npy --boxes boxes.json",
    ),
    "cache neighbors": ("dkdetr cache neighbors cache/lvis --image 139 --box 4",),
    "cache browse": ("dkdetr cache browse cache/lvis --images 17,42,",),
    "vocab build": (
        "dkdetr vocab build names.txt -o tools.vocab --class-threshold hammer=0.5",
        "dkdetr vocab build objects365-clean -o objects365.vocab --prompts vild63,clip7",
    ),
    "vocab import": (
        "dkdetr vocab import bank.npy --names lvis --teacher 'their CLIP' -o theirs.vocab",
        "dkdetr vocab import bank.pt --names names.txt --teacher 'their CLIP' -o theirs.vocab "
        "--class-threshold hammer=0.5",
    ),
    "vocab show": ("dkdetr vocab show tools.vocab", "dkdetr vocab show student.safetensors"),
    "data list": ("dkdetr data list",),
    "data check": ("dkdetr data check lvis_train", "dkdetr data check lvis_train --decode"),
    "data prepare": ("dkdetr data prepare pictograms --size tiny",),
    "config check": ("dkdetr config check mine.toml",),
    "fetch": ("dkdetr fetch --bundle b.tar", "dkdetr fetch --from-bundle b.tar"),
    "config show": ("dkdetr config show lvis_r50_70e --set optim.epochs=36",),
}


class _VerbsFirst(TyperGroup):
    """The five commands that most people want, then the others in the order they stand here."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Returns the names as `--help` lists them."""
        names = super().list_commands(ctx)
        return [*_FIRST, *(name for name in names if name not in _FIRST)]


app = typer.Typer(
    name="dkdetr",
    cls=_VerbsFirst,
    epilog=_EXIT_CODES,
    help="Open-vocabulary detection by distilling CLIP into Deformable DETR, with CLIP out of the "
    "training loop: cache-teacher, then train, then eval.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(
    name="cache", help="Look at a teacher cache and check it.", no_args_is_help=True
)
data_app = typer.Typer(
    name="data", help="Data sets: what is known, what is there.", no_args_is_help=True
)
config_app = typer.Typer(
    name="config", help="Experiments and their settings.", no_args_is_help=True
)
vocab_app = typer.Typer(
    name="vocab", help="Vocabularies: names and their embeddings.", no_args_is_help=True
)
app.add_typer(cache_app)
app.add_typer(vocab_app)
app.add_typer(data_app)
app.add_typer(config_app)

DataRoot = Annotated[
    Path, typer.Option("--data-root", envvar="DKDETR_DATA", help="Folder of coco/ lvis/ ...")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
KeptScores = Annotated[
    list[str] | None,
    typer.Option(
        "--class-threshold",
        help="NAME=SCORE: the least score of a name that predict and serve show, kept in the "
        "file (repeatable)",
    ),
]
Json = Annotated[
    str | None, typer.Option("--json", help="Write the result as JSON to a file, or - for stdout")
]
Offline = Annotated[bool, typer.Option("--offline", help="Make no network call")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a setting: a.b=c (repeatable); in cache-teacher, of `fit`'s network "
        "(ops.backend: of any that proposes)",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show a traceback with errors")]

_EXPORT_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torchscript": ".pt"}
_answered: list[str | None] = []
"""Where this command has put its result: one answer a command."""
_DEFAULT_EXPERIMENT = "lvis_r50_70e"
"""The experiment whose student `convert` makes, and whose backbone `fetch` gets."""
_MOST_UNREADABLE = 20
"""Pictures that `predict` names one by one."""
_PREDICT_STOPPED = (
    "stopped by SIGTERM before predictions.json and predictions.csv were both there; the same "
    "command predicts from the start"
)
_OUT_OF_MEMORY = "OutOfMemoryError"
# No space left, a quota that is used up, a limit on a file's size.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# A file or folder of somebody else, a disk that can only be read.
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS}
# Of several ranks, the one with an error of its own says so; the others end with it.
_REPORTED_BY_ANOTHER, _LOST_ANOTHER = "PeerFailedError", "PeerLostError"


def _command(group: typer.Typer, name: str) -> Callable[[Callable[..., None]], Any]:
    """Registers a command whose errors become one message and the documented exit code."""

    def register(function: Callable[..., None]) -> Any:
        @functools.wraps(function)
        def guarded(*args: Any, offline: bool = False, **kwargs: Any) -> None:
            _answered.clear()
            try:
                _forbid_network(offline)
                function(*args, **kwargs)
                sys.stdout.flush()
            except KeyboardInterrupt:
                _say("stopped")
                raise typer.Exit(130) from None
            except typer.Exit:
                raise
            except BrokenPipeError:
                if not _reader_is_gone():
                    raise
                raise typer.Exit(141) from None
            except Exception as error:  # noqa: BLE001  the border: every error becomes a message
                code = _exit_code(error)
                if kwargs.get("verbose"):
                    traceback.print_exc()
                kinds = {kind.__name__ for kind in type(error).__mro__}
                if _LOST_ANOTHER in kinds:
                    _say(str(error))
                elif _REPORTED_BY_ANOTHER not in kinds:
                    _say(f"error [{code}]: {_sentence(error, code)}")
                    _report_error(_sentence(error, code), code, kwargs.get("json_out"))
                raise typer.Exit(code) from None

        _add_option(guarded, "offline", Offline)
        _complete_names(function)
        full = name if group is app else f"{group.info.name} {name}"
        lines = [f"  {example}" for example in _EXAMPLES.get(full, ())]
        epilog = "\n".join(["\b", "Examples:", *lines]) if lines else None
        return group.command(name, epilog=epilog)(guarded)

    return register


def _add_option(command: Any, name: str, annotation: Any) -> None:
    """Gives a command an option that its body does not see; off by default."""
    signature = inspect.signature(command)
    option = inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation
    )
    command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
    command.__annotations__ = {**command.__annotations__, name: annotation}


def _forbid_network(offline: bool) -> None:
    from dkdetr.offline import go_offline, is_offline

    if offline or is_offline():
        go_offline()


def _report_error(sentence: str, code: int, destination: str | None) -> None:
    if _answered:  # a report of what is wrong stands there
        return
    with contextlib.suppress(OSError):  # the error itself is told already
        _report({"error": {"code": code, "message": sentence}}, destination)


def _complete_names(command: Callable[..., None]) -> None:
    """Lets the shell complete the values of --split and --experiment."""
    for option, names in (("split", _split_names), ("experiment", _experiment_names)):
        for described in getattr(command.__annotations__.get(option), "__metadata__", ()):
            described.autocompletion = names


def _split_names(incomplete: str) -> list[str]:
    from dkdetr.data.split_sources import PICTOGRAMS, SOURCES

    return [name for name in (*SOURCES, *PICTOGRAMS) if name.startswith(incomplete)]


def _experiment_names(incomplete: str) -> list[str]:
    from dkdetr.experiment_file import shipped_experiments

    return [name for name in shipped_experiments() if name.startswith(incomplete)]


def _reader_is_gone() -> bool:
    """Returns True if nobody reads stdout any more (`| head`), which then leads nowhere."""
    watch = select.poll()
    watch.register(sys.stdout, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _exit_code(error: Exception) -> int:
    """Returns the documented exit code of an error, 1 for one of our own mistakes."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return 6
    if isinstance(error, OSError) and error.errno in _NOT_OURS and error.filename:
        return 2
    if type(error).__name__ == _OUT_OF_MEMORY:
        return 9
    return getattr(error, "exit_code", 1)


def _sentence(error: Exception, code: int) -> str:
    if code == 6 and not hasattr(error, "exit_code"):  # the cache's own says it all
        return f"the disk is full: {error}; what was finished stands, the same command resumes"
    if code == 2 and isinstance(error, OSError):
        return (
            f"{error.strerror}: '{error.filename}'. Its owner or its disk's settings forbid it to "
            "this user: have that changed, or name another place; what was finished stands"
        )
    if code == 9:
        return (
            f"the device is out of memory: {str(error).splitlines()[0]} Going on with less: --set "
            "compute.micro_batches=K, a larger K (the same steps in K parts), "
            "compute.activation_checkpointing=true (both for `fit` of cache-teacher, too) or, of "
            "masks, a smaller student.masks_at_once; eval, predict: --batch-size 1 (of train "
            "--eval-every: --set eval.batch_size=1); training anew: "
            "optim.precision=auto (half precision on a GPU) or a smaller data.image_size"
        )
    if code == 1:
        return f"unexpected {type(error).__name__}: {error} (the same command with -v shows where)"
    return str(error)


def _say(message: str) -> None:
    """Prints for people, on stderr; with the rank in front where it is not the first of several."""
    rank = os.environ.get("RANK", "0")
    print(message if rank == "0" else f"rank {rank}: {message}", file=sys.stderr)


def _tell(lines: Sequence[str], json_out: str | None) -> None:
    """Prints for people; out of the way where stdout is to hold JSON alone."""
    print("\n".join(lines), file=sys.stderr if json_out == "-" else sys.stdout)


def _report(result: dict[str, Any], destination: str | None) -> None:
    _answered.append(destination)
    if destination == "-":
        print(json.dumps(result, indent=2, default=str), flush=True)
    elif destination is not None:
        from dkdetr.atomic_file import write_text

        write_text(Path(destination), json.dumps(result, indent=2, default=str) + "\n")


@_command(app, "demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes")] = Path("demo-out"),
    serve: Annotated[
        bool, typer.Option("--serve", help="Then show what it made on a local page")
    ] = False,
    device: Device = "auto",
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Run the whole pipeline on the embedded data set; ends with a table and a page."""
    from pipeline.demo import demo_page, run_demo

    run_server = _server() if serve else None
    summary = run_demo(out, device=device, say=_say)
    _report(vars(summary), json_out)
    if run_server is not None:
        run_server(demo_page(out, device))


@_command(app, "serve")
def serve_command(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="A run, checkpoint, student file or owner/name on the Hugging Face hub, whose "
            "student looks at pictures; behind it more runs, to draw the curves of all; default: "
            "the newest run"
        ),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="A cache to browse")] = None,
    vocab: Annotated[
        Path | None, typer.Option(help="A vocabulary file instead of the student's own names")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The text tower for words; default: the run's teacher")
    ] = None,
    pictures: Annotated[Path | None, typer.Option(help="A folder of pictures to try")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=0.99,
            help="Least score to begin with, of all names; default: a name's own in the "
            f"vocabulary, else {DEFAULT_THRESHOLD}",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="An address of this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = DEFAULT_PORT,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Show a local page: drop a picture, type words; a cache and a run's curves. Ctrl-C ends it."""
    run_server = _server(host, port, lambda address: _report({"address": address}, json_out))
    from pipeline.served_page import PageRequest, open_page

    request = PageRequest(
        runs=tuple(runs or ()),
        cache=cache,
        vocabulary=vocab,
        teacher=teacher,
        pictures=pictures,
        threshold=threshold,
        data_root=data_root,
        device=device,
    )
    run_server(open_page(request))


def _server(
    host: str = "127.0.0.1", port: int = DEFAULT_PORT, opened: Callable[[str], None] | None = None
) -> Callable[[Any], None]:
    """Returns what serves a page's parts, before anything long is begun without the extra."""
    from dkdetr.errors import UsageError

    try:
        from dkdetr.inference.serve import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "anyio"):
            raise
        raise UsageError("the local page wants an extra: pip install 'dkdetr[serve]'") from None
    return functools.partial(serve, host=host, port=port, say=_say, opened=opened)


@_command(app, "cache-teacher")
def cache_teacher_command(
    split: Annotated[str, typer.Option(help="lvis_train, ovcoco_train, ovcoco:DIR:JSON, ...")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Default: cache/ + the split's name without _train; a folder of your own has none"
        ),
    ] = None,
    teacher: Annotated[
        str, typer.Option(help="MODEL:PRETRAINED, MODEL:/path, MODEL:random or pictograms")
    ] = DEFAULT_TEACHER,
    proposals: Annotated[
        str,
        typer.Option(
            help="fit, fit:CACHE, student:PLACE (a run, .pt checkpoint or .safetensors student "
            "file), file:RESULTS.json, or mmdet's pickled list: "
            "file:LIST.pkl?order=image_id (or annotations); &novel=unseen says what its maker knew"
        ),
    ] = "fit",
    keep: Annotated[int, typer.Option(help="Proposals kept of an image")] = 300,
    storage: Annotated[str, typer.Option(help="fp16 or int8")] = "fp16",
    crop_mode: Annotated[
        str,
        typer.Option(
            help="squash, clip_center, pad_square, context_square, native (the teacher's own) or "
            "vild (clip_center, features summed)"
        ),
    ] = "squash",
    crop_scales: Annotated[str, typer.Option(help="Factors of a box's sides")] = "1.0,1.5",
    crop_combine: Annotated[
        str | None, typer.Option(help="mean (of unit vectors) or sum (of features)")
    ] = None,
    views: Annotated[
        str, typer.Option(help="orig; orig,flip (mirrored crops too, twice the room); avg")
    ] = "orig",
    encoder: Annotated[
        str,
        typer.Option(
            help="Whose code computes the teacher's images: open_clip, fused, compiled (fused, "
            "through torch.compile) or auto (fused on a GPU, if it is a plain ViT)"
        ),
    ] = "auto",
    decoder: Annotated[
        str,
        typer.Option(
            help="pillow, torchvision (JPEGs by nvJPEG on a GPU) or auto (torchvision on a GPU)"
        ),
    ] = "auto",
    prompts: Annotated[
        str, typer.Option(help="vild63, clip7 or single, several by commas, or a file of templates")
    ] = DEFAULT_PROMPTS,
    workers: Annotated[int, typer.Option(help="Processes of a local Dask cluster; 0: here")] = 0,
    scheduler: Annotated[str | None, typer.Option(help="Join a Dask scheduler: HOST:PORT")] = None,
    max_bad: Annotated[
        float, typer.Option(help="Share of unreadable images that is set aside")
    ] = 0.001,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it costs; tries a few images")
    ] = False,
    only_proposals: Annotated[
        bool, typer.Option("--only-proposals", help="Stop when `fit` is trained")
    ] = False,
    neighbors: Annotated[bool, typer.Option(help="Build neighbour lists at the end")] = True,
    experiment: Annotated[str | None, typer.Option(help="Whose network `fit` trains")] = None,
    fit_epochs: Annotated[int | None, typer.Option(help="Epochs of `fit`")] = None,
    overrides: Overrides = None,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Stage 1: propose regions, embed their crops with CLIP once, seal the cache. Resumes.

    Several GPUs for `fit`: torchrun --nproc-per-node N --no-python -- dkdetr cache-teacher ...
    trains on all of them, and goes on with one; --workers N then embeds on all. Little memory:
    --set compute.micro_batches=K trains it in K parts.
    """
    from cache.plan import Storage
    from dkdetr.engine.distributed import is_first_rank
    from pipeline.build import run_stage_one
    from pipeline.calibrate import price_cache
    from pipeline.crops import parse_crop_rule
    from pipeline.decoding import DecoderChoice
    from pipeline.executor import Executor
    from pipeline.request import CacheRequest, default_out, fit_overrides, prompts_of
    from pipeline.teacher import EncoderChoice

    prompts, templates = prompts_of(prompts)
    request = CacheRequest(
        split=split,
        out=out or default_out(split),
        data_root=data_root,
        teacher=teacher,
        proposals=proposals,
        keep=keep,
        storage=_one_of("--storage", storage, get_args(Storage)),
        crops=parse_crop_rule(crop_mode, crop_scales, crop_combine, views),
        encoder=_one_of("--encoder", encoder, get_args(EncoderChoice)),
        decoder=_one_of("--decoder", decoder, get_args(DecoderChoice)),
        prompts=prompts,
        templates=templates,
        executor=Executor(workers=workers, scheduler=scheduler),
        device=device,
        experiment=experiment,
        overrides=fit_overrides(overrides or ()),
        fit_epochs=fit_epochs,
        only_proposals=only_proposals,
        max_bad=max_bad,
        neighbors=neighbors,
        command=shlex.join(sys.argv[1:]),
    )
    if dry_run and not is_first_rank():  # torchrun's first one prices for all
        return
    result = price_cache(request) if dry_run else run_stage_one(request, _say)
    if lines := result.lines():  # a helping rank of torchrun has nothing to say
        _tell(lines, json_out)
        _report(result.as_json(), json_out)


@_command(cache_app, "info")
def cache_info(
    path: Annotated[str, typer.Argument(help="A cache: a folder, an export or a URL")],
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Say what a cache holds and what it was made of."""
    from cache.location import cache_path
    from pipeline.inspect import describe_cache

    described = describe_cache(cache_path(path))
    _tell(described.lines(), json_out)
    _report(described.as_json(), json_out)


@_command(cache_app, "verify")
def cache_verify(
    path: Annotated[str, typer.Argument(help="A cache: a folder, an export or a URL")],
    crop_modes: Annotated[
        str,
        typer.Option(
            help="Let the teacher name a sample of base objects cropped otherwise: "
            "squash,clip_center,... or all (needs its weights)"
        ),
    ] = "",
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Read every byte of a cache and check it; report recall and zero-shot accuracy."""
    from cache.location import cache_path
    from pipeline.inspect import verify_and_report

    report = verify_and_report(cache_path(path), data_root, crop_modes=crop_modes, device=device)
    _tell(report.lines(), json_out)
    _report(report.as_json(), json_out)
    report.raise_problems()


@_command(cache_app, "repair")
def cache_repair(
    path: Annotated[Path, typer.Argument(help="The cache's folder")],
    shard: Annotated[
        list[int] | None, typer.Option(help="Look at this shard alone (repeatable)")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes of a local Dask cluster; 0: here")] = 0,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="Default: where the pictures lay")
    ] = None,
    device: Device = "auto",
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Make again exactly what is damaged, to the same bytes; wants the teacher and the pictures."""
    from pipeline.repair import repair_cache

    repaired = repair_cache(
        path, shards=shard or (), data_root=data_root, device=device, workers=workers, say=_say
    )
    _tell(repaired.lines(), json_out)
    _report(repaired.as_json(), json_out)


@_command(cache_app, "diff")
def cache_diff(
    first: Annotated[str, typer.Argument(help="A cache")],
    second: Annotated[str, typer.Argument(help="Another")],
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Say in what two caches differ: what they were made of, field by field, and their rows."""
    from cache.diff import diff_caches
    from cache.store import open_cache
    from dkdetr.progress import progress_of

    with progress_of("diff") as advance:
        found = diff_caches(open_cache(first), open_cache(second), on_image=advance)
    _tell(found.lines(), json_out)
    _report(found.as_json(), json_out)


@_command(cache_app, "export")
def cache_export(
    path: Annotated[str, typer.Argument(help="A sealed cache")],
    out: Annotated[Path, typer.Argument(help="A folder for the export")],
    file_format: Annotated[str, typer.Option("--format", help="npy: files to be mapped")] = "npy",
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Copy a cache to flat, mapped files without padding; `train --cache` takes the copy too."""
    from cache.export import export_cache
    from cache.store import open_cache

    _one_of("--format", file_format, ("npy",))
    made = export_cache(open_cache(path), out)
    _say(f"{out} {'is ready' if made else 'was ready'}; next: dkdetr train --cache {out}")
    _report({"out": str(out), "made": made}, json_out)


@_command(cache_app, "import")
def cache_import(
    layout: Annotated[str, typer.Argument(help="detpro, oadp or hdovd")],
    source: Annotated[Path, typer.Argument(help="Its folder or zip of one .pth an image")],
    split: Annotated[str, typer.Option(help="The split that it belongs to")],
    out: Annotated[Path, typer.Option(help="The cache's folder")],
    text_bank: Annotated[
        Path, typer.Option(help="The names' embeddings: .npy, .pt; either way round")
    ],
    boxes: Annotated[
        str | None,
        typer.Option(
            help="Proposals of detpro and hdovd, in their embeddings' order: a COCO results json "
            "or mmdet's LIST.pkl?order=image_id|annotations"
        ),
    ] = None,
    image_source: Annotated[Path | None, typer.Option(help="OADP's `globals`")] = None,
    background: Annotated[
        str | None, typer.Option(help="Which row is the background: first or last")
    ] = None,
    gt: Annotated[bool, typer.Option(help="Take ground-truth embeddings over")] = True,
    teacher: Annotated[
        str, typer.Option(help="What embedded it, by its maker's word")
    ] = DEFAULT_TEACHER,
    keep: Annotated[int, typer.Option(help="Regions kept of an image")] = 300,
    storage: Annotated[str, typer.Option(help="fp16 or int8")] = "fp16",
    data_root: DataRoot = Path("data"),
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Take over another project's embeddings; the cache is marked as imported."""
    from cache.plan import Storage
    from pipeline.foreign_caches import ForeignFormat
    from pipeline.import_cache import ImportRequest, import_cache

    request = ImportRequest(
        layout=_one_of("layout", layout, get_args(ForeignFormat)),
        source=source,
        split=split,
        out=out,
        text_bank=text_bank,
        background=_one_of("--background", background, ("first", "last")) if background else None,
        boxes=boxes,
        image_source=image_source,
        use_gt=gt,
        teacher=teacher,
        keep=keep,
        storage=_one_of("--storage", storage, get_args(Storage)),
        data_root=data_root,
        command=shlex.join(sys.argv[1:]),
    )
    imported = import_cache(request, _say)
    _tell(imported.lines(), json_out)
    _report(imported.as_json(), json_out)


@_command(cache_app, "neighbors")
def cache_neighbors(
    path: Annotated[Path, typer.Argument(help="The cache's folder")],
    image: Annotated[int | None, typer.Option(help="Show this image's regions")] = None,
    box: Annotated[int | None, typer.Option(help="Show this region's neighbours")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Even if they are there")] = False,
    per_image: Annotated[
        int | None, typer.Option(help="Best regions of an image that take part; default: 50")
    ] = None,
    k: Annotated[
        int | None,
        typer.Option("--neighbors", help="Neighbours listed of each region; default: 16"),
    ] = None,
    exact_below: Annotated[
        int | None,
        typer.Option(help="Use an approximate index from this many regions on; default: 1000000"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda (needs faiss-gpu); default: auto")
    ] = None,
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Build the neighbour lists, or show those of one image or one region (--image, --box)."""
    from cache.nearest import SearchDevice
    from pipeline.region_views import neighbors_command

    named: dict[str, int | str | None] = {
        "per_image": per_image,
        "k": k,
        "exact_below": exact_below,
    }
    if device is not None:
        named["device"] = _one_of("--device", device, get_args(SearchDevice))
    settings = {name: value for name, value in named.items() if value is not None}
    result = neighbors_command(path, image, box, settings, rebuild=rebuild)
    _tell(result.lines(), json_out)
    _report(result.as_json(), json_out)


@_command(cache_app, "browse")
def cache_browse(
    path: Annotated[Path, typer.Argument(help="The cache's folder")],
    out: Annotated[Path, typer.Option(help="The page to write")] = Path("browse.html"),
    images: Annotated[str, typer.Option(help="How many images, or their ids: 17,42,")] = "12",
    data_root: DataRoot = Path("data"),
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Write one page with regions, their neighbours and the teacher's names for them."""
    from pipeline.browse import browse_cache

    summary = browse_cache(path, out, images=images, data_root=data_root)
    _tell(summary.lines(), json_out)
    _report(summary.as_json(), json_out)


@_command(app, "train")
def train_command(
    cache: Annotated[str, typer.Option(help="A sealed cache: a folder, an export, a URL")],
    experiment: Annotated[
        str | None, typer.Option(help="A shipped name or a TOML file; default: by the split")
    ] = None,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="Folder; default runs/EXPERIMENT-HASH")] = None,
    data_root: DataRoot = Path("data"),
    start_from: Annotated[
        Path | None, typer.Option("--from", help="Begin with this burn-in: a run or checkpoint")
    ] = None,
    until: Annotated[
        int | None,
        typer.Option(min=1, help="End before this epoch, saved: makes a burn-in to share"),
    ] = None,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="8 images through every phase, unwatched and unscored"),
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Deterministic algorithms only; slower")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Event files in RUN/tensorboard too")
    ] = False,
    track: Annotated[str | None, typer.Option(help="trackio or wandb, if installed")] = None,
    pictures_every: Annotated[
        int, typer.Option(help="Draw detections and KD regions every so many steps")
    ] = 0,
    profile: Annotated[int, typer.Option(help="Profile so many steps, then end")] = 0,
    eval_every: Annotated[
        int,
        typer.Option(help="Score each so many epochs, at their end, as `eval` does; 0: never"),
    ] = 0,
    eval_split: Annotated[
        str | None,
        typer.Option(help="What --eval-every scores on; default: the run's validation split"),
    ] = None,
    device: Device = "auto",
    seed: Annotated[int | None, typer.Option(help="Overrides the experiment's seed")] = None,
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Train a student from a cache; the same command resumes.

    CLIP is not loaded, unless kd.alignment=online asks for it.

    Several GPUs: torchrun --nproc-per-node N --no-python -- dkdetr train ...
    Fewer GPUs than the batch wants: --set compute.micro_batches=K computes a rank's share in K
    parts. K parts equal K ranks; batch relations (kd.rkd) and batch-norm statistics stay those of
    a part. SIGTERM saves and ends with code 75.
    """
    with _prepared():
        from cache.location import cache_path
        from dkdetr.engine.smoke import smoke as smoke_train
        from dkdetr.engine.start import settings_and_folder
        from dkdetr.engine.train import train
        from dkdetr.engine.train_request import TrainRequest

        settings = [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])]
        place = cache_path(cache)
        config, folder = settings_and_folder(place, experiment, settings, run)
        request = TrainRequest(
            place,
            config,
            folder,
            data_root,
            device,
            build_teacher=_load_cache_teacher,
            start_from=start_from,
            until_epoch=until,
            deterministic=deterministic,
            watch=_watch(tensorboard, track, pictures_every, profile, eval_every, eval_split),
        )
        summary = smoke_train(request) if smoke else train(request)
    if not smoke:  # which has spoken, and left no run to score
        _say(
            f"trained to iteration {summary.iterations}; checkpoint {summary.checkpoint}\n"
            f"next: dkdetr eval {summary.run}"
        )
    _report(vars(summary), json_out)


@contextlib.contextmanager
def _prepared() -> Iterator[None]:
    """Holds SIGTERM as a flag, from before the seconds of imports on."""
    from dkdetr.engine.interruption import stop_on_sigterm

    with stop_on_sigterm():
        yield


def _watch(
    tensorboard: bool,
    track: str | None,
    pictures_every: int,
    profile: int,
    eval_every: int,
    eval_split: str | None,
) -> Any:
    from dkdetr.engine.train_request import Watch
    from dkdetr.errors import UsageError

    if min(pictures_every, profile) < 0:
        raise UsageError("--pictures-every and --profile want 0 or more steps")
    if eval_every < 0:
        raise UsageError("--eval-every wants 0 or more epochs")
    if eval_split is not None and eval_every == 0:
        raise UsageError("--eval-split says what --eval-every scores on: give both, or neither")
    trackers: list[Any] = ["tensorboard"] if tensorboard else []
    if track is not None:
        trackers.append(_one_of("--track", track, ("trackio", "wandb")))
    return Watch(
        trackers=tuple(trackers),
        pictures_every=pictures_every,
        profile_steps=profile,
        eval_every=eval_every,
        eval_split=eval_split,
    )


def _load_cache_teacher(cache: Any, device: Any) -> Any:
    from pipeline.online_teacher import teacher_of_cache

    return teacher_of_cache(cache, device)


@_command(app, "eval")
def eval_command(
    run: Annotated[
        Path | None, typer.Argument(help="A run folder or checkpoint; default: the newest run")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Default: the validation part of the run's split")
    ] = None,
    vocab: Annotated[Path | None, typer.Option(help="A vocabulary file for the names")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Score this results json instead of a run")
    ] = None,
    evaluator: Annotated[str, typer.Option(help="fast, or official (lvis, pycocotools)")] = "fast",
    clean_names: Annotated[
        bool, typer.Option("--clean-names", help="Objects365, VOC: names put right, not verbatim")
    ] = False,
    agreement: Annotated[
        str | None,
        typer.Option(help="Measure the run's agreement with the teacher on this cache instead"),
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="The running average of the weights (optim.ema_decay)")
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(help="auto (half on a GPU), fp32, tf32, fp16, bf16; default: the run's own"),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Through torch.compile: slow to start")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images at once; default: the run's eval.batch_size")
    ] = None,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Score a run, or anybody's results json, by the split's protocol.

    Several GPUs: torchrun --nproc-per-node N --no-python -- dkdetr eval ...
    """
    from dkdetr.engine.evaluate_run import EvalRequest, evaluate_predictions, evaluate_run
    from dkdetr.evaluation.detection_metrics import Evaluator

    official = evaluator if evaluator != "fast" else None
    of_runs: dict[str, Any] = {
        "--vocab": vocab, "--clean-names": clean_names, "--compile": compiled,
    }  # fmt: skip
    if agreement is not None:
        others = {"--predictions": predictions, "--split": split, "--evaluator": official}
        _refuse_beside("--agreement", of_runs | others)
        _measure_agreement(
            run,
            agreement,
            data_root,
            device,
            batch_size,
            json_out,
            averaged=ema,
            precision=precision,
        )
        return
    if predictions is not None:
        others = {
            "RUN": run, "--ema": ema, "--precision": precision, "--batch-size": batch_size,
        }  # fmt: skip
        _refuse_beside("--predictions", others | of_runs)
    request = EvalRequest(
        run,
        split,
        vocab,
        data_root,
        device,
        _one_of("--evaluator", evaluator, get_args(Evaluator)),
        clean_names=clean_names,
        averaged=ema,
        precision=_precision(precision),
        compiled=compiled,
        batch_size=batch_size,
    )
    if predictions is not None:
        scored = evaluate_predictions(predictions, request)
    else:
        scored = evaluate_run(request, _build_vocabulary)
    if scored is None:  # one of several ranks, and not the first
        return
    _say(f"{scored.subject} on {scored.split}, {scored.evaluation.seconds:.0f} s")
    if json_out != "-":
        scored.print_table()
    _report(scored.as_json(), json_out)


def _refuse_beside(option: str, others: dict[str, Any]) -> None:
    """Raises UsageError that names what was given and would have no effect beside an option."""
    from dkdetr.errors import UsageError

    if given := [name for name, value in others.items() if value]:
        raise UsageError(f"{option} has no use for {', '.join(given)}: leave it out")


def _measure_agreement(
    run: Path | None,
    cache: str,
    data_root: Path,
    device: str,
    batch_size: int | None,
    json_out: str | None,
    *,
    averaged: bool,
    precision: str | None,
) -> None:
    from cache.location import cache_path
    from dkdetr.engine.run_agreement import measure_run_agreement
    from dkdetr.errors import UsageError

    if run is None:
        raise UsageError("--agreement wants a RUN: the folder or checkpoint to measure")
    measured = measure_run_agreement(
        run,
        cache_path(cache),
        data_root,
        device,
        batch_size,
        averaged=averaged,
        precision=_precision(precision),
    )
    _tell([line for each in measured for line in each.lines()], json_out)
    _report({"agreement": [each.as_json() for each in measured]}, json_out)


@_command(app, "predict")
def predict_command(
    pictures: Annotated[
        list[str], typer.Argument(help="Pictures, folders, globs, videos, or - for a list on stdin")
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            help="A run, a checkpoint, a student file or owner/name on the Hugging Face hub; "
            "default: newest run"
        ),
    ] = None,
    words: Annotated[
        str | None, typer.Option("--classes", "-c", help='"cat, traffic cone", @coco or @FILE')
    ] = None,
    vocab: Annotated[Path | None, typer.Option(help="A vocabulary file instead of words")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Least score, of all names; default: a name's own in the vocabulary, else "
            f"{DEFAULT_THRESHOLD}"
        ),
    ] = None,
    class_thresholds: Annotated[
        list[str] | None, typer.Option("--class-threshold", help="NAME=SCORE (repeatable)")
    ] = None,
    nms: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Suppress overlaps above this IoU, whatever the names"),
    ] = None,
    every: Annotated[int, typer.Option(help="Of a video, each N-th frame")] = 1,
    batch_size: Annotated[int | None, typer.Option(help="Pictures at once")] = None,
    draw: Annotated[bool, typer.Option(help="Write annotated pictures")] = True,
    masks: Annotated[bool, typer.Option(help="Masks too, if the student has a mask head")] = True,
    out: Annotated[Path, typer.Option(help="Folder for what it writes")] = Path("predictions"),
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The text tower for words; default: the run's teacher. Of converted weights "
            "without a vocabulary: the one that they learned from"
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="auto (half on a GPU), fp32, tf32, fp16, bf16; default: auto"),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Through torch.compile: slow to start")
    ] = False,
    device: Device = "auto",
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Find what words name in pictures: boxes, names, scores and, if it has a mask head, masks."""
    from dkdetr.engine.interruption import end_on_sigterm

    with end_on_sigterm(_PREDICT_STOPPED):
        from dkdetr.data.vocabulary_check import describe_vocabulary, thresholds_in_force
        from dkdetr.errors import DataError
        from dkdetr.inference.picture_sources import find_sources, open_pictures, require_all_read
        from dkdetr.inference.prediction_files import predict_to_folder, require_sources_apart
        from pipeline.open_vocabulary import load_detector

        sources = find_sources(pictures)
        _require_another_answer(json_out, sources)
        if draw:  # predictions.json and .csv are no picture's name
            require_sources_apart(sources, out)
        detector, looked_for = load_detector(
            model,
            words,
            vocab,
            teacher,
            device,
            precision=_precision(precision) or "auto",
            compiled=compiled,
        )
        if words is not None:
            for line in describe_vocabulary(looked_for).warnings():
                _say(line)
        typed = _scores_by_name(class_thresholds or ())
        if threshold is None and (own := thresholds_in_force(looked_for, typed)):
            _say(own)
        unreadable: list[DataError] = []
        summary = predict_to_folder(
            detector,
            open_pictures(sources, every=every, unreadable=unreadable),
            looked_for,
            out,
            num_files=len(sources),
            draw=draw,
            threshold=threshold,
            thresholds=typed,
            nms_iou=nms,
            batch_size=batch_size,
            masks=masks,
        )
    _tell(summary.lines(), json_out)
    _report(summary.as_json() | {"unreadable": [str(each) for each in unreadable]}, json_out)
    for each in unreadable[:_MOST_UNREADABLE]:
        _say(f"left out: {each}")
    if len(unreadable) > _MOST_UNREADABLE:
        _say(f"left out: {len(unreadable) - _MOST_UNREADABLE} more")
    require_all_read(unreadable, len(sources), out)


def _require_another_answer(json_out: str | None, sources: Iterable[Path]) -> None:
    """Raises UsageError where --json names a picture that is read."""
    from dkdetr.errors import UsageError

    if json_out is None or Path(json_out).resolve() not in {path.resolve() for path in sources}:
        return
    _answered.append(json_out)  # the error is not to be written there either
    raise UsageError(f"--json {json_out} would replace a picture: give another file")


def _precision(word: str | None) -> Any:
    from dkdetr.config import Precision

    return word and _one_of("--precision", word, get_args(Precision))


def _scores_by_name(pairs: Sequence[str]) -> dict[str, float]:
    from dkdetr.errors import UsageError

    scores: dict[str, float] = {}
    for pair in pairs:
        name, _, score = pair.rpartition("=")
        try:
            scores[name.strip()] = float(score)
        except ValueError:
            raise UsageError(f"--class-threshold {pair}: give NAME=SCORE") from None
    return scores


def _build_vocabulary(split: Any, teacher: str, templates: tuple[str, ...]) -> Any:
    from pipeline.vocabularies import build_split_vocabulary

    return build_split_vocabulary(split, teacher, templates)


@_command(app, "ablate")
def ablate_command(
    cache: Annotated[str, typer.Option(help="A sealed cache, shared by all rows")],
    table: Annotated[str, typer.Option(help="5, 6, 7, neighbors, alignment or controls")],
    experiment: Annotated[
        str | None, typer.Option(help="What rows take away from; default: by the cache's split")
    ] = None,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="Trainings a row; all rows on the same seeds")] = 1,
    rows: Annotated[str | None, typer.Option(help="Only these rows: a,b,...")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Rows side by side; default: GPUs, else cores")
    ] = None,
    split: Annotated[str | None, typer.Option(help="What to score on; default: its val")] = None,
    out: Annotated[Path | None, typer.Option(help="Default runs/ablate-EXPERIMENT-HASH")] = None,
    eval_every: Annotated[
        int,
        typer.Option(help="Score each row's every so many epochs too, as `train` does; 0: never"),
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it runs")] = False,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Run a table of the paper: every row from one cache, and one burn-in a seed. Resumes."""
    with _prepared():
        from cache.location import cache_path
        from dkdetr.engine.ablate import AblateRequest, ablate, price_ablation

        chosen = tuple(name.strip() for name in (rows or "").split(",") if name.strip())
        request = AblateRequest(
            cache=cache_path(cache),
            table=table,
            experiment=experiment,
            overrides=overrides or (),
            seeds=seeds,
            rows=chosen,
            jobs=jobs,
            split=split,
            out=out,
            data_root=data_root,
            device=device,
            eval_every=eval_every,
        )
        # -P: a cli.py of the user's, in the folder at hand, is none of ours.
        program = (sys.executable, "-P", "-c", "from cli import main; main()")
        summary = price_ablation(request) if dry_run else ablate(request, program)
    _tell(summary.lines(), json_out)
    _report(summary.as_json(), json_out)
    summary.raise_failures()


@_command(app, "report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Scored run folders, or results json files")],
    split: Annotated[
        str | None, typer.Option(help="Default: the validation part of the first run's split")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Default: RUN/report.html; of several runs report.html")
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Whole pictures to show")] = 12,
    data_root: DataRoot = Path("data"),
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Write one HTML page on scored runs: numbers, curves, errors, pictures, losses."""
    from dkdetr.engine.report_runs import ReportRequest, report_runs

    command = f"dkdetr {shlex.join(sys.argv[1:])}"
    page = report_runs(ReportRequest(runs, split, out, data_root, pictures, command))
    _tell([f"written: {page}"], json_out)
    _report({"page": str(page)}, json_out)


@_command(app, "export")
def export_command(
    run: Annotated[Path, typer.Argument(help="A run folder, checkpoint or student file")],
    out: Annotated[
        Path | None, typer.Option(help="Default: the run's name, .safetensors, .onnx or .pt")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="safetensors, onnx or torchscript; default: by --out's name, else the first",
        ),
    ] = None,
    bake: Annotated[
        bool,
        typer.Option("--bake", help="Graphs: fix the run's own names, which are else an input"),
    ] = False,
    vocab: Annotated[Path | None, typer.Option(help="Graphs: fix the names of this file")] = None,
    class_thresholds: KeptScores = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="The running average of the weights (optim.ema_decay)")
    ] = False,
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Write a run's student alone: for sharing, with a model card, or as a graph that others run.

    A graph takes pixels, a padding mask and text embeddings, any number of each, and gives scores
    and boxes; the largest difference to PyTorch is printed. Least scores of names that it fixes
    stand in its metadata.
    """
    from dkdetr.data.vocabulary import with_thresholds
    from dkdetr.engine.run_folder import RunFolder
    from dkdetr.engine.subject import load_subject
    from dkdetr.errors import UsageError
    from dkdetr.inference.export import export_student

    form = _export_format(form, out)
    if (bake and vocab) or ((bake or vocab) and form == "safetensors"):
        raise UsageError("--bake or --vocab (one of them) fix the names of onnx and torchscript")
    least = _scores_by_name(class_thresholds or ())
    if least and form != "safetensors" and not (bake or vocab):
        raise UsageError("--class-threshold is of names: fix the graph's, by --bake or --vocab")
    subject = load_subject(run, averaged=ema)
    name = f"{subject.folder.name}{'-ema' if ema else ''}{_EXPORT_SUFFIXES[form]}"
    path = out or Path(name)
    if path.resolve() == run.resolve():
        raise UsageError(f"'{path}' is the file that is to be exported: give another with --out")
    if form != "safetensors":
        _export_graph(path, form, subject, vocab, least, json_out, bake=bake)
        return
    averaged = ema or bool(subject.provenance.get("averaged"))  # of a file: as it says
    written = export_student(
        path,
        subject.student,
        subject.config,
        with_thresholds(subject.vocabulary, least),
        {**subject.provenance, "train_split": subject.train_split, "averaged": averaged},
        scores=RunFolder(subject.folder).evaluations(averaged=ema),
    )
    notes = []
    for each in written.left_out:
        words = [str(run), *(["--ema"] if ema else [])]
        words += ["--split", each.split] if each.split else []
        notes.append(f"note: {each.line}; next: dkdetr eval {shlex.join(words)}")
    _tell([f"{path}: dkdetr eval {path}", f"{written.card}", *notes], json_out)
    lines = [each.line for each in written.left_out]
    _report({**vars(written), "left_out": lines}, json_out)


def _export_format(form: str | None, out: Path | None) -> str:
    """Returns the format that --format or the file's name says; both must say the same."""
    from dkdetr.errors import UsageError

    if form is not None:
        _one_of("--format", form, tuple(_EXPORT_SUFFIXES))
    if out is None:
        return form or "safetensors"
    named = next((each for each, end in _EXPORT_SUFFIXES.items() if end == out.suffix), None)
    if named is None or form not in (None, named):
        wanted = {form: _EXPORT_SUFFIXES[form]} if form else _EXPORT_SUFFIXES
        ends = ", ".join(f"{end} ({each})" for each, end in wanted.items())
        raise UsageError(f"'{out}': the file's name ends in {ends}")
    return named


def _export_graph(
    path: Path,
    form: Any,
    subject: Any,
    vocab: Path | None,
    least: dict[str, float],
    json_out: str | None,
    *,
    bake: bool,
) -> None:
    from dkdetr.data.vocabulary import load_vocabulary, with_thresholds
    from dkdetr.inference.export_graph import export_graph

    own = subject.vocabulary
    named = load_vocabulary(vocab) if vocab else own if bake else None
    baked = None if named is None else with_thresholds(named, least)
    written = export_graph(path, form, subject.student, subject.config, own, baked=baked)
    _tell(written.lines(), json_out)
    _report(written.as_json(), json_out)


@_command(app, "convert")
def convert_command(
    source: Annotated[Path, typer.Argument(help="Another project's .pth, .bin or .safetensors")],
    out: Annotated[Path, typer.Argument(help="The student file to write (.safetensors)")],
    experiment: Annotated[
        str, typer.Option(help="Whose student it becomes: a shipped name or a TOML file")
    ] = _DEFAULT_EXPERIMENT,
    protocol: Annotated[
        str, typer.Option(help="What it will be scored by: lvis, ovcoco or coco")
    ] = "lvis",
    vocab: Annotated[
        Path | None, typer.Option(help="The vocabulary file that its classifier speaks")
    ] = None,
    overrides: Overrides = None,
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Take over weights of DK-DETR (opera), Deformable DETR, transformers, or a ResNet-50."""
    from dkdetr.inference.conversion import convert_file
    from dkdetr.inference.convert import Protocol

    report = convert_file(
        source,
        out,
        experiment,
        overrides or (),
        protocol=_one_of("--protocol", protocol, get_args(Protocol)),
        vocabulary_path=vocab,
    )
    _tell([*report.lines(), f"written: {out}"], json_out)
    _report(report.as_json(), json_out)


@_command(app, "fetch")
def fetch_command(
    bundle: Annotated[
        Path | None, typer.Option(help="Write it all into this tar, with sha256 hashes")
    ] = None,
    from_bundle: Annotated[
        Path | None, typer.Option(help="Put what this tar holds where the libraries look")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help=f"As for cache-teacher; default: {DEFAULT_TEACHER}")
    ] = None,
    experiment: Annotated[
        str | None,
        typer.Option(
            help=f"Whose backbone: a shipped name or a TOML file; default: {_DEFAULT_EXPERIMENT}"
        ),
    ] = None,
    only: Annotated[str | None, typer.Option(help="teacher or backbone")] = None,
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Get weights and tokenizers once; carry them to machines without a network.

    Here: dkdetr fetch --bundle b.tar. There: dkdetr fetch --from-bundle b.tar, and from then on
    every command with --offline.
    """
    from dkdetr.errors import UsageError
    from pipeline.fetch import fetch, install

    if bundle and from_bundle:
        raise UsageError("--bundle writes one, --from-bundle reads one: give one of them")
    wanted: Any = _one_of("--only", only, ("teacher", "backbone")) if only else None
    if from_bundle:
        others = {"--teacher": teacher, "--experiment": experiment, "--only": only}
        _refuse_beside("--from-bundle, which puts all in place,", others)
        fetched = install(from_bundle)
    else:
        if wanted == "backbone":
            _refuse_beside("--only backbone", {"--teacher": teacher})
        elif wanted == "teacher":
            _refuse_beside("--only teacher", {"--experiment": experiment})
        fetched = fetch(
            None if wanted == "backbone" else teacher or DEFAULT_TEACHER,
            None if wanted == "teacher" else experiment or _DEFAULT_EXPERIMENT,
            bundle,
            _say,
        )
    _tell(fetched.lines(), json_out)
    _report(fetched.as_json(), json_out)


@_command(app, "doctor")
def doctor_command(
    data_root: DataRoot = Path("data"),
    runs: Annotated[Path, typer.Option(help="Where runs go")] = Path("runs"),
    cache: Annotated[Path, typer.Option(help="Where caches go")] = Path("cache"),
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Look at this machine: GPU against torch, disk, shared memory, offline assets."""
    from dkdetr.doctor import examine

    examination = examine(data_root, runs, cache)
    _tell(examination.lines(), json_out)
    _report(examination.as_json(), json_out)
    if not examination.healthy:
        raise typer.Exit(1)


@_command(vocab_app, "build")
def vocab_build(
    names: Annotated[
        str,
        typer.Argument(
            help="A file, a line of it: name, synonym, ...; or lvis, coco, objects365, voc, as "
            "published, lvis-clean and so on, put right"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The vocabulary file to write")],
    teacher: Annotated[
        str, typer.Option(help="Whose text tower: as for cache-teacher")
    ] = DEFAULT_TEACHER,
    prompts: Annotated[
        str, typer.Option(help="vild63, clip7 or single, several by commas, or a file of templates")
    ] = DEFAULT_PROMPTS,
    class_thresholds: KeptScores = None,
    device: Device = "auto",
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Embed names once; eval, predict and convert then need no CLIP."""
    from pipeline.open_vocabulary import build_vocabulary_file

    least = _scores_by_name(class_thresholds or ())
    built = build_vocabulary_file(names, out, teacher, prompts, device, thresholds=least)
    _tell(built.lines(), json_out)
    _report(built.as_json(), json_out)


@_command(vocab_app, "import")
def vocab_import(
    bank: Annotated[Path, typer.Argument(help="Another project's text bank: .npy, .pt or .pth")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The vocabulary file to write")],
    names: Annotated[
        str,
        typer.Option(help="Names of the bank's rows, in order: a file, or a list as for build"),
    ],
    teacher: Annotated[
        str, typer.Option(help="What embedded it, as `vocab show` prints it of your student's")
    ],
    background: Annotated[
        str | None, typer.Option(help="Which row is the background: first or last")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Embedding length, where a bank is square")
    ] = None,
    class_thresholds: KeptScores = None,
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Take over a bank of text embeddings, either way round, normalised or not."""
    from pipeline.open_vocabulary import import_vocabulary_file

    row: Any = _one_of("--background", background, ("first", "last")) if background else None
    least = _scores_by_name(class_thresholds or ())
    described = import_vocabulary_file(bank, names, out, teacher, row, width, thresholds=least)
    _tell(described.lines(), json_out)
    _report(described.as_json(), json_out)


@_command(vocab_app, "show")
def vocab_show(
    path: Annotated[Path, typer.Argument(help="A vocabulary file, or a student file")],
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Print a vocabulary's names, teacher, prompts, thresholds and doubts; loads no CLIP."""
    from dkdetr.data.vocabulary import load_vocabulary
    from dkdetr.data.vocabulary_check import describe_vocabulary
    from dkdetr.errors import CorruptArtefactError

    try:
        vocabulary = load_vocabulary(path)
    except CorruptArtefactError:
        from dkdetr.student_file import is_student_file, student_vocabulary

        if not is_student_file(path):
            raise
        vocabulary = student_vocabulary(path)
    described = describe_vocabulary(vocabulary)
    _tell(described.lines(), json_out)
    _report(described.as_json(), json_out)


@_command(data_app, "list")
def data_list(
    data_root: DataRoot = Path("data"), json_out: Json = None, verbose: Verbose = False
) -> None:
    """List the splits by name and whether their files are there."""
    from dkdetr.data.split_sources import list_splits

    found = list_splits(data_root)
    _tell([f"{name:26s} {problem or 'there'}" for name, problem in found.items()], json_out)
    _report(dict(found), json_out)


@_command(data_app, "check")
def data_check(
    split: Annotated[str, typer.Argument(help="A split's name")],
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every picture: finds truncated ones, too")
    ] = False,
    data_root: DataRoot = Path("data"),
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Read a split, check its records and files, and print its numbers and every fault."""
    from dkdetr.data.check import check_split

    report = check_split(split, data_root, decode=decode)
    _tell(report.lines(), json_out)
    _report(report.as_json(), json_out)
    report.raise_problems()


@_command(data_app, "prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="pictograms, lvis or ovcoco")],
    size: Annotated[
        str | None, typer.Option(help="pictograms: tiny (the default), small, full or full70")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="pictograms: lvis-like (the default) or coco-like")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="pictograms: another seed than 0 makes another world")
    ] = None,
    data_root: DataRoot = Path("data"),
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Make the embedded data set (needs [demo]), or the derived files of lvis or ovcoco."""
    if name != "pictograms":
        from dkdetr.data.prepare import PREPARED, prepare_derived

        _one_of("data prepare", name, ("pictograms", *PREPARED))
        others = {"--size": size, "--protocol": protocol, "--seed": seed is not None}
        _refuse_beside(f"data prepare {name}", others)
        files = [str(file) for file in prepare_derived(name, data_root, _say)]
        _say("\n".join(files))
        _report({"files": files}, json_out)
        return
    from pipeline.pictograms.dataset import prepare_pictograms

    folder = prepare_pictograms(
        data_root, size=size or "tiny", protocol=protocol or "lvis-like", seed=seed or 0
    )
    _say(f"ready: {folder}")
    _report({"folder": str(folder)}, json_out)


@_command(config_app, "show")
def config_show(
    experiment: Annotated[str, typer.Argument(help="A shipped name or a TOML file")],
    overrides: Overrides = None,
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Print the resolved settings, and who set each that is not the default."""
    from dataclasses import asdict

    from dkdetr.experiment_file import config_hash, config_to_dict, flatten, load_experiment

    resolved = load_experiment(experiment, overrides or ())
    table = config_to_dict(resolved.config)
    lines = [
        f"{key} = {('none' if value is None else value)!r}"
        + (f"    # {resolved.origins[key]}" if key in resolved.origins else "")
        for key, value in flatten(asdict(resolved.config)).items()
    ]
    _tell([*lines, f"# hash {config_hash(resolved.config)}"], json_out)
    _report({"config": table, "origins": dict(resolved.origins)}, json_out)


@_command(config_app, "check")
def config_check(
    experiment: Annotated[str, typer.Argument(help="A TOML file, or a shipped name")],
    overrides: Overrides = None,
    json_out: Json = None,
    verbose: Verbose = False,
) -> None:
    """Read an experiment as train and ablate do, every key, type, range and [ablate.ROW] table.

    Exit 2 names what is wrong.
    """
    from dkdetr.experiment_file import config_hash, load_experiment, refuse_late_start

    resolved = load_experiment(experiment, overrides or ())
    refuse_late_start(resolved.config)
    if resolved.rows:
        from dkdetr.engine.ablation_plan import check_row_tables

        check_row_tables(resolved, experiment)
    told = {"name": resolved.config.name, "hash": config_hash(resolved.config)}
    set_here = len(resolved.origins)
    _tell([f"ok: {told['name']}, {set_here} settings given, hash {told['hash']}"], json_out)
    _report({**told, "settings_given": set_here}, json_out)


def _one_of(option: str, given: str, choices: tuple[str, ...]) -> Any:
    from dkdetr.errors import UsageError

    if given not in choices:
        raise UsageError(f"{option} {given}: choose one of {', '.join(choices)}")
    return given


def main() -> None:
    """Runs the program."""
    app(prog_name="dkdetr")
