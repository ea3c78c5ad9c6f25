"""Prints how long an LVIS-sized results file takes to score, from its files, and the memory.

python -m tests.benchmarks.scoring [--images 1981] [--detections 300] [--classes 1203] [--peers]

The whole of LVIS val is --images 19809. Each tool runs in a process of its own and on one core,
reading included. We score by hotcoco, which as a peer reads the files itself. A peer that is not
installed is told and left out; one that fails or comes to other numbers is told too, and makes the
exit code 1.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PEERS = {"lvis": "lvis", "faster-coco-eval": "faster_coco_eval", "hotcoco": "hotcoco"}
"""Packages on the index that score LVIS, and the module of each."""
_SHOWN = ("AP", "APr", "APc", "APf")
_MOST_OF_LVIS = 300


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1981)
    parser.add_argument("--detections", type=int, default=_MOST_OF_LVIS)
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--peers", action="store_true", help=f"time {', '.join(PEERS)}, too")
    parser.add_argument("--folder", type=Path, help="keep the files here, for the same sizes")
    parser.add_argument("--only", choices=("ours", *PEERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(report(options.only, options.folder)))
        return 0
    if options.peers and options.detections > _MOST_OF_LVIS:
        parser.error(f"not all peers cut an image's detections at LVIS's {_MOST_OF_LVIS}")
    sizes = [options.images, options.detections, options.classes]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "results.json").is_file():
            write_problem(folder, *sizes)
            (folder / "sizes.json").write_text(json.dumps(sizes))
        elif json.loads((folder / "sizes.json").read_text()) != sizes:
            parser.error(f"'{folder}' holds a problem of other sizes")
        megabytes = (folder / "results.json").stat().st_size / 1e6
        print("{} images x {} detections, {} classes: {:.0f} MB".format(*sizes, megabytes))
        tools = ("ours", *PEERS) if options.peers else ("ours",)
        found = {tool: measure(tool, folder) for tool in tools if installed(tool)}
    mine = found["ours"]
    return 0 if mine and all(same_numbers(tool, mine, of) for tool, of in found.items()) else 1


def installed(tool: str) -> bool:
    there = tool == "ours" or find_spec(PEERS[tool]) is not None
    if not there:
        print(f"{tool}: not installed, so not timed")
    return there


def same_numbers(tool: str, mine: dict[str, float], found: dict[str, float] | None) -> bool:
    """Says how a tool compares with ours; returns whether it came to the same numbers."""
    if found is None:
        return False
    if tool != "ours":
        print(f"{tool}: {found['seconds'] / mine['seconds']:.2f} times our time")
    apart = max(abs(found[key] - mine[key]) for key in _SHOWN)
    if apart > 1e-9:
        print(f"{tool}: OTHER NUMBERS than ours, by up to {apart:.1e}: not the same work")
    return apart <= 1e-9


def measure(tool: str, folder: Path) -> dict[str, float] | None:
    """Returns seconds and scores of a tool, or None after saying how it failed."""
    command = [sys.executable, __file__, "--only", tool, "--folder", str(folder)]
    start = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        print(f"{tool} FAILED ({done.returncode}): {done.stderr.strip()[-1000:]}", flush=True)
        return None
    found = json.loads(done.stdout.strip().splitlines()[-1])
    shown = "  ".join(f"{key} {found[key]:.6f}" for key in _SHOWN)
    print(
        f"{tool:16s} {seconds:7.1f} s  cpu {found['cpu']:6.1f} s  peak {found['peak_gb']:.2f} GB"
        f"  {shown}",
        flush=True,
    )
    return found | {"seconds": seconds}


def report(tool: str, folder: Path) -> dict[str, float]:
    sys.path.insert(0, str(ROOT))
    # Not every tool's threads heed a variable.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    values = {
        "ours": ours, "lvis": official, "faster-coco-eval": faster_coco_eval, "hotcoco": hotcoco,
    }[tool](folder)  # fmt: skip
    used = resource.getrusage(resource.RUSAGE_SELF)
    scores = {key: float(values[key]) for key in _SHOWN}
    return scores | {"cpu": used.ru_utime + used.ru_stime, "peak_gb": used.ru_maxrss / 1e6}


def ours(folder: Path) -> dict[str, float]:
    from dkdetr.data.splits import load_split
    from dkdetr.evaluation.detection_metrics import score
    from dkdetr.evaluation.ground_truth import ground_truth_of
    from dkdetr.evaluation.results import read_results

    started = time.perf_counter()

    def lap(what: str) -> None:
        print(f"{time.perf_counter() - started:7.1f} s: {what}", file=sys.stderr, flush=True)

    truth = ground_truth_of(load_split(f"lvis:{folder}:{folder / 'lvis_val.json'}", folder))
    lap("annotations")
    results = read_results(folder / "results.json")
    lap("results")
    values = score(truth, results).values
    lap("scored")
    return {key: values[key] for key in _SHOWN}


def official(folder: Path) -> dict[str, float]:
    from dkdetr.evaluation.official import import_lvis, numpy_float_alias

    lvis = import_lvis()
    truth = lvis.LVIS(str(folder / "lvis_val.json"))
    found = lvis.LVISResults(truth, str(folder / "results.json"))
    evaluation = lvis.LVISEval(truth, found, "bbox")
    with numpy_float_alias():
        evaluation.run()
    return {key: float(evaluation.results[key]) for key in _SHOWN}


def faster_coco_eval(folder: Path) -> dict[str, float]:
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(str(folder / "lvis_val.json"))
    found = truth.loadRes(str(folder / "results.json"))
    evaluation = COCOeval_faster(truth, found, "bbox", lvis_style=True, print_function=print)
    evaluation.params.maxDets = [300]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = evaluation.stats_as_dict
    return {"AP": values["AP_all"], **{key: values[key] for key in _SHOWN[1:]}}


def hotcoco(folder: Path) -> dict[str, float]:
    import hotcoco

    truth = hotcoco.COCO(str(folder / "lvis_val.json"))
    found = truth.load_res(str(folder / "results.json"))
    evaluation = hotcoco.LVISEval(truth, found, "bbox")
    evaluation.run()
    return evaluation.get_results()


def write_problem(folder: Path, num_images: int, num_detections: int, num_classes: int) -> None:
    """Writes lvis_val.json and results.json: 12 boxes an image, of which detections find most."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    weights = 1 / np.arange(5, num_classes + 5)  # few classes have most boxes, as in LVIS
    weights = rng.permutation(weights / weights.sum())
    images, annotations = [], []
    with (folder / "results.json").open("w") as file:
        file.write("[")
        for image_id in range(1, num_images + 1):
            present = rng.choice(num_classes, size=5, p=weights, replace=False) + 1
            absent = np.setdiff1d(rng.choice(num_classes, size=8, p=weights), present - 1) + 1
            own = present[rng.integers(0, 5, size=12)]
            boxes = random_boxes(rng, 12)
            annotations += [
                {
                    "id": len(annotations) + place,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "area": 0.7 * box[2] * box[3],
                }
                for place, (category_id, box) in enumerate(
                    zip(own.tolist(), boxes.tolist(), strict=True), start=1
                )
            ]
            images.append(
                {
                    "id": image_id,
                    "coco_url": f"http://x/val2017/{image_id:012d}.jpg",
                    "height": 480,
                    "width": 640,
                    "neg_category_ids": absent.tolist(),
                    "not_exhaustive_category_ids": present[:1].tolist(),
                }
            )
            file.write(",\n" if image_id > 1 else "\n")
            others = rng.integers(1, num_classes + 1, size=num_detections)
            file.write(",\n".join(detections(rng, image_id, own, absent, boxes, others)))
        file.write("\n]\n")
    categories = [
        {"id": number, "name": f"name {number}", "frequency": "rcf"[number % 3]}
        for number in range(1, num_classes + 1)
    ]
    document = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "lvis_val.json").write_text(json.dumps(document))


