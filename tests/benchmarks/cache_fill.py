"""Crops a second through `cache-teacher`, beside the encoder alone and the usual way.

The usual way: Pillow opens the picture and cuts each crop, open_clip's own preprocessing makes it a
tensor, a DataLoader batches one picture at a time, and the vectors go into one file a picture. All
three on the same pictures, boxes, teacher and device, in one run. The teacher is loaded, and
compiled, once before anything is timed, and the command has run once on a shard: what a first run
builds (kernels, decoders) is not counted. The usual way's loader processes start within its time.

On a CPU time is that of the process (without loader processes of the usual way), so that a busy
machine changes little; on a GPU it is the clock's.

python -m tests.benchmarks.cache_fill [--teacher MODEL:WEIGHTS] [--images 48] [--boxes 4]
    [--decoder auto] [--encoder compiled]    # the target's, on a GPU
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import open_clip
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dkdetr.data.coco_names import OVCOCO_BASE, OVCOCO_NOVEL  # noqa: E402
from dkdetr.data.image_files import decode_image  # noqa: E402
from pipeline.build import cache_teacher  # noqa: E402
from pipeline.crops import CropRule, crop_windows  # noqa: E402
from pipeline.decoding import (  # noqa: E402
    DecoderChoice,
    EncodedImage,
    choose_decoder,
    decode_on_device,
)
from pipeline.fused_tower import can_be_fused  # noqa: E402
from pipeline.picture_upload import on_device as uploaded  # noqa: E402
from pipeline.proposals import SourceImage  # noqa: E402
from pipeline.request import CacheRequest  # noqa: E402
from pipeline.resampling import cut_by_kernel, cut_one_by_one, cut_together  # noqa: E402
from pipeline.teacher import load_teacher  # noqa: E402
from pipeline.teacher_model import Teacher, usual_batch  # noqa: E402
from pipeline.window_fit import Look  # noqa: E402
from tests.benchmarks.machine import describe  # noqa: E402

HEIGHT, WIDTH = 480, 640
SHARD = 16  # images; the least that a cache is divided into


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", default="ViT-B-32-quickgelu:random")
    parser.add_argument("--images", type=int, default=48, help="more than 16")
    parser.add_argument("--boxes", type=int, default=4, help="of an image")
    parser.add_argument("--crop-batch", type=int, help="default: the command's")
    parser.add_argument("--decoder", choices=get_args(DecoderChoice), default="pillow")
    parser.add_argument(
        "--encoder", choices=("auto", "open_clip", "fused", "compiled"), default="auto"
    )
    parser.add_argument("--workers", type=int, default=0, help="loader processes; with a GPU only")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--repeats", type=int, default=2, help="the best counts")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.workers and device == "cpu":
        parser.error("--workers: their time would not be counted on a CPU")
    print(describe("torch", "torchvision", "open_clip_torch", "pillow"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        boxes = write_pictures(root, options.images, options.boxes)
        teacher = load_teacher(options.teacher, device, encoder=options.encoder)
        batch = options.crop_batch or usual_batch(teacher.device)
        crops = options.images * options.boxes * len(CropRule().scales)
        print(
            f"{options.teacher} on {device}, {teacher.precision}; JPEG {WIDTH}x{HEIGHT}, ", end=""
        )
        print(f"{options.boxes} boxes x {len(CropRule().scales)} scales, {crops} crops; ", end="")
        unit = "a second" if device == "cuda" else "a CPU-second"
        print(f"crops {unit}, best of {options.repeats}")
        print("| what | crops | of the encoder alone |\n|---|---|---|")
        ceiling = max(encoder_rate(teacher, batch, crops) for _ in range(options.repeats))
        print(f"| encoder alone ({teacher.encoder}), batches of {batch} | {ceiling:.1f} | 1.00 |")
        fill(root, root / "warm", "one_shard", options, teacher, batch)  # kernels, nvJPEG
        ours = max(
            fill_rate(root, root / f"cache{number}", options, teacher, batch)
            for number in range(options.repeats)
        )
        what = "cache-teacher: decode, crop, encode, write, "
        decoder = choose_decoder(options.decoder, teacher.device)
        what += f"--decoder {decoder} --encoder {teacher.encoder}"
        print(f"| {what} | {ours:.1f} | {ours / ceiling:.2f} |")
        print(f"\n| part, by itself | {unit} |\n|---|---|")
        for part, rate in part_rates(root, boxes, teacher, options.teacher, batch):
            print(f"| {part} | {rate:,.1f} |")
        usual = max(
            usual_rate(root, boxes, teacher, options.workers, number)
            for number in range(options.repeats)
        )
    print(
        f"\nthe usual way, {options.workers} loader processes: {usual:.1f} crops {unit}; ", end=""
    )
    print(f"cache-teacher is {ours / usual:.2f} times as fast")


def write_pictures(root: Path, num_images: int, num_boxes: int) -> dict[int, np.ndarray]:
    """Writes noisy JPEGs, an annotation file and proposals; returns boxes (xyxy) by image id."""
    random = np.random.default_rng(0)
    (root / "images").mkdir()
    images: list[dict[str, Any]] = []
    proposals: list[dict[str, Any]] = []
    boxes_of: dict[int, np.ndarray] = {}
    for number in range(1, num_images + 1):
        small = random.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        name = f"{number}.jpg"
        Image.fromarray(small).resize((WIDTH, HEIGHT)).save(root / "images" / name, quality=90)
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        # One a cell of a grid, so that NMS keeps them all.
        columns = int(np.ceil(np.sqrt(num_boxes)))
        cell = np.array([WIDTH, HEIGHT]) / columns
        at = np.array([divmod(index, columns)[::-1] for index in range(num_boxes)])
        low = at * cell + random.uniform(0, 0.2, (num_boxes, 2)) * cell
        size = random.uniform(0.5, 0.8, (num_boxes, 2)) * cell
        boxes_of[number] = np.concatenate([low, low + size], axis=1).astype(np.float32)
        proposals += [
            {"image_id": number, "bbox": [*map(float, corner), *map(float, side)], "score": score}
            for corner, side, score in zip(
                low, size, np.linspace(0.9, 0.1, num_boxes).tolist(), strict=True
            )
        ]
    names = sorted(OVCOCO_BASE | OVCOCO_NOVEL)
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    for part, count in (("one_shard", SHARD), ("train", num_images)):
        objects = [_an_object(image["id"], boxes_of[image["id"]][0]) for image in images[:count]]
        document = {"images": images[:count], "annotations": objects, "categories": categories}
        (root / f"{part}.json").write_text(json.dumps(document))
    (root / "proposals.json").write_text(json.dumps(proposals))
    return boxes_of


def _an_object(image_id: int, box: np.ndarray) -> dict[str, Any]:
    x1, y1, x2, y2 = (float(side) for side in box)
    bbox = [x1, y1, x2 - x1, y2 - y1]
    person = sorted(OVCOCO_BASE | OVCOCO_NOVEL).index("person") + 1
    return {"id": image_id, "image_id": image_id, "category_id": person, "bbox": bbox, "iscrowd": 0}


def fill_rate(
    root: Path, out: Path, options: argparse.Namespace, teacher: Teacher, batch: int
) -> float:
    """Returns the rate of `cache-teacher` over all but one shard's images.

    The same command on one shard's pictures has the same start (canary, names), which so falls out
    of the difference. The crops of whole pictures and base objects count too.
    """
    took = [
        seconds(lambda part=part: fill(root, out / part, part, options, teacher, batch))
        for part in ("one_shard", "train")
    ]
    windows = (options.boxes + 1) * len(CropRule().scales) + 1
    return (options.images - SHARD) * windows / (took[1] - took[0])


def fill(
    root: Path, out: Path, part: str, options: argparse.Namespace, teacher: Teacher, batch: int
) -> None:
    """Runs `cache-teacher` on a part of the pictures, with a teacher that is loaded already."""
    request = CacheRequest(
        split=f"ovcoco:{root / 'images'}:{root / f'{part}.json'}",
        out=out,
        teacher=options.teacher,
        proposals=f"file:{root / 'proposals.json'}",
        prompts="single",
        keep=options.boxes,
        crop_batch=batch,
        decoder=options.decoder,
        encoder=teacher.encoder,
        neighbors=False,
    )
    with patch("pipeline.build.load_teacher", lambda *_given, **_how: teacher):
        cache_teacher(request)


def encoder_rate(teacher: Teacher, batch: int, crops: int) -> float:
    """Returns the rate of the encoder on crops that are ready."""
    height, width = teacher.preprocessing.size_hw
    ready = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
    ready = ready.to(teacher.device)
    teacher.features_on_device(ready)
    rounds = max(1, crops // batch)

    def run() -> None:
        for _ in range(rounds):
            teacher.features_on_device(ready)

    return batch * rounds / seconds(run)


def part_rates(
    root: Path, boxes: dict[int, np.ndarray], teacher: Teacher, spec: str, batch: int
) -> Iterator[tuple[str, float]]:
    """Yields pictures and crops a second of what `cache-teacher` does one after the other."""
    paths = [root / "images" / f"{number}.jpg" for number in sorted(boxes)]
    encoded = [EncodedImage(path.read_bytes(), path, (HEIGHT, WIDTH)) for path in paths]

    def by_pillow() -> list[np.ndarray]:
        return [decode_image(e.data, e.path, expected_hw=e.expected_hw) for e in encoded]

    def on_device() -> list[Any]:
        starts = range(0, len(encoded), 8)
        chunks = (decode_on_device(encoded[at : at + 8], teacher.device) for at in starts)
        return [pixels for chunk in chunks for pixels in chunk]

    yield "JPEGs, Pillow, one thread", len(paths) / seconds(by_pillow)
    on_gpu = teacher.device.type == "cuda"
    if not on_gpu or choose_decoder("auto", teacher.device) == "torchvision":
        on_device()
        yield f"JPEGs, torchvision on {teacher.device}", len(paths) / seconds(on_device)
    chunk = [SourceImage(number, pixels) for number, pixels in enumerate(by_pillow()[:8])]
    if on_gpu:
        uploaded(chunk, teacher.device)
        rounds = 20
        took = seconds(lambda: [uploaded(chunk, teacher.device) for _ in range(rounds)])
        yield "decoded pictures to the GPU, 8 in one copy", rounds * len(chunk) / took
    pixels = [torch.as_tensor(each.pixels).permute(2, 0, 1).contiguous()
              for each in uploaded(chunk, teacher.device)]  # fmt: skip
    windows = [crop_windows(boxes[number], CropRule(), height=HEIGHT, width=WIDTH).reshape(-1, 4)
               for number in sorted(boxes)[:8]]  # fmt: skip
    for way, cut in ways_to_cut(teacher, pixels, windows).items():
        cut()
        yield f"crops cut, {way}", sum(len(each) for each in windows) / seconds(cut)
    kinds = ["open_clip"]
    if can_be_fused(teacher._model.visual):  # type: ignore[attr-defined]
        kinds += ["fused", *(["compiled"] if torch.cuda.is_available() else [])]
    for kind in kinds:
        other = teacher
        if kind != teacher.encoder:
            other = load_teacher(spec, teacher.device, encoder=kind)
        rounds = 100 if torch.cuda.is_available() else 4
        yield f"crops encoded, --encoder {kind}", encoder_rate(other, batch, rounds * batch)


def ways_to_cut(
    teacher: Teacher, pixels: list[torch.Tensor], windows: list[np.ndarray]
) -> dict[str, Callable[[], object]]:
    """Returns by name what cuts all windows on the teacher's device."""
    how = teacher.preprocessing
    look = Look(how.size_hw, "squash", how.interpolation, how.fill)
    if teacher.device.type != "cuda":
        return {
            "torchvision, one by one": lambda: [
                cut_one_by_one(each, mine, look) for each, mine in zip(pixels, windows, strict=True)
            ]
        }
    return {
        "Triton kernels": lambda: list(cut_by_kernel(pixels, windows, look)),
        "products of matrices": lambda: list(
            cut_together(pixels, windows, look, dtype=torch.float16)
        ),
    }


