"""Reads the .pth and .npy files of other projects: numbers come in, and no code runs."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dkdetr.errors import CorruptArtefactError, DataError


def load_pth(data: bytes, where: str) -> Any:
    """Returns what torch.save wrote, tensors as NumPy arrays; plain containers and numbers only.

    Raises:
        CorruptArtefactError: it is damaged, or asks for anything beyond tensors and plain types.
    """
    try:
        loaded = torch.load(BytesIO(data), map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # noqa: BLE001  torch raises whatever the bytes lead it to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptArtefactError(f"{where} cannot be read without running it: {reason}") from None
    return _plain(loaded)


def load_matrix(path: Path) -> np.ndarray:
    """Returns the one matrix of a .npy, .pt or .pth file, float64.

    Raises:
        DataError: no such file, or no matrix of finite numbers.
        CorruptArtefactError: it is damaged or holds objects.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if path.suffix == ".npy":
        try:
            found: Any = np.load(BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise CorruptArtefactError(f"{path} is no plain .npy: {error}") from None
    else:
        found = load_pth(data, str(path))
    if isinstance(found, dict):
        arrays = [value for value in found.values() if getattr(value, "ndim", 0) == 2]
        found = arrays[0] if len(arrays) == 1 else None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu":
        raise DataError(f"{path} does not hold one matrix of numbers")
    matrix = found.astype(np.float64)
    if not np.isfinite(matrix).all():
        raise DataError(f"{path} holds numbers that are not finite")
    return matrix


def unit_rows(rows: np.ndarray, where: str) -> np.ndarray:
    """Returns float32 rows of unit norm.

    Raises:
        DataError: a row is zero or not finite.
    """
    wide = np.asarray(rows, dtype=np.float64)
    norms = np.linalg.norm(wide, axis=-1, keepdims=True)
    if not (np.isfinite(wide).all() and (norms > 1e-6).all()):
        raise DataError(f"{where}: an embedding is zero or not finite")
    return (wide / norms).astype(np.float32)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        wide = value.float() if value.dtype == torch.bfloat16 else value
        return wide.detach().numpy()
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
