"""Workers outlive the command that they worked for; what they keep must not get into the next."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.layout import load_provenance, write_provenance
from cache.spec import StaleCacheError
from cache.store import open_cache
from dkdetr.data.splits import load_split
from dkdetr.errors import MismatchError, UsageError
from dkdetr.student.build import build_trunk
from pipeline import build
from pipeline.build import cache_teacher
from pipeline.executor import Executor
from pipeline.fit import fit_plan
from pipeline.proposal_network import NetworkProposals, save_network
from pipeline.repair import repair_cache
from pipeline.request import CacheRequest
from pipeline.shard_worker import ShardJob, make_shard, tools_of
from tests.e2e.test_fit_proposals import OVERRIDES
from tests.e2e.tiny_stage_one import tiny_request

Change = Callable[[], object]


@pytest.fixture
def by_network(world: Path, teacher_spec: str, tmp_path: Path) -> CacheRequest:
    """The small world, proposed for by a network in a file."""
    request = replace(
        tiny_request(world, teacher_spec, tmp_path / "cache"),
        proposals=f"fit:{tmp_path / 'network.safetensors'}",
        executor=Executor(workers=1),
    )
    _write_network(request, seed=0)
    return request


def _write_network(request: CacheRequest, seed: int) -> None:
    split = load_split(request.split, request.data_root)
    plan = fit_plan(replace(request, experiment="pictograms_tiny", overrides=OVERRIDES), split)
    torch.manual_seed(seed)
    trunk = build_trunk(plan.config.student, load_weights=False)
    facts = {"key": "", "seen": {"names": ["square", "disc"]}, "image_size": 64}
    path = Path(request.proposals.removeprefix("fit:"))
    save_network(path, trunk, plan.config.student, facts)


def _in_this_worker(monkeypatch: pytest.MonkeyPatch, before: Change = lambda: 0) -> list[ShardJob]:
    """Makes this process the one worker of all commands; returns the jobs that it is given."""
    jobs: list[ShardJob] = []

    def run(
        _: Executor, task: Any, job: ShardJob, shards: Sequence[int], *_more: Any
    ) -> Iterator[Any]:
        assert task is make_shard
        jobs.append(job)
        before()
        for shard in shards:
            yield shard, task(job, shard, 0)

    monkeypatch.setattr(build, "run_shards", run)
    return jobs


def test_a_worker_that_outlives_a_cache_keeps_nothing_of_it(
    by_network: CacheRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = _in_this_worker(monkeypatch)
    first = cache_teacher(by_network)
    shutil.rmtree(by_network.out)
    _write_network(by_network, seed=1)  # under the same name
    second = cache_teacher(by_network)
    monkeypatch.undo()
    alone = cache_teacher(replace(by_network, out=tmp_path / "alone", executor=Executor()))
    assert second.merkle_root == alone.merkle_root != first.merkle_root
    old, new = jobs
    assert replace(old, fingerprint=new.fingerprint, canary=new.canary) == new
    with pytest.raises(MismatchError, match=r"fingerprint  cache: .*cache-teacher command again"):
        tools_of(old, 0)


def test_workers_propose_by_the_attention_that_was_asked_for(
    by_network: CacheRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = _in_this_worker(monkeypatch)
    with pytest.raises(UsageError, match=r"ops\.backend=triton: .* not on 'cpu'"):
        cache_teacher(replace(by_network, overrides=("ops.backend=triton",)))
    assert not by_network.out.exists()
    cache_teacher(replace(by_network, overrides=("ops.backend=torch",)))
    source = tools_of(jobs[0], 0).source
    assert isinstance(source, NetworkProposals)
    backends = [each.backend for each in source._trunk.modules() if hasattr(each, "backend")]
    assert backends
    assert set(backends) == {"torch"}


def test_a_cache_that_asked_for_a_gpu_s_attention_is_repaired_without_one(
    by_network: CacheRequest,
) -> None:
    alone = replace(by_network, executor=Executor())
    root = cache_teacher(alone).merkle_root
    provenance = load_provenance(alone.out)
    recorded = provenance["request"] | {"overrides": ["ops.backend=triton"]}
    write_provenance(alone.out, provenance | {"request": recorded})
    (alone.out / "data.zarr/gt/boxes_xyxy/c/0/0").unlink()
    assert repair_cache(alone.out).merkle_root == root


def test_a_shard_made_for_a_cache_that_is_gone_is_not_committed_to_the_next(
    by_network: CacheRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = _in_this_worker(monkeypatch)
    cache_teacher(by_network)
    tools_of(jobs[0], 0)  # what this worker keeps
    shutil.rmtree(by_network.out)
    _write_network(by_network, seed=1)

    def the_old_job() -> None:
        with pytest.raises(StaleCacheError, match="shard 000000 was made for another cache"):
            make_shard(jobs[0], 0, 0)
        raise KeyboardInterrupt

    _in_this_worker(monkeypatch, before=the_old_job)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(by_network)
    assert not list((by_network.out / "manifest").iterdir())


def test_a_worker_with_other_proposals_or_annotations_is_refused(
    by_network: CacheRequest, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _in_this_worker(monkeypatch, before=lambda: _write_network(by_network, seed=1))
    with pytest.raises(MismatchError, match=r"proposals\.weights_sha256  cache: ") as caught:
        cache_teacher(by_network)
    assert caught.value.exit_code == 4
    shutil.rmtree(by_network.out)

    annotations = world / "train.json"
    before = annotations.read_text()
    document = json.loads(before)
    document["annotations"][0]["bbox"][0] += 1
    try:
        _in_this_worker(monkeypatch, before=lambda: annotations.write_text(json.dumps(document)))
        with pytest.raises(MismatchError, match=r"split\.base_boxes_xxh3_128  cache: "):
            cache_teacher(by_network)
    finally:
        annotations.write_text(before)
    monkeypatch.undo()
    assert cache_teacher(replace(by_network, executor=Executor())).num_made == 3
    assert open_cache(by_network.out).info.num_images == 35
