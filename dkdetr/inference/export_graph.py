"""A student for other runtimes: ONNX or TorchScript, names as an input or baked in."""

import importlib
import io
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dkdetr.atomic_file import write_bytes
from dkdetr.config import ExperimentConfig
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import UsageError
from dkdetr.experiment_file import config_hash
from dkdetr.inference.graph import (
    INPUTS,
    OUTPUTS,
    Differences,
    StudentGraph,
    differences,
    least_side,
    traced_with,
)
from dkdetr.student.detector import DKDETR

GraphFormat = Literal["onnx", "torchscript"]
_OPSET = 17  # from 16 on there is GridSample, from 17 on LayerNormalization
_EXTRA_FILE = "dkdetr.json"


@dataclass(frozen=True)
class ExportedGraph:
    """The file that was written and what is known of it; `compared` is None where nobody looked."""

    path: Path
    names: int | None
    """How many names are baked in; None: they are an input."""
    compared: Differences | None
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Returns what people should know."""
        names = "text_embeddings are an input" if self.names is None else f"{self.names} names"
        told = [self.compared.line()] if self.compared else []
        return [f"written: {self.path}; {names}", *told, *self.notes]

    def as_json(self) -> dict[str, Any]:
        """Returns the same as a plain table."""
        return {
            "path": str(self.path),
            "baked_names": self.names,
            "compared": asdict(self.compared) if self.compared else None,
            "notes": list(self.notes),
        }


def export_graph(
    path: Path,
    form: GraphFormat,
    student: DKDETR,
    config: ExperimentConfig,
    vocabulary: Vocabulary,
    *,
    baked: Vocabulary | None = None,
) -> ExportedGraph:
    """Writes the student's graph; returns the largest differences from PyTorch, on other inputs.

    Batch, height, width and, unless names are baked in, the number of classes are free. The file
    says what made it: `metadata_props` of ONNX, the extra file `dkdetr.json` of TorchScript.

    Args:
        path: the file.
        form: `torchscript` is traced on the CPU and runs there.
        student: with or without a mask head; masks stay behind.
        config: what it was trained with.
        vocabulary: the student's own, which says whose text embeddings it understands.
        baked: names to fix; their thresholds are told, and change no score.

    Raises:
        UsageError: the package onnx is not installed.
        MismatchError: the names to fix were embedded by another teacher.
    """
    if baked is not None:
        baked.require_space_of(vocabulary, "these names were")
    text = None if baked is None else torch.from_numpy(baked.embeddings.copy())
    graph = StudentGraph(student, text)
    described = _described(config, vocabulary, baked, student.num_queries)
    write = _write_onnx if form == "onnx" else _write_torchscript
    compared, notes = write(path, graph, vocabulary.embed_dim, described)
    if baked is not None and baked.thresholds:
        notes.append(
            f"{len(baked.thresholds)} least score(s) of names are in its metadata (thresholds): "
            "the graph gives every score"
        )
    if student.mask_head is not None:
        notes.append("boxes only: masks are drawn for chosen queries and are not in the graph")
    return ExportedGraph(path, None if baked is None else len(baked), compared, tuple(notes))


def _described(
    config: ExperimentConfig, vocabulary: Vocabulary, baked: Vocabulary | None, num_queries: int
) -> dict[str, str]:
    told = {
        "experiment": config.name,
        "settings": config_hash(config),
        "teacher": vocabulary.teacher,
        "prompts": json.dumps((vocabulary if baked is None else baked).prompts),
        "image_size": str(config.data.image_size),
        "least_side": str(least_side(num_queries)),
        "pixels": "RGB, 0 to 255, longest side at image_size; padding right and below",
        "boxes_xyxy": "left, top, right, bottom as shares of the un-padded picture",
    }
    if baked is not None:
        told["names"] = json.dumps(baked.names)
        told["category_ids"] = json.dumps(baked.category_ids)
        if baked.thresholds:
            told["thresholds"] = json.dumps(dict(baked.thresholds))
    return told


def _write_onnx(
    path: Path, graph: StudentGraph, text_dim: int, described: Mapping[str, str]
) -> tuple[Differences | None, list[str]]:
    onnx = _imported("onnx")
    if onnx is None:
        raise UsageError("--format onnx wants the package onnx: pip install 'dkdetr[export]'")
    baked = graph.baked is not None
    inputs = INPUTS[:2] if baked else INPUTS
    free = {"pixels": {0: "batch", 2: "height", 3: "width"}}
    free |= {"padding_mask": {0: "batch", 1: "height", 2: "width"}}
    free |= {} if baked else {"text_embeddings": {0: "num_classes"}}
    free |= {"scores": {0: "batch", 2: "num_classes"}, "boxes_xyxy": {0: "batch"}}
    if baked:
        free["scores"] = {0: "batch"}
    with _traced(), tempfile.TemporaryDirectory() as folder:
        # The exporter by torch.export takes minutes for the same graph (free sizes) and is no
        # better for it: shapes here are plain arithmetic.
        torch.onnx.export(
            graph,
            traced_with(graph, text_dim).arguments(baked=baked),
            Path(folder) / "graph.onnx",
            dynamo=False,
            opset_version=_OPSET,
            input_names=list(inputs),
            output_names=list(OUTPUTS),
            dynamic_axes=free,
        )
        model = onnx.load(Path(folder) / "graph.onnx")
    for key, value in described.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    write_bytes(path, data, large=True)
    runtime = _imported("onnxruntime")
    if runtime is None:
        return None, ["onnxruntime is not installed: nobody compared the graph with PyTorch"]
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(arguments: tuple[Tensor, ...]) -> Any:
        fed = {name: each.numpy() for name, each in zip(inputs, arguments, strict=True)}
        return tuple(session.run(list(OUTPUTS), fed))

    named = f"onnxruntime {runtime.__version__}"
    return differences(graph, run, text_dim, runtime=named), []


def _write_torchscript(
    path: Path, graph: StudentGraph, text_dim: int, described: Mapping[str, str]
) -> tuple[Differences | None, list[str]]:
    baked = graph.baked is not None
    buffer = io.BytesIO()
    with _traced(), torch.inference_mode():
        example = traced_with(graph, text_dim).arguments(baked=baked)
        traced = torch.jit.trace(graph, example, check_trace=False)
        torch.jit.save(traced, buffer, _extra_files={_EXTRA_FILE: json.dumps(described)})
        write_bytes(path, buffer.getvalue(), large=True)
        loaded = torch.jit.load(io.BytesIO(buffer.getvalue()))

    def run(arguments: tuple[Tensor, ...]) -> Any:
        with torch.inference_mode():
            return tuple(each.numpy() for each in loaded(*arguments))

    return differences(graph, run, text_dim, runtime=f"TorchScript {torch.__version__}"), []


@contextmanager
def _traced() -> Iterator[None]:
    """Quietens what tracing says of itself.

    It is deprecated, and warns of every number that it takes from a shape; `differences` looks at
    other shapes than were traced.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=torch.jit.TracerWarning)  # pyright: ignore[reportPrivateImportUsage]
        warnings.simplefilter("ignore", category=FutureWarning)
        warnings.simplefilter("ignore", category=DeprecationWarning)
        yield


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        return None