def detections(rng, image_id, own, absent, boxes, others) -> list[str]:
    """Returns one image's records: a third near its boxes, a third of judged classes, a third not.

    A student's detections are so: they crowd around what is there.
    """
    count = len(others)
    near = rng.integers(0, len(own), size=count)
    found = np.where((np.arange(count) % 3 == 0)[:, None], boxes[near], random_boxes(rng, count))
    found *= rng.normal(1, 0.06, size=(count, 4))
    judged = np.concatenate((own, absent))
    labels = np.where(np.arange(count) % 3 == 0, own[near], rng.choice(judged, size=count))
    labels = np.where(np.arange(count) % 3 == 2, others, labels)
    scores = np.sort(rng.random(count))[::-1].round(5)
    return [
        f'{{"image_id":{image_id},"category_id":{label},"bbox":{box},"score":{score}}}'
        for label, box, score in zip(
            labels.tolist(), found.round(2).tolist(), scores.tolist(), strict=True
        )
    ]


def random_boxes(rng, count) -> np.ndarray:
    sides = np.exp(rng.uniform(np.log(10), np.log(300), size=(count, 2)))
    return np.concatenate((rng.uniform(0, 1, size=(count, 2)) * (640, 480) * 0.5, sides), axis=1)


if __name__ == "__main__":
    sys.exit(main())
