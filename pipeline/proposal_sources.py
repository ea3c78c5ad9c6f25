"""The proposal sources that a user can name, prepared once and opened in every worker.

fit            trains a proposal network on the split's base boxes, kept in CACHE/proposals/
fit:CACHE      the network of another cache (a val split uses its train split's)
student:PLACE  a student's own first stage, as in the paper: of a run, a checkpoint, a student file
file:PATH      a COCO results json or mmdet's pickled list: see pipeline.file_proposals
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from cache.lock import Lease
from dkdetr.data.splits import Split
from dkdetr.engine.checkpoint import find_checkpoint, load_checkpoint, load_student
from dkdetr.engine.run_folder import RunFolder
from dkdetr.errors import DataError, UsageError
from dkdetr.student.attention_backend import Backend, use_backend
from dkdetr.student_file import STUDENT_SUFFIX, build_trunk_from_file, load_student_file
from pipeline.file_proposals import FileOptions, FileProposals, pack_file, parse_file_options
from pipeline.proposal_network import NetworkProposals, load_network
from pipeline.proposals import ProposalSource

NETWORK_FILE = "proposals/network.safetensors"
REMADE_FILE = "proposals/remade.safetensors"
"""Of a repair: what `fit` has trained anew, until it is known to be the network that was lost."""


@dataclass(frozen=True)
class ProposalSpec:
    """What `--proposals` names; `path` is empty for `fit`."""

    kind: Literal["fit", "student", "file"]
    path: str
    options: FileOptions = field(default_factory=FileOptions)

    @property
    def trains(self) -> bool:
        """True if the network has to be made first."""
        return self.kind == "fit" and not self.path

    def trains_in(self, out: Path) -> bool:
        """Returns True if it has to be made and a cache's folder has none yet, fitting or not."""
        return self.trains and not (out / NETWORK_FILE).is_file()

    def require(self) -> None:
        """Raises DataError if what is named is not there; looks, and reads nothing."""
        path = Path(self.path)
        if self.kind == "student":
            _student_place(path)
        elif self.kind == "file" and not path.is_file():
            raise DataError(f"proposals '{path}': no such file")
        elif self.kind == "fit" and self.path:
            _network_file(path)


def parse_proposals(text: str) -> ProposalSpec:
    """Returns what `--proposals` says; raises UsageError for any other form."""
    kind, _, path = text.partition(":")
    if kind == "fit":
        return ProposalSpec("fit", path)
    if kind == "student" and path:
        return ProposalSpec("student", path)
    if kind == "file" and path:
        return ProposalSpec("file", *parse_file_options(path))
    raise UsageError(f"--proposals '{text}' is none of fit, fit:CACHE, student:PLACE, file:PATH")


def prepare_source(spec: ProposalSpec, cache_path: Path, split: Split) -> str:
    """Returns the prepared form of a source that needs no training: `kind:PATH` for `open_source`.

    Raises:
        DataError: a file, checkpoint or network that is not there.
        CacheLockedError: a file is to be packed where another process writes.
    """
    if spec.kind == "file":
        alone = partial(_alone_in, cache_path)
        folder = cache_path / "proposals"
        packed = pack_file(Path(spec.path), spec.options, split, folder, alone=alone)
        return f"packed:{packed.resolve()}"
    if spec.kind == "student":
        place = _student_place(Path(spec.path))
        # A hub's cache links to files without an ending, by which a student file is known.
        is_file = place.suffix == STUDENT_SUFFIX
        return f"student:{place.absolute() if is_file else place.resolve()}"
    return f"network:{_network_file(Path(spec.path)).resolve()}"


@contextmanager
def _alone_in(cache_path: Path) -> Iterator[None]:
    """Holds a cache's lease: who has it sweeps away what others have only half written there."""
    cache_path.mkdir(parents=True, exist_ok=True)
    with Lease(cache_path):
        yield


def _network_file(given: Path) -> Path:
    network = given if given.suffix == ".safetensors" else given / NETWORK_FILE
    if not network.is_file():
        raise DataError(
            f"no proposal network in '{given}': it is made by cache-teacher --proposals fit"
        )
    return network


def _student_place(given: Path) -> Path:
    if given.suffix != STUDENT_SUFFIX:
        return find_checkpoint(given)
    if not given.is_file():
        raise DataError(f"proposals '{given}': no such student file")
    return given


def open_source(
    prepared: str, device: torch.device, *, batch_size: int, backend: Backend = "auto"
) -> ProposalSource:
    """Returns the source that a prepared form names, ready to propose on `device`.

    Args:
        prepared: by `prepare_source`.
        device: where a network computes.
        batch_size: images at once through a network.
        backend: of a network's deformable attention (`ops.backend`).

    Raises:
        UsageError: the backend is "triton", which cannot run there.
    """
    kind, _, path = prepared.partition(":")
    saw_boxes_of = None
    if kind == "packed":
        return FileProposals(Path(path))
    if kind == "network":
        trunk, facts = load_network(Path(path))
        seen, source = facts["seen"], "fit"
        image_size, names = int(facts["image_size"]), tuple(seen["names"])
        details = {key: value for key, value in seen.items() if key != "names"}
    elif path.endswith(STUDENT_SUFFIX):
        file = load_student_file(Path(path))
        trunk, source = build_trunk_from_file(Path(path), file), "student"
        image_size = file.config.data.image_size
        saw_boxes_of = file.provenance.get("saw_boxes_of")
        names = file.vocabulary.base().names if file.vocabulary is not None else ()
        split = file.provenance.get("train_split")
        details = {"experiment": file.config.name, **({"split": split} if split else {})}
    else:
        assert kind == "student", prepared
        checkpoint = load_checkpoint(Path(path))
        trunk, source = load_student(checkpoint).trunk, "student"
        image_size, names = checkpoint.config.data.image_size, checkpoint.vocabulary.base().names
        details = {
            "split": checkpoint.cache_split,
            "experiment": checkpoint.config.name,
            "iterations": checkpoint.progress.iteration,
        }
        run = RunFolder.of_checkpoint(Path(path))
        saw_boxes_of = run.read_provenance().get("saw_boxes_of")
    use_backend(trunk, backend, device)
    return NetworkProposals(
        trunk.to(device),
        image_size=image_size,
        batch_size=batch_size,
        source=source,
        names=names,
        details=details,
        saw_boxes_of=saw_boxes_of,
    )
