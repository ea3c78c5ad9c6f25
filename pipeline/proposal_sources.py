"""The proposal sources that a user can name, prepared once and opened in every worker.

fit            trains a proposal network on the split's base boxes, kept in CACHE/proposals/
fit:CACHE      the network of another cache (a val split uses its train split's)
student:CKPT   a student's own first stage, as in the paper
file:PATH      a COCO results json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dkdetr.engine.checkpoint import find_checkpoint, load_checkpoint, load_student
from dkdetr.errors import DataError, UsageError
from pipeline.proposal_network import NetworkProposals, load_network
from pipeline.proposals import FileProposals, ProposalSource, pack_results

NETWORK_FILE = "proposals/network.safetensors"


@dataclass(frozen=True)
class ProposalSpec:
    """What `--proposals` names; `path` is empty for `fit`."""

    kind: Literal["fit", "student", "file"]
    path: str


def parse_proposals(text: str) -> ProposalSpec:
    """Returns what `--proposals` says; raises UsageError for any other form."""
    kind, _, path = text.partition(":")
    if kind == "fit":
        return ProposalSpec("fit", path)
    if kind in {"student", "file"} and path:
        return ProposalSpec("student" if kind == "student" else "file", path)
    raise UsageError(f"--proposals '{text}' is none of fit, fit:CACHE, student:CKPT, file:PATH")


def prepare_source(spec: ProposalSpec, cache_path: Path) -> str:
    """Returns the prepared form of a source that needs no training: `kind:PATH` for `open_source`.

    Raises:
        DataError: a file, checkpoint or network that is not there.
    """
    if spec.kind == "file":
        return f"packed:{pack_results(Path(spec.path), cache_path / 'proposals').resolve()}"
    if spec.kind == "student":
        return f"student:{find_checkpoint(Path(spec.path)).resolve()}"
    given = Path(spec.path)
    network = given if given.suffix == ".safetensors" else given / NETWORK_FILE
    if not network.is_file():
        raise DataError(
            f"no proposal network in '{given}': it is made by cache-teacher --proposals fit"
        )
    return f"network:{network.resolve()}"


def open_source(prepared: str, device: torch.device, *, batch_size: int) -> ProposalSource:
    """Returns the source that a prepared form names, ready to propose on `device`."""
    kind, _, path = prepared.partition(":")
    if kind == "packed":
        return FileProposals(Path(path))
    if kind == "network":
        trunk, facts = load_network(Path(path))
        return NetworkProposals(
            trunk.to(device),
            image_size=int(facts["image_size"]),
            batch_size=batch_size,
            source="fit",
            seen=facts["seen"],
        )
    assert kind == "student", prepared
    checkpoint = load_checkpoint(Path(path))
    return NetworkProposals(
        load_student(checkpoint).trunk.to(device),
        image_size=checkpoint.config.data.image_size,
        batch_size=batch_size,
        source="student",
        seen={
            "source": "student",
            "experiment": checkpoint.config.name,
            "split": checkpoint.cache_split,
            "iterations": checkpoint.progress.iteration,
            "novel_boxes": "none: students learn from base boxes alone",
        },
    )
