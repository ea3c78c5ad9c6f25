"""How other projects name the tensors of a Deformable DETR.

Every layout is first renamed to the one of the original Deformable DETR (`transformer.encoder.
layers.0.self_attn...`), the pivot; `convert` then goes from the pivot to our modules. The mask
head, which only opera has, goes by our own names. A trap lies
in the decoder's norms: mmdetection counts them in order of use (self-attention, cross-attention,
feed-forward), the original calls the same three norm2, norm1, norm3.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["opera", "deformable-detr", "transformers", "resnet50"]
Rules = Sequence[tuple[str, str]]

_OPERA = r"bbox_head\.transformer\."
_OPERA_FFN = _OPERA + r"(encoder|decoder)\.layers\.(\d+)\.ffns\.0\.layers\."
_OPERA_MASKS = _OPERA + r"seg_encoder\.layers\.0\."
_TRANSFORMERS_FFN = r"model\.(encoder|decoder)\.layers\.(\d+)\.(?:mlp\.)?"
_OPERA_RULES: Rules = (
    (r"backbone\.(.+)", r"backbone.0.body.\1"),
    (r"neck\.convs\.(\d)\.conv\.(.+)", r"input_proj.\1.0.\2"),
    (r"neck\.convs\.(\d)\.gn\.(.+)", r"input_proj.\1.1.\2"),
    (r"neck\.extra_convs\.0\.conv\.(.+)", r"input_proj.3.0.\1"),
    (r"neck\.extra_convs\.0\.gn\.(.+)", r"input_proj.3.1.\1"),
    (_OPERA + r"level_embeds", r"transformer.level_embed"),
    (_OPERA + r"(enc_output|enc_output_norm|pos_trans|pos_trans_norm)\.(.+)", r"transformer.\1.\2"),
    (_OPERA + r"encoder\.layers\.(\d+)\.attentions\.0\.(.+)", r"@encoder.layers.\1.self_attn.\2"),
    (_OPERA + r"encoder\.layers\.(\d+)\.norms\.0\.(.+)", r"@encoder.layers.\1.norm1.\2"),
    (_OPERA + r"encoder\.layers\.(\d+)\.norms\.1\.(.+)", r"@encoder.layers.\1.norm2.\2"),
    (
        _OPERA + r"decoder\.layers\.(\d+)\.attentions\.0\.attn\.(.+)",
        r"@decoder.layers.\1.self_attn.\2",
    ),
    (_OPERA + r"decoder\.layers\.(\d+)\.attentions\.1\.(.+)", r"@decoder.layers.\1.cross_attn.\2"),
    (_OPERA + r"decoder\.layers\.(\d+)\.norms\.0\.(.+)", r"@decoder.layers.\1.norm2.\2"),
    (_OPERA + r"decoder\.layers\.(\d+)\.norms\.1\.(.+)", r"@decoder.layers.\1.norm1.\2"),
    (_OPERA + r"decoder\.layers\.(\d+)\.norms\.2\.(.+)", r"@decoder.layers.\1.norm3.\2"),
    (_OPERA_FFN + r"0\.0\.(.+)", r"@\1.layers.\2.linear1.\3"),
    (_OPERA_FFN + r"1\.(.+)", r"@\1.layers.\2.linear2.\3"),
    (_OPERA_MASKS + r"attentions\.0\.(.+)", r"mask_head.encoder.layers.0.self_attention.\1"),
    (_OPERA_MASKS + r"norms\.0\.(.+)", r"mask_head.encoder.layers.0.norm.\1"),
    (_OPERA_MASKS + r"norms\.1\.(.+)", r"mask_head.encoder.layers.0.feed_forward.norm.\1"),
    (
        _OPERA_MASKS + r"ffns\.0\.layers\.0\.0\.(.+)",
        r"mask_head.encoder.layers.0.feed_forward.linear1.\1",
    ),
    (
        _OPERA_MASKS + r"ffns\.0\.layers\.1\.(.+)",
        r"mask_head.encoder.layers.0.feed_forward.linear2.\1",
    ),
    (_OPERA + r"mask_trans\.(.+)", r"mask_head.projection.\1"),
    (_OPERA + r"mask_trans_norm\.(.+)", r"mask_head.norm.\1"),
    # One module that is saved once a decoder layer.
    (r"bbox_head\.seg_branches\.\d+\.0\.(.+)", r"mask_head.linear1.\1"),
    (r"bbox_head\.seg_branches\.\d+\.2\.(.+)", r"mask_head.linear2.\1"),
    (r"bbox_head\.seg_branches\.\d+\.4\.(.+)", r"mask_head.linear3.\1"),
    (r"bbox_head\.cls_branches\.(\d+)\.(.+)", r"class_embed.\1.\2"),
    (r"bbox_head\.reg_branches\.(\d+)\.0\.(.+)", r"bbox_embed.\1.layers.0.\2"),
    (r"bbox_head\.reg_branches\.(\d+)\.2\.(.+)", r"bbox_embed.\1.layers.1.\2"),
    (r"bbox_head\.reg_branches\.(\d+)\.4\.(.+)", r"bbox_embed.\1.layers.2.\2"),
)  # fmt: skip

# Names have moved between releases of transformers: fc1 or mlp.fc1, out_proj or o_proj.
_TRANSFORMERS_RULES: Rules = (
    (r"model\.backbone\.(?:conv_encoder\.)?model\.(.+)", r"backbone.0.body.\1"),
    (r"model\.(input_proj\..+)", r"\1"),
    (r"model\.level_embed", r"transformer.level_embed"),
    (r"model\.(enc_output|enc_output_norm|pos_trans|pos_trans_norm)\.(.+)", r"transformer.\1.\2"),
    (r"model\.encoder\.layers\.(\d+)\.self_attn_layer_norm\.(.+)", r"@encoder.layers.\1.norm1.\2"),
    (r"model\.encoder\.layers\.(\d+)\.final_layer_norm\.(.+)", r"@encoder.layers.\1.norm2.\2"),
    (r"model\.decoder\.layers\.(\d+)\.self_attn_layer_norm\.(.+)", r"@decoder.layers.\1.norm2.\2"),
    (
        r"model\.decoder\.layers\.(\d+)\.encoder_attn_layer_norm\.(.+)",
        r"@decoder.layers.\1.norm1.\2",
    ),
    (r"model\.decoder\.layers\.(\d+)\.final_layer_norm\.(.+)", r"@decoder.layers.\1.norm3.\2"),
    (r"model\.decoder\.layers\.(\d+)\.encoder_attn\.(.+)", r"@decoder.layers.\1.cross_attn.\2"),
    (
        r"model\.decoder\.layers\.(\d+)\.self_attn\.(?:o|out)_proj\.(.+)",
        r"@decoder.layers.\1.self_attn.out_proj.\2",
    ),
    (_TRANSFORMERS_FFN + r"fc([12])\.(.+)", r"@\1.layers.\2.linear\3.\4"),
    (r"model\.((?:encoder|decoder)\.layers\.\d+\.self_attn\..+)", r"transformer.\1"),
    (r"(?:model\.decoder\.)?((?:class|bbox)_embed\..+)", r"\1"),
)  # fmt: skip

_PIVOT_RULES: Rules = (
    (r"(?:transformer\.decoder\.)?((?:class|bbox)_embed\..+)", r"\1"),
    (r"((?:transformer|input_proj|backbone)\..+)", r"\1"),
)

_TRUNK_RULES: Rules = ((r"(?:backbone\.)?((?:conv1|bn1|layer[1-4])\..+)", r"backbone.0.body.\1"),)

_RULES: Mapping[Layout, Rules] = {
    "opera": _OPERA_RULES,
    "deformable-detr": _PIVOT_RULES,
    "transformers": _TRANSFORMERS_RULES,
    "resnet50": _TRUNK_RULES,
}

_SIGNS: Mapping[Layout, str] = {
    "opera": r"bbox_head\.transformer\.encoder\..+",
    "deformable-detr": r"transformer\.encoder\.layers\.0\.self_attn\.sampling_offsets\.weight",
    "transformers": r"model\.encoder\.layers\.0\.self_attn\.sampling_offsets\.weight",
    "resnet50": r"(?:backbone\.)?layer1\.0\.conv1\.weight",
}


def recognise(keys: Sequence[str]) -> Layout | None:
    """Returns whose names these are, None if nobody's known here."""
    for layout, sign in _SIGNS.items():
        if any(re.fullmatch(sign, key) for key in keys):
            return layout
    return None


def pivot_name(key: str, layout: Layout) -> str | None:
    """Returns the original Deformable DETR's name of a tensor, None if it has none."""
    for pattern, template in _RULES[layout]:
        found = re.fullmatch(pattern, key)
        if found:
            return found.expand(template.replace("@", "transformer."))
    return None


def join_attention(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors with query, key and value projections of self-attention stacked.

    transformers keeps the three apart, PyTorch's attention as one `in_proj`. The second result
    names the parts of each stack.
    """
    joined = dict(state)
    parts: dict[str, str] = {}
    for key in state:
        found = re.fullmatch(
            r"(model\.decoder\.layers\.\d+\.self_attn\.)q_proj\.(weight|bias)", key
        )
        if found is None:
            continue
        prefix, kind = found.groups()
        names = [f"{prefix}{letter}_proj.{kind}" for letter in "qkv"]
        if all(name in joined for name in names):
            stacked = torch.cat([joined.pop(name) for name in names])
            joined[f"{prefix}in_proj_{kind}"] = stacked
            parts[f"{prefix}in_proj_{kind}"] = " + ".join(names)
    return joined, parts
