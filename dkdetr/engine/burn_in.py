"""`train --from`: begins a run with another run's burn-in, so that ablations share it.

A burn-in checkpoint is one that has not distilled yet. A run with `kd.start_epoch` above 0 keeps
the one at the edge as `checkpoints/burn_in.pt`; `train --until EPOCH` makes one on purpose.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import AdamW

from dkdetr.config import ExperimentConfig
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.engine.checkpoint import Checkpoint
from dkdetr.errors import MismatchError
from dkdetr.experiment_file import deciding_settings
from dkdetr.student.detector import DKDETR, KD_PREFIX

BURN_IN_FILE = "burn_in.pt"

_SAME_ALWAYS = ("student.", "classifier.")
# In mid-epoch the next batch must be the one that this checkpoint's run would have taken.
_SAME_IN_MID_EPOCH = ("data.batch_size", "data.sampler", "data.repeat_threshold", "seed")
# Where weights began is past.
_ANY = ("student.weights", "student.backbone.weights")


def check_burn_in(checkpoint: Checkpoint, config: ExperimentConfig, vocabulary: Vocabulary) -> None:
    """Returns if a run of `config` may begin with the checkpoint.

    Raises:
        MismatchError: it has distilled, lies behind the new run's burn-in, or differs in a
            setting of the student, in the vocabulary or (in mid-epoch) in the order of its
            samples; names the first difference.
    """
    at = checkpoint.progress
    before, now = deciding_settings(checkpoint.config), deciding_settings(config)
    wanted = _SAME_ALWAYS if at.batch == 0 else (*_SAME_ALWAYS, *_SAME_IN_MID_EPOCH)
    for key in sorted(before.keys() | now.keys()):
        if key.startswith(wanted) and key not in _ANY and before.get(key) != now.get(key):
            raise MismatchError(
                f"the burn-in was trained with {key}={before.get(key, 'absent')}, this run has "
                f"{now.get(key, 'absent')}: set it to the burn-in's value"
            )
    if checkpoint.vocabulary.hash != vocabulary.hash:
        raise MismatchError(
            f"the burn-in was trained on vocabulary {checkpoint.vocabulary.hash} "
            f"({checkpoint.vocabulary.teacher}), this cache holds {vocabulary.hash} "
            f"({vocabulary.teacher}): its classifier would mean nothing here"
        )
    kd = checkpoint.config.kd
    if kd.has_start and (at.epoch, at.batch) > (kd.start_epoch, 0):
        raise MismatchError(
            f"this checkpoint has distilled since epoch {kd.start_epoch} (it is at epoch "
            f"{at.epoch}, batch {at.batch}): take {BURN_IN_FILE} of its folder"
        )
    if config.kd.has_start and (at.epoch, at.batch) > (config.kd.start_epoch, 0):
        raise MismatchError(
            f"kd.start_epoch={config.kd.start_epoch} lies before the burn-in's end (epoch "
            f"{at.epoch}, batch {at.batch}): set kd.start_epoch={at.epoch + (at.batch > 0)}"
        )


def take_over(checkpoint: Checkpoint, student: DKDETR, optimizer: AdamW) -> None:
    """Fills the student and the optimiser; what belongs to distillation keeps its fresh start."""
    student.load_state_dict(_without_kd(checkpoint.student, student.state_dict()))
    theirs = _by_name(checkpoint.optimizer)
    mine = optimizer.state_dict()
    names = [name for group in mine["param_groups"] for name in group["param_names"]]
    state = {
        index: theirs[name]
        for index, name in enumerate(names)
        if name in theirs and not name.startswith(KD_PREFIX)
    }
    optimizer.load_state_dict({"state": state, "param_groups": mine["param_groups"]})


def averaged_start(checkpoint: Checkpoint, student: DKDETR) -> dict[str, Tensor]:
    """Returns where a running average begins: the burn-in's own, else its weights."""
    return _without_kd(checkpoint.average or checkpoint.student, student.state_dict())


def _without_kd(taken: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the taken state with the fresh one's distillation part, or none if it has none."""
    kept = {name: value for name, value in taken.items() if not name.startswith(KD_PREFIX)}
    return kept | {name: value for name, value in fresh.items() if name.startswith(KD_PREFIX)}


def _by_name(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
    return {name: optimizer["state"][i] for i, name in enumerate(names) if i in optimizer["state"]}
