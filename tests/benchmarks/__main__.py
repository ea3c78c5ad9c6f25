"""Every benchmark of speed, one after the other, kept as dated Markdown.

    python -m tests.benchmarks [--device auto|cpu|cuda] [--only step inference] [--out FOLDER]

`make bench` (a CPU, small sizes) and `make bench-gpu`. Each runs in a process of its own; one that
fails is told, and the exit code is 1. Every line is in the file as soon as it is said: whoever is
stopped has lost nothing. Nothing is fetched: tests/benchmarks/requirements.txt lists what must be
installed beside dkdetr.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks import recorded
from tests.benchmarks.machine import describe

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 3600
_PACKAGES = ("torch", "torchvision", "triton", "transformers", "open_clip_torch", "faiss-cpu",
             "zarr", "numpy", "pillow", "lvis", "faster-coco-eval", "hotcoco")  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """A module of this folder, its options on either device, and what others were seen to do.

    `cpu` is None for what is not done there; `part` tells two runs of one module apart.
    """

    module: str
    title: str
    cpu: str | None = ""
    gpu: str = ""
    peers: str = ""
    part: str = ""

    @property
    def name(self) -> str:
        """What `--only` calls it."""
        return self.part or self.module


BENCHMARKS = (
    Benchmark("attention", "Deformable attention", peers=recorded.ATTENTION),
    Benchmark("step", "A training step by part", peers=recorded.STEP),
    Benchmark(
        "step", "The training step, compiled", cpu=None,
        gpu="--alone --set compute.compile=inductor", part="step-compiled",
    ),
    Benchmark(
        "step", "The training step, compiled, by CUDA graphs", cpu=None,
        gpu="--alone --set compute.compile=inductor --set compute.cuda_graphs=true",
        part="step-graphs",
    ),
    Benchmark("matching", "Matching of the first stage", cpu="--tokens 5440 --targets 12"),
    Benchmark(
        "teacher_free", "The teacher: not there, cached, in the loop",
        cpu="--steps 2 --crops 20",
        gpu="--experiment lvis_r50_70e --batch 8 --image-size 1024 --device cuda --steps 20 "
        "--teacher ViT-B-32-quickgelu:random --set optim.precision=auto",
        peers=recorded.TEACHER,
    ),
    Benchmark(
        "cache_fill", "The cache stage by part",
        cpu="--teacher pictograms --images 32 --boxes 16 --repeats 1",
        gpu="--images 528 --boxes 300 --workers 8 --repeats 1 --decoder auto "
        "--encoder compiled",
        peers=recorded.CACHE,
    ),
    Benchmark("inference", "Inference", gpu="--compile", peers=recorded.INFERENCE),
    Benchmark(
        "cache_reader", "The cache's reader", cpu="--images 64 --seconds 1", peers=recorded.READER
    ),
    Benchmark(
        "scoring", "Scoring", cpu="--images 200 --peers", gpu="--peers",
        peers=recorded.SCORING,
    ),
    Benchmark("neighbors", "Neighbour lists", cpu="--images 500"),
    Benchmark(
        "annotations", "Reading annotations", cpu="--annotations 50000 --images 5000"
    ),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", nargs="+", choices=[each.name for each in BENCHMARKS])
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "benchmarks" / "results")
    options = parser.parse_args()
    device = _device(options.device)
    begun = datetime.now(UTC)
    name = f"{begun:%Y-%m-%d}-{device}" + ("-" + "-".join(options.only) if options.only else "")
    options.out.mkdir(parents=True, exist_ok=True)
    path = new_page(options.out, name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failed = 0
    with path.open("x", encoding="utf-8", buffering=1) as page:

        def say(text: str) -> None:
            page.write(text)
            page.flush()
            print(text, end="", flush=True)

        say(f"# Benchmarks of {begun:%Y-%m-%d}, {device}\n\n{_machine(device)}\n")
        for each in BENCHMARKS:
            wanted = each.name in options.only if options.only else True
            if wanted and (device == "cuda" or each.cpu is not None):
                failed += _run(each, device, say) != 0
    print(f"kept in {path}; {failed} failed")
    return 1 if failed else 0


def new_page(folder: Path, name: str) -> Path:
    """Returns where no page is yet: a day's second run spoils nothing of the first."""
    path, number = folder / f"{name}.md", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.md"
    return path


def _device(wanted: str) -> str:
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        sys.exit("--device cuda: there is no GPU; use make bench for small sizes on a CPU")
    return "cuda" if there and wanted != "cpu" else "cpu"


def _machine(device: str) -> str:
    note = "Sizes of the design's page, times of a GPU."
    if device == "cpu":
        load = os.getloadavg()[0]
        note = (
            "Small sizes on one thread: only ratios within a table mean anything. Load average at "
            f"the start: {load:.1f}. Tables on the wall clock (the teacher, the reader, scoring, "
            "attention) carry a busy machine's noise: a negative price of distillation is such."
        )
    return f"{describe(*_PACKAGES)}.\n{note}"


def _run(benchmark: Benchmark, device: str, say: Callable[[str], None]) -> int:
    """Returns the exit code of a benchmark, after saying all that it says, line by line."""
    words = (benchmark.gpu if device == "cuda" else benchmark.cpu or "").split()
    command = [sys.executable, "-m", f"tests.benchmarks.{benchmark.module}", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONFAULTHANDLER"] = "1"  # generated code that crashes says where
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    say(f"\n## {benchmark.title}\n\n`{' '.join(['python', *command[1:]])}`\n\n```\n")
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        # A session of its own, so that its loader processes end with it.
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        ) as child:  # fmt: skip
            timer = threading.Timer(TIMEOUT_S, _end, [child])
            timer.start()
            try:
                for line in child.stdout or ():
                    say(line)
            except BaseException:
                _end(child)
                say("STOPPED before its end\n```\n")
                raise
            finally:
                timer.cancel()
        code = child.returncode
        errors.seek(0)
        if code:
            too_long = code == -signal.SIGKILL and time.monotonic() - started >= TIMEOUT_S
            late = f", not done after {TIMEOUT_S} s" if too_long else ""
            name = f" ({signal.Signals(-code).name})" if code < 0 else ""
            say(f"FAILED with exit code {code}{name}{late}\n{errors.read().strip()[-6000:]}\n")
    say(f"```\n\n{time.monotonic() - started:.0f} s\n")
    if benchmark.peers:
        peers = _spaced(benchmark.peers)
        say(f"\nRecorded of others (tests/benchmarks/recorded.py):\n\n{peers}\n")
    return code


def _end(child: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _spaced(text: str) -> str:
    """Returns the text with empty lines around its table, as Markdown wants them."""
    lines = text.splitlines()
    spaced: list[str] = []
    for before, line in zip(["", *lines], lines, strict=False):
        if before and before.startswith("|") != line.startswith("|"):
            spaced.append("")
        spaced.append(line)
    return "\n".join(spaced)


if __name__ == "__main__":
    sys.exit(main())
