"""The teacher: any open_clip model, its preprocessing frozen and its identity beyond doubt.

open_clip helps too willingly: it builds random weights with a log line, loads OpenAI's weights into
a GELU model without a word, and gives weights from a path another preprocessing than the same
weights from the hub. Here each of these is an error or is recorded.
"""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import open_clip
import torch
from torch import nn

from dkdetr.errors import CorruptArtefactError, DataError, UsageError
from dkdetr.offline import is_offline
from pipeline.fused_tower import can_be_fused
from pipeline.hub_weights import kept_weights, was_asked
from pipeline.teacher_model import Encoder, Preprocessing, Teacher
from pipeline.teacher_source import TeacherSource, openai_evidence, parse_teacher_spec
from pipeline.url_weights import fetch_url_weights

Precision = Literal["auto", "fp32", "fp16", "bf16"]
EncoderChoice = Literal["auto", "open_clip", "fused", "compiled"]
_RANDOM_SEED = 20231002
_INTERPOLATIONS = {"bicubic": "bicubic", "bilinear": "bilinear"}
# open_clip's resize modes, as the crop modes that do the same.
_PLACEMENTS = {"shortest": "clip_center", "squash": "squash", "longest": "pad_square"}


def load_teacher(
    spec: str,
    device: torch.device | str = "cpu",
    *,
    precision: Precision = "auto",
    encoder: EncoderChoice = "open_clip",
) -> Teacher:
    """Returns the teacher that `spec` names (see pipeline.teacher_source), in evaluation mode.

    Args:
        spec: MODEL:PRETRAINED, MODEL:/path, MODEL:random or `pictograms`.
        device: where it runs.
        precision: `auto` is fp16 on CUDA, fp32 elsewhere.
        encoder: see `pipeline.teacher_model.Encoder`; `auto` is `fused` on CUDA for towers that can
            be, else `open_clip`.

    Raises:
        UsageError: unknown model or tag, a model whose activation is not the weights', or a tower
            that cannot be fused and should be.
        DataError: weights that cannot be reached or found, with how to provide them.
        CorruptArtefactError: a file that does not hold this model's weights.
    """
    device = torch.device(device)
    source = parse_teacher_spec(spec)
    if source.model_json is not None:
        open_clip.add_model_config(source.model_json)
    config = _model_config(source)
    _check_activation(source, config)
    preprocessing = _preprocessing(source, config)
    with _quiet_about_random_weights(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        model, tokenize = _build(source, config)
    path = None
    if source.kind != "random":
        path = source.path or _fetch(source)
        _load_weights(model, path, source)
    chosen = precision if precision != "auto" else "fp16" if device.type == "cuda" else "fp32"
    return Teacher(
        model,
        tokenize,
        preprocessing,
        replace(source, path=path),
        config,
        device=device,
        precision=chosen,
        encoder=_choose_encoder(encoder, model, device, source),
        note=_activation_note(source, config),
    )


def _choose_encoder(
    wanted: EncoderChoice, model: nn.Module, device: torch.device, source: TeacherSource
) -> Encoder:
    fusible = can_be_fused(getattr(model, "visual", model))
    if wanted == "auto":
        return "fused" if fusible and device.type == "cuda" else "open_clip"
    if wanted != "open_clip" and not fusible:
        raise UsageError(
            f"teacher '{source.spec}': its image tower is no plain ViT of open_clip's, so it "
            f"cannot be {wanted}; use --encoder open_clip"
        )
    return wanted


def fetch_teacher(spec: str) -> tuple[Path | None, tuple[str, ...]]:
    """Returns a teacher's weights, downloaded if need be, and the repositories of its tokenizer.

    None stands for weights that nobody has to fetch: shipped, random, or a file of the user's.

    Raises:
        DkdetrError: as `load_teacher`.
    """
    source = parse_teacher_spec(spec)
    if source.kind != "tag":
        return None, ()
    config = _model_config(source)
    _check_activation(source, config)
    with _quiet_about_random_weights():
        _build(source, config)
    text = config["text_cfg"]
    named = (text.get("hf_tokenizer_name"), text.get("hf_model_name"))
    return _fetch(source), tuple(dict.fromkeys(name for name in named if name))


def teacher_embed_dim(spec: str) -> int:
    """Returns the length of a teacher's vectors; reads no weights. Raises as `load_teacher`."""
    source = parse_teacher_spec(spec)
    if source.model_json is not None:
        open_clip.add_model_config(source.model_json)
    config = _model_config(source)
    _check_activation(source, config)
    return int(config["embed_dim"])


def _model_config(source: TeacherSource) -> dict[str, Any]:
    known = open_clip.get_model_config(source.model)
    if source.folder_config is not None and source.model_json is None:
        config = dict(source.folder_config["model_cfg"])
        if known is not None and bool(known.get("quick_gelu")) != bool(config.get("quick_gelu")):
            raise UsageError(
                f"teacher '{source.spec}': open_clip_config.json beside these weights says "
                f"{_activation(config)}, {source.model} means {_activation(known)}; "
                f"type --teacher {_twin(source.model)}:{source.path}"
            )
        return config
    if known is None:
        raise UsageError(
            f"teacher '{source.spec}': open_clip knows no model '{source.model}'{_near(source)}; "
            f"a model of your own needs {source.model}.json (open_clip's model configuration) or "
            "open_clip_config.json beside its weights"
        )
    return known


def _check_activation(source: TeacherSource, config: Mapping[str, Any]) -> None:
    quick = bool(config.get("quick_gelu"))
    if source.kind == "tag":
        tag = open_clip.get_pretrained_cfg(source.model, source.tag)
        if not tag:
            known = open_clip.list_pretrained_tags_by_model(source.model)
            raise UsageError(
                f"teacher '{source.spec}': {source.model} has no weights '{source.tag}'; open_clip "
                f"knows {', '.join(known) or 'none'}; or give a path, or 'random' for a trial"
            )
        if bool(tag.get("quick_gelu")) != quick:
            raise UsageError(
                f"teacher '{source.spec}': the weights '{source.tag}' were not trained with "
                f"{_activation(config)}, which {source.model} means; "
                f"type --teacher {_twin(source.model)}:{source.tag}"
            )
    has_twin = _twin(source.model) != source.model  # SigLIP and EVA know no QuickGELU
    if source.path is not None and source.folder_config is None and not quick and has_twin:
        evidence = openai_evidence(source.path, _openai_sha256())
        if evidence is not None:
            raise UsageError(
                f"teacher '{source.spec}': these are OpenAI's weights ({evidence}), trained with "
                f"QuickGELU, and {source.model} means GELU: its embeddings would be wrong and "
                f"nothing would fail; type --teacher {_twin(source.model)}:{source.path}"
            )


def _preprocessing(source: TeacherSource, config: Mapping[str, Any]) -> Preprocessing:
    defaults = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    said: list[Mapping[str, Any]] = []
    if source.kind == "tag":
        said = [open_clip.get_pretrained_cfg(source.model, source.tag)]
    elif source.folder_config is not None:
        said = [source.folder_config.get("preprocess_cfg", {})]
    elif source.model_json is None:
        tags = open_clip.list_pretrained_tags_by_model(source.model)
        said = [open_clip.get_pretrained_cfg(source.model, tag) for tag in tags]
    found = {json.dumps({key: entry.get(key, defaults[key]) for key in defaults}) for entry in said}
    if len(found) > 1 and source.kind == "file":
        raise UsageError(
            f"teacher '{source.spec}': {source.model}'s known weights want different "
            "preprocessing, and this file does not say which; put the open_clip_config.json of its "
            "repository (with 'preprocess_cfg') beside it"
        )
    chosen = json.loads(sorted(found)[0]) if found else defaults
    size = config["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocessing(
        size_hw=(int(height), int(width)),
        mean=tuple(chosen["mean"]),
        std=tuple(chosen["std"]),
        interpolation=_known(chosen["interpolation"], _INTERPOLATIONS, source),
        placement=_known(chosen["resize_mode"], _PLACEMENTS, source),
    )


def _known(word: str, table: Mapping[str, Any], source: TeacherSource) -> Any:
    if word not in table:
        raise UsageError(
            f"teacher '{source.spec}': its preprocessing says '{word}', and only "
            f"{', '.join(table)} are known here"
        )
    return table[word]


def _build(source: TeacherSource, config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    name = source.model
    if source.folder_config is not None and source.model_json is None and source.path is not None:
        name = f"local-dir:{source.path.parent}"
    _announce_text_parts(source, config["text_cfg"], has_tokenizer=name != source.model)
    try:
        model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
        return model, open_clip.get_tokenizer(name, **_merges_file(source, config))
    except (OSError, RuntimeError, ImportError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"teacher '{source.spec}' cannot be built: {_one_line(error)}; if this is its "
            "tokenizer or text tower, put their files into a folder and name it: MODEL:/path"
        ) from error


def _merges_file(source: TeacherSource, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns where the tokenizer's merges lie if the configuration names them by file name.

    open_clip would look for them in the working directory; they lie beside the weights.
    """
    name = (config["text_cfg"].get("tokenizer_kwargs") or {}).get("bpe_path")
    if name is None or source.path is None:
        return {}
    return {"bpe_path": str(source.path.parent / name)}


def _fetch(source: TeacherSource) -> Path:
    tag = open_clip.get_pretrained_cfg(source.model, source.tag)
    hub, url = str(tag.get("hf_hub") or ""), str(tag.get("url") or "")
    try:
        if not hub:
            return fetch_url_weights(url, lambda place: _announce("weights", source, place))
        if (kept := kept_weights(hub)) is not None:
            return kept  # a hub that is asked again may have other weights by now
        if not is_offline():
            _announce("weights", source, f"the hub ({hub.strip('/')})")
        return Path(open_clip.download_pretrained(tag))
    except (OSError, RuntimeError, ValueError) as error:
        where = (hub or url).strip("/")
        raise DataError(
            f"the weights of teacher '{source.spec}' are neither in the local cache nor reachable "
            f"({_one_line(error)}). On a machine with a network: dkdetr fetch --teacher "
            f"{source.spec} --bundle b.tar, then here: dkdetr fetch --from-bundle b.tar; or fetch "
            f"'{where}' and type --teacher {source.model}:/path/to/weights; for a trial without "
            f"them: --teacher {source.model}:random"
        ) from error


def _announce(what: str, source: TeacherSource, place: str) -> None:
    """Says that a download begins, on stderr."""
    told = f"fetching the {what} of teacher {source.spec} from {place}, once"
    print(told, file=sys.stderr, flush=True)


def _announce_text_parts(
    source: TeacherSource, text: Mapping[str, Any], *, has_tokenizer: bool
) -> None:
    """Says which of a text tower's own files will come from the hub; open_clip fetches them."""
    wanted = [("text tower", text.get("hf_model_name"), "config.json")]
    if not has_tokenizer:
        wanted.append(("tokenizer", text.get("hf_tokenizer_name"), "tokenizer_config.json"))
    for what, name, file in wanted:
        if name and not is_offline() and not Path(name).exists() and not was_asked(name, file):
            _announce(what, source, f"the hub ({name})")


def _load_weights(model: nn.Module, path: Path, source: TeacherSource) -> None:
    try:
        open_clip.load_checkpoint(cast("Any", model), str(path), strict=True, weights_only=True)
    except Exception as error:
        hint = ""
        if "TorchScript" in str(error):
            hint = " (a TorchScript program; use the .safetensors of the model's repository)"
        raise CorruptArtefactError(
            f"'{path.name}' does not hold the weights of {source.model}{hint}: {_one_line(error)}"
        ) from error


@contextmanager
def _quiet_about_random_weights() -> Iterator[None]:
    """Drops open_clip's line about random weights: they are loaded next, or were asked for."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No pretrained weights loaded")

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


def _activation_note(source: TeacherSource, config: Mapping[str, Any]) -> str:
    twin = _twin(source.model)
    if source.kind != "file" or source.folder_config is not None or twin == source.model:
        return ""
    return (
        f"activation {_activation(config)}, as {source.model} says; if the weights were trained "
        f"with the other one, use {twin}"
    )


def _activation(config: Mapping[str, Any]) -> str:
    return "QuickGELU" if config.get("quick_gelu") else "GELU"


def _twin(model: str) -> str:
    twin = model.removesuffix("-quickgelu")
    if twin == model:
        twin = f"{model}-quickgelu"
    return twin if open_clip.get_model_config(twin) is not None else model


def _openai_sha256() -> frozenset[str]:
    urls = [open_clip.get_pretrained_url(name, "openai") for name in open_clip.list_models()]
    return frozenset(url.split("/")[-2] for url in urls if "openaipublic" in url)


def _near(source: TeacherSource) -> str:
    wanted = source.model.lower()
    near = [name for name in open_clip.list_models() if wanted in name.lower()]
    return f" (near: {', '.join(near[:5])})" if near else ""


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
