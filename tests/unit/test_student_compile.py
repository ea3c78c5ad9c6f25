"""torch.compile sees the student as one graph: nothing in it falls back to Python.

In processes of their own, because torch.compile cannot look through the shape checks of tests.
"""

import os
import subprocess
import sys

import pytest

from tests.e2e.commands import ROOT

_WHOLE = """
import torch
from step_options import option_config, training_batch
from tiny_student import text_embeddings, tiny_student

torch.set_num_threads(1)
for name in {names}:
    config = option_config(name)
    plain, compiled = (tiny_student(config).train() for _ in range(2))
    compiled.compile(backend="eager", fullgraph=True)
    batch = training_batch(config)
    for regions in (None, batch.regions):  # burn-in, distillation
        wanted, found = (
            student(batch.images, text_embeddings(), regions) for student in (plain, compiled)
        )
        torch.testing.assert_close(found.logits, wanted.logits)
        if regions is not None:
            torch.testing.assert_close(found.distillation.features, wanted.distillation.features)
"""

_PARTS = """
import torch
from tiny_student import image_batch, tiny_student

torch.set_num_threads(1)
student = tiny_student().train()
_, grid, _ = student.trunk(image_batch())
num_tokens = grid.padding_mask.shape[1]
tokens, places = torch.randn(2, num_tokens, 32), torch.randn(2, num_tokens, 32)
queries, positions, anchors = torch.randn(2, 6, 32), torch.randn(2, 6, 32), torch.rand(2, 6, 4)
blocked = torch.eye(6, dtype=torch.bool).roll(1, 0).expand(8, -1, -1)
for part, args in (
    (student.trunk.encoder, (tokens, places, grid)),
    (student.decoder, (queries, positions, anchors, tokens, grid, blocked)),
):
    compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
    wanted, found = part(*args), compiled(*args)
    torch.testing.assert_close(found, wanted)
    if len(args) > 3:  # the decoder's queries, without the boxes
        wanted, found = wanted[0], found[0]
    weights = list(part.parameters())
    one, other = (
        torch.autograd.grad(each.sum(), weights, allow_unused=True, materialize_grads=True)
        for each in (wanted, found)
    )
    torch.testing.assert_close(one, other)
with torch.autocast("cpu", dtype=torch.bfloat16):
    wanted = student.trunk.encoder(tokens, places, grid)
    compiled = torch.compile(student.trunk.encoder, backend="aot_eager", fullgraph=True)
    found = compiled(tokens, places, grid)
assert found.dtype == torch.bfloat16
torch.testing.assert_close(found, wanted)
"""

_HALF = """
import torch
from compiled_steps import CountedGraphs, Learner, distance
from step_options import option_config, training_batch

torch.set_num_threads(1)
config, graphs = option_config("cached"), CountedGraphs()
wide, half = (Learner(config, dtype) for dtype in (torch.float32, torch.bfloat16))
compiled = Learner(config, torch.bfloat16, graphs=graphs)
for number in range(3):
    # From the same weights: AdamW's first steps have the gradients' signs alone, and would carry
    # roundings on.
    start = {name: value.clone() for name, value in half.student.state_dict().items()}
    batch, found = training_batch(config, seed=number), []
    for learner in (wide, half, compiled):
        learner.start_from(start)
        found.append(learner.step(batch, number))
    (_, exact), (wanted_loss, wanted), (loss, gradient) = found
    assert abs(loss / wanted_loss - 1) < 1e-4, (loss, wanted_loss)
    # An eighth of what half precision itself rounds: gradients are summed in another order.
    shares = distance(gradient, wanted), distance(wanted, exact)
    assert shares[0] < shares[1] / 8, shares
    assert graphs.num_graphs == 1, graphs
"""

_PROFILED = """
import torch
from step_options import option_config, step_under, training_batch

from dkdetr.engine.profiling import step_profiler
from dkdetr.engine.step_parts import step_times

torch.set_num_threads(1)
graphs = []


def counting(graph, inputs):
    graphs.append(graph)
    return graph.forward


config = option_config("cached")
work = step_under(config)
batch = training_batch(config)
{compile}
with step_profiler(work.student, 1, warmup=2) as profiler:
    for _ in range(3):
        work(batch)
        profiler.step()
work(batch)
parts = [part.name for part in step_times(profiler.events()).parts]
inside = ["backbone", "neck", "encoder", "first stage", "decoder"]
assert len(graphs) == {graphs}, len(graphs)
assert [name for name in parts if name in inside] == {inside}, parts
assert {{"rest of forward", "matching", "losses", "backward", "optimiser"}} <= set(parts), parts
"""


def run(code: str) -> None:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_student_is_one_graph_with_and_without_distillation():
    run(_WHOLE.format(names=["cached"]))


@pytest.mark.slow
def test_the_student_is_one_graph_under_other_settings():
    run(_WHOLE.format(names=["iou", "hybrid", "slots", "siglip_bias", "masks"]))


def test_encoder_and_decoder_are_one_graph_each_with_gradients():
    """Through AOTAutograd, as the compiler sees them; the encoder under autocast, too."""
    run(_PARTS)


def test_a_compiled_student_learns_under_autocast_what_the_eager_one_does():
    """In bf16, over steps; compiled once."""
    run(_HALF)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_profile_leaves_a_compiled_student_whole(compiled: bool):
    """Marks within it would cut its graph: of a plain student they are there."""
    run(
        _PROFILED.format(
            compile="work.student.compile(backend=counting)" if compiled else "",
            graphs=int(compiled),
            inside="[]" if compiled else "inside",
        )
    )
