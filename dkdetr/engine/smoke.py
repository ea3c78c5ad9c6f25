"""`train --smoke`: every phase of a run on 8 images, so that a mistake shows in a minute."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from dkdetr.config import ExperimentConfig, RelationalKDConfig
from dkdetr.engine.checkpoint import load_latest, open_checkpoint
from dkdetr.engine.distributed import is_first_rank, num_ranks
from dkdetr.engine.run_folder import RunFolder
from dkdetr.engine.train import TrainSummary, train
from dkdetr.engine.train_request import TrainRequest, Watch
from dkdetr.errors import UsageError

_IMAGES = 8


def smoke(request: TrainRequest) -> TrainSummary:
    """Returns after burn-in, learning-rate step, distillation, a checkpoint and a resumed start.

    The student, the precision and the size of the pictures are the experiment's; epochs are two
    of 8 images. It begins with a burn-in of its own, of another one sees that it can be opened, and
    trackers see nothing of it. The folder RUN-smoke is removed if all went well.

    Raises:
        UsageError: more ranks than images.
        DkdetrError: `start_from` names nothing that a training could begin with.
    """
    config = _shortened(request.config, num_ranks())
    if request.start_from is not None:
        open_checkpoint(request.start_from)
    folder = Path(f"{request.run}-smoke")
    first = is_first_rank()
    if first:
        shutil.rmtree(folder, ignore_errors=True)
    small = replace(
        request,
        config=config,
        run=folder,
        image_limit=_IMAGES,
        until_epoch=None,
        start_from=None,
        watch=Watch(),
    )
    steps = _IMAGES // config.data.batch_size
    cut = steps + steps // 2  # in the middle of distillation
    train(replace(small, until_iteration=cut))
    summary = train(small)
    if first:
        found = load_latest(RunFolder(folder).checkpoints)
        assert found is not None
        assert found[1].progress.epoch == config.optim.epochs
        shutil.rmtree(folder)
        print(
            f"smoke: {summary.iterations} steps on {_IMAGES} images: burn-in, "
            f"{'distillation, ' if config.kd.enabled else ''}a learning-rate step, checkpoints and "
            "a resumed start went well",
            file=sys.stderr,
        )
    return summary


def _shortened(config: ExperimentConfig, ranks: int) -> ExperimentConfig:
    least = ranks * config.compute.micro_batches
    if least > _IMAGES:
        raise UsageError(
            f"--smoke has {_IMAGES} images, too few for {ranks} ranks times "
            f"compute.micro_batches={config.compute.micro_batches}: use fewer of them"
        )
    # As many images a rank as the experiment has, if 8 images make two steps of them.
    batch_size = max(least, min(config.data.batch_size, _IMAGES // 2) // least * least)
    return replace(
        config,
        checkpoint_every_s=0.0,
        kd=replace(config.kd, start_epoch=1, rkd=_with_company(config, batch_size // least)),
        data=replace(config.data, batch_size=batch_size, sampler="uniform"),
        optim=replace(config.optim, epochs=2, lr_drop_epochs=(1,), warmup_iterations=1),
    )


def _with_company(config: ExperimentConfig, share: int) -> RelationalKDConfig:
    """Returns RKD with a place for a related image, if it has any and `share` images leave one."""
    rkd = config.kd.rkd
    if rkd.neighbor_fraction == 0:
        return rkd
    return replace(rkd, neighbor_fraction=max(rkd.neighbor_fraction, 1 / share) if share > 1 else 0)