class UsualCrops(torch.utils.data.Dataset[Any]):
    """A picture's crops as CLIP users make them."""

    def __init__(self, folder: Path, boxes: dict[int, np.ndarray], preprocess: Any) -> None:
        self._folder, self._boxes, self._preprocess = folder, boxes, preprocess
        self._ids = sorted(boxes)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        number = self._ids[index]
        picture = Image.open(self._folder / f"{number}.jpg").convert("RGB")
        windows = crop_windows(self._boxes[number], CropRule(), height=HEIGHT, width=WIDTH)
        crops = [self._preprocess(picture.crop(tuple(w))) for w in windows.reshape(-1, 4).tolist()]
        return number, torch.stack(crops)


def usual_rate(
    root: Path, boxes: dict[int, np.ndarray], teacher: Teacher, workers: int, number: int
) -> float:
    """Returns the rate of the usual way."""
    how = teacher.preprocessing
    preprocess = open_clip.image_transform(
        how.size_hw, is_train=False, mean=how.mean, std=how.std, interpolation=how.interpolation
    )
    dataset = UsualCrops(root / "images", boxes, preprocess)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
    )  # fmt: skip
    out = root / f"usual{number}"
    out.mkdir()
    model = teacher._model

    @torch.inference_mode()
    def run() -> None:
        for image_id, crops in loader:
            features = model.encode_image(crops.to(teacher.device))
            unit = torch.nn.functional.normalize(features.float(), dim=-1)
            mean = unit.reshape(len(boxes[image_id]), -1, unit.shape[1]).mean(1)
            rows = torch.nn.functional.normalize(mean, dim=-1)
            np.save(out / f"{image_id}.npy", rows.cpu().numpy().astype(np.float16))

    return len(boxes) * len(next(iter(boxes.values()))) * len(CropRule().scales) / seconds(run)


def seconds(function: Callable[[], object]) -> float:
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a warm-up may still be under way
    start = clock()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
