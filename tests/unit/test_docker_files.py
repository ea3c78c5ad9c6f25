"""Cluster templates: whole, parsed, and the requeue logic run with stand-ins for Slurm."""

import os
import re
import signal
import stat
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.url_weights import url_weights_folder

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
TEMPLATES = sorted((DOCKER / "slurm").glob("*.sbatch"))


def test_the_image_has_its_three_targets() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    assert re.findall(r"^FROM \S+ AS (\w+)", text, re.MULTILINE) == ["base", "cpu", "cuda", "v100"]
    # Triton builds its launcher with a C compiler, torch.compile its kernels for the CPU.
    assert re.search(r"apt-get install .*\bgcc g\+\+ libc6-dev\b", text)
    copied = re.findall(r"^COPY ([\w.]+)", text, re.MULTILINE)
    assert all((ROOT / name).exists() for name in copied)


def test_compose_runs_a_scheduler_workers_and_the_stage() -> None:
    described = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = described["services"]
    assert set(services) == {"scheduler", "worker", "cache-teacher"}
    assert not any("ports" in each for each in services.values()), "no port leaves the network"
    assert services["cache-teacher"]["command"][0] == "cache-teacher"
    assert services["worker"]["command"][0] == "tcp://scheduler:8786"
    # Stage 1 plans for the device that the workers have, and trains its proposal network.
    assert services["cache-teacher"]["deploy"] == services["worker"]["deploy"]
    assert services["cache-teacher"]["shm_size"]
    assert all((DOCKER / each["build"]["context"] / each["build"]["dockerfile"]).is_file()
               for each in services.values())  # fmt: skip


def test_what_is_downloaded_lies_in_the_volume_that_is_mounted(monkeypatch) -> None:
    text = (DOCKER / "Dockerfile").read_text()
    for name, value in re.findall(r"\b(HF_HOME|TORCH_HOME)=(\S+)", text):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", "/root")
    described = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    volume = described["volumes"]["weights"]["name"]
    mounts = [each["volumes"] for each in described["services"].values()]
    (place,) = {mount.split(":")[1] for each in mounts for mount in each if "weights:" in mount}
    assert all(f"weights:{place}" in each for each in mounts)
    # What huggingface_hub makes of HF_HOME is settled at its import.
    for folder in (Path(os.environ["HF_HOME"]), url_weights_folder(), Path(torch.hub.get_dir())):
        assert folder.is_relative_to(place)
    page = (DOCKER / "README.md").read_text()
    runs = re.findall(r"docker run [^`]*?dkdetr (?:fetch|doctor|serve|\\)", page)
    assert len(runs) == 4
    assert all(f"-v {volume}:{place}" in each for each in runs)


def test_the_page_says_which_extras_the_images_hold() -> None:
    extras = re.findall(r'"\.\[([\w,]+)\]"', (DOCKER / "Dockerfile").read_text())
    assert extras == ["cpu,demo,serve", "cpu,serve", "cpu,serve"]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    told = (DOCKER / "README.md").read_text().split("**Extras.**")[1]
    held, left_out = told.split("Not in them:")
    assert all(f"`{name}`" in held for name in ("cpu", "demo", "serve"))
    others = set(known) - {"cpu", "demo", "serve", "gpu", "dev"}
    assert all(f"`{name}`" in left_out for name in others)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_valid_bash_and_asks_for_the_warning(template) -> None:
    subprocess.run(["bash", "-n", str(template)], check=True)
    text = template.read_text()
    assert re.search(r"^#SBATCH --signal=B:TERM@\d+$", text, re.MULTILINE)
    assert "#SBATCH --requeue" in text
    # Slurm reads its lines only before the first command.
    assert text.rindex("#SBATCH") < text.index("set -uo")


def stand_ins(folder: Path, body: str) -> dict[str, str]:
    """Writes commands of a cluster that do as they are told; returns the environment."""
    scripts = {
        "scontrol": 'echo "$@" >> scontrol.log; [ "$1" = show ] && echo node1 || true',
        "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift; exec "$@"',
        "torchrun": f'echo "$@" > words.log; {body}',
        "dkdetr": f'echo "$@" > words.log; {body}',
    }
    for name, script in scripts.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    return os.environ | slurm | {"PATH": f"{folder}:{os.environ['PATH']}"}


def requeued(folder: Path) -> bool:
    log = folder / "scontrol.log"
    return log.is_file() and "requeue 5" in log.read_text()


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("code", "again"), [(0, False), (75, True), (8, False)])
def test_only_a_stopped_job_is_requeued(tmp_path, template, code, again) -> None:
    done = subprocess.run(
        [str(template), "--run", "runs/a b"], cwd=tmp_path, check=False,
        env=stand_ins(tmp_path, f"exit {code}"),
    )  # fmt: skip
    assert requeued(tmp_path) == again
    assert done.returncode == (0 if again else code)
    assert "--run runs/a b" in (tmp_path / "words.log").read_text()


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_warned_job_saves_and_is_requeued(tmp_path, template) -> None:
    """torchrun ends with another code than its ranks: the warning itself decides there."""
    body = "trap 'touch saved; exit 1' TERM; touch begun; while :; do sleep 0.05; done"
    job = subprocess.Popen([str(template)], cwd=tmp_path, env=stand_ins(tmp_path, body))
    while not (tmp_path / "begun").is_file():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 0
    assert (tmp_path / "saved").is_file()
    assert requeued(tmp_path)
