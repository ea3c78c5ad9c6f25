"""The list of a run's starts in its `run.json`: one that goes on leaves a trace too."""

import json
import platform
from datetime import UTC, datetime

import torch

from dkdetr.atomic_file import write_text
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.run_folder import RunFolder, describe_machine
from dkdetr.installation import nvidia_driver, package_versions, source_commit


def note_start(run: RunFolder, ranks: Ranks, iteration: int) -> None:
    """Adds when, where and with what a run starts to its record, which changes whole or not at all.

    A record of an earlier version has no such list, and gets one that begins here.

    Args:
        run: its record is there.
        ranks: the first rank's place, who alone writes.
        iteration: steps taken before.
    """
    on_gpu = ranks.device.type == "cuda"
    start = {
        "when": datetime.now(tz=UTC).isoformat(timespec="seconds"),
        "iteration": iteration,
        "host": platform.node(),
        **describe_machine(ranks.device),
        "world_size": ranks.world_size,
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": nvidia_driver() if on_gpu else None,
        "commit": source_commit(),
        "packages": package_versions(),
    }
    record = run.read_provenance()
    starts = [*record.get("starts", []), start]
    write_text(run.provenance, json.dumps({**record, "starts": starts}, indent=2) + "\n")
