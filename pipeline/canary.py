"""A teacher's canary: fixed pictures and prompts whose embeddings must not change.

Hashes say that the weights are the same; the canary says that the whole way from pixels and words
to vectors is: activation, resampling, channel order, normalisation, tokenizer, library versions.
"""

import base64
from typing import Protocol

import numpy as np
from jaxtyping import Float

from dkdetr.errors import MismatchError

_MIN_COSINE = 0.9999
_NUM_PICTURES = 8
_PROMPTS = (
    "a photo of a cat.",
    "a photo of a traffic cone.",
    "a pair of scissors",
    "an umbrella in the rain",
    "the letter Q",
    "a RED bus, and a blue one!",
    "sushi",
    "a drawing of a guitar",
)


class _Encoder(Protocol):
    def encode_texts(self, texts: tuple[str, ...]) -> np.ndarray: ...
    def encode_regions(self, image: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray: ...


def canary_embeddings(encoder: _Encoder) -> Float[np.ndarray, "num_canaries embed_dim"]:
    """Returns unit vectors of the fixed regions, then of the fixed prompts."""
    boxes = np.array([[3.0, 5.0, 90.0, 120.0]], dtype=np.float32)
    regions = [
        encoder.encode_regions(canary_picture(index), boxes) for index in range(_NUM_PICTURES)
    ]
    embeddings = np.concatenate([*regions, encoder.encode_texts(_PROMPTS)])
    if not np.isfinite(embeddings).all():
        raise MismatchError(
            "the teacher's embeddings are not finite: its weights do not bear this precision; "
            "half precision may not suit these weights: try --device cpu"
        )
    return embeddings


def canary_picture(index: int) -> np.ndarray:
    """Returns a fixed uint8 picture [131, 97, 3]: waves of other directions in every channel.

    The channels differ, so that a swapped order shows. Every second picture is cut into black and
    white at a third of a grey level's height: its edges are where interpolations part.
    """
    y, x = np.mgrid[0:131, 0:97].astype(np.float64)
    channels = [
        np.sin(x * (0.11 + 0.07 * index) + y * (0.05 + 0.09 * channel) + channel + index)
        for channel in range(3)
    ]
    waves = np.stack(channels, axis=-1)
    if index % 2:
        waves = np.sign(waves - 1 / 3)
    return np.round(127.5 + 127.5 * waves).astype(np.uint8)


def check_canary(recorded: str, encoder: _Encoder, *, where: str) -> float:
    """Returns the smallest cosine between recorded and present canaries.

    Args:
        recorded: of `pack_canary`.
        encoder: the teacher at hand.
        where: what holds the record, for the message.

    Raises:
        MismatchError: below 0.9999: another teacher, whatever its name.
    """
    now = canary_embeddings(encoder)
    before = unpack_canary(recorded, embed_dim=now.shape[1])
    if before.shape != now.shape:
        raise MismatchError(
            f"the teacher's canary has another shape than the one in {where}: "
            f"{list(now.shape)} instead of {list(before.shape)}"
        )
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(now, axis=1)
    cosine = float(((before * now).sum(1) / norms.clip(min=1e-12)).min())
    if not cosine >= _MIN_COSINE:
        raise MismatchError(
            f"teacher canary cosine {cosine:.4f} < {_MIN_COSINE}: this teacher does not embed as "
            f"the one that made {where}, though its name and weights may agree (another "
            "activation, resampling or library); write to another --out, or use that teacher"
        )
    return cosine


def pack_canary(embeddings: Float[np.ndarray, "num_canaries embed_dim"]) -> str:
    """Returns the embeddings as text (base64 of little-endian float16)."""
    return base64.b64encode(embeddings.astype("<f2").tobytes()).decode("ascii")


def unpack_canary(packed: str, *, embed_dim: int) -> Float[np.ndarray, "num_canaries embed_dim"]:
    """Returns what `pack_canary` packed, as float32; shape (0, embed_dim) if it cannot be."""
    flat = np.frombuffer(base64.b64decode(packed), dtype="<f2").astype(np.float32)
    if len(flat) % embed_dim:
        return np.zeros((0, embed_dim), dtype=np.float32)
    return flat.reshape(-1, embed_dim)
