"""Pre-trains the slim ResNet that ships with the package, on the drawings left without a name.

    python -m pipeline.pictograms.backbone_training

It learns to tell apart drawings that the benchmark never names (faces, flags, symbols, ...), as
ImageNet weights have seen a world that is not the detection data set's.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from dkdetr.progress import progress
from dkdetr.student.backbone import Backbone, slim_resnet
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=backbone_weights_path())
    parser.add_argument("--log", type=Path, default=assets_folder() / "backbone_training.log")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--crops", type=int, default=48000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="faster where the processor has it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
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
    pool = make_pool(
        drawings, arguments.crops, seed=arguments.seed, held_out_style=False, title="crops"
    )
    rendered = time.process_time()
    train(
        model, pool, steps=arguments.steps, batch_size=arguments.batch_size, lr=arguments.lr,
        seed=arguments.seed, bf16=arguments.bf16,
    )  # fmt: skip
    trained = time.process_time()
    fresh = make_pool(drawings, 2000, seed=_FRESH_SEED, held_out_style=False, title="fresh crops")
    log = {
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "crops": arguments.crops,
        "lr": arguments.lr,
        "seed": arguments.seed,
        "bf16": arguments.bf16,
        "cpu_seconds": {"crops": round(rendered - started), "steps": round(trained - rendered)},
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "drawings": len(drawings),
        "fresh_top1_by_stage": accuracy(model, fresh),
    }
    save_half(backbone.state_dict(), arguments.out)
    text = json.dumps(log, indent=2)
    arguments.log.write_text(text + "\n", encoding="utf-8")
    print(text)


def train(
    model: Classifier, pool: CropPool,
    *, steps: int, batch_size: int, lr: float, seed: int, bf16: bool,
) -> None:  # fmt: skip
    """Trains in place, with one crop size a batch."""
    generator = torch.Generator().manual_seed(seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    model.to(memory_format=torch.channels_last)
    recent = 0.0
    with progress("backbone", steps) as advance:
        for step in range(steps):
            indices = torch.randint(len(pool.labels), (batch_size,), generator=generator)
            windows = jittered_windows(pool.boxes_xyxy[indices], generator)
            size = _CROP_SIZES[step % len(_CROP_SIZES)]
            pixels = soften(pool.cut(indices, windows, size), generator)
            labels = pool.labels[indices]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                by_stage = model(_normalised(pixels))
            losses = [nn.functional.cross_entropy(each.float(), labels) for each in by_stage]
            loss = torch.stack(losses).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            recent = 0.95 * recent + 0.05 * loss.item() if step else loss.item()
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
