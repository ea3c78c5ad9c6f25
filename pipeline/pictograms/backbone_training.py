"""Pre-trains the slim ResNet that ships with the package, on the drawings left without a name.

    python -m pipeline.pictograms.backbone_training

It learns to tell apart drawings that the benchmark never names (faces, flags, symbols, ...), as
ImageNet weights have seen a world that is not the detection data set's.
"""

import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from dkdetr.progress import progress
from dkdetr.student.backbone import Backbone, slim_resnet
from pipeline.pictograms.asset_training import Descent, Recipe, asset_parser, recipe_of, write_log
from pipeline.pictograms.crop_pool import CropPool, jittered_windows, make_pool, soften
from pipeline.pictograms.drawings import leftover_drawings, render_style
from pipeline.pictograms.teacher_assets import assets_folder, backbone_weights_path, save_half

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CROP_SIZES = (40, 48, 64)
"""Objects of a scene are 16 to 76 pixels: the backbone meets them small and large."""

_WIDTH = 32
_CLASSIFIED_STAGES = (4, 5)
_FRESH_SEED = 7002


class Classifier(nn.Module):
    """The backbone with a linear classifier on the pooled map of each of its last two stages."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(nn.Linear(c, num_classes) for c in backbone.num_channels)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Returns logits [batch, num_classes] of every classified stage."""
        maps = self.backbone(pixels)
        return [head(x.mean(dim=(2, 3))) for head, x in zip(self.heads, maps, strict=True)]


def main() -> None:
    """Trains, measures on fresh crops, writes the weights and a log of the measurements."""
    parser = asset_parser(__doc__, out=backbone_weights_path(), batch_size=128, seed=1)
    parser.add_argument("--log", type=Path, default=assets_folder() / "backbone_training.log")
    arguments = parser.parse_args()
    recipe = recipe_of(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    drawings = [each for each in leftover_drawings() if render_style(each, "full") is not None]
    backbone = slim_resnet(
        weights="random",
        norm="batch",
        frozen_stages=0,
        used_stages=_CLASSIFIED_STAGES,
        width=_WIDTH,
    )
    model = Classifier(backbone, len(drawings))
    started = time.process_time()
    pool = make_pool(drawings, recipe.crops, seed=recipe.seed, held_out_style=False, title="crops")
    rendered = time.process_time()
    train(model, pool, recipe)
    trained = time.process_time()
    fresh = make_pool(drawings, 2000, seed=_FRESH_SEED, held_out_style=False, title="fresh crops")
    log = {
        **asdict(recipe),
        "cpu_seconds": {"crops": round(rendered - started), "steps": round(trained - rendered)},
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "drawings": len(drawings),
        "fresh_top1_by_stage": accuracy(model, fresh),
    }
    save_half(backbone.state_dict(), arguments.out)
    write_log(arguments.log, log)


def train(model: Classifier, pool: CropPool, recipe: Recipe) -> None:
    """Trains in place, with one crop size a batch."""
    generator = torch.Generator().manual_seed(recipe.seed)
    descent = Descent(model, recipe)
    model.train()
    model.to(memory_format=torch.channels_last)
    with progress("backbone", recipe.steps) as advance:
        for step in range(recipe.steps):
            indices = torch.randint(len(pool.labels), (recipe.batch_size,), generator=generator)
            windows = jittered_windows(pool.boxes_xyxy[indices], generator)
            size = _CROP_SIZES[step % len(_CROP_SIZES)]
            pixels = soften(pool.cut(indices, windows, size), generator)
            labels = pool.labels[indices]
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                by_stage = model(_normalised(pixels))
            losses = [nn.functional.cross_entropy(each.float(), labels) for each in by_stage]
            loss = torch.stack(losses).mean()
            recent = descent.step(loss)
            advance(step + 1, f"loss {recent:.3f}")


@torch.inference_mode()
def accuracy(model: Classifier, pool: CropPool) -> dict[str, float]:
    """Returns top-1 accuracy of every classified stage on the pool's boxes."""
    model.eval()
    hits = torch.zeros(len(model.heads))
    for indices in torch.arange(len(pool.labels)).split(256):
        logits = model(_normalised(pool.cut(indices, pool.boxes_xyxy[indices], _CROP_SIZES[-1])))
        for place, row in enumerate(logits):
            hits[place] += (row.argmax(-1) == pool.labels[indices]).sum()
    shares = (hits / len(pool.labels)).tolist()
    return {f"C{n}": round(share, 3) for n, share in zip(_CLASSIFIED_STAGES, shares, strict=True)}


def _normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (_MEAN, _STD))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
