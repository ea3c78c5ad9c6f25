"""The manifest of a shard: its commit record.

A shard exists once its manifest does. No clock, host or path enters a manifest, so any order of
commits, any number of workers and any resume give the same bytes and the same root.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cache.arrays import array_specs
from cache.codec import cosine_errors
from cache.durable import (
    dump_checked_json,
    file_problem,
    file_record,
    load_checked_json,
    write_atomic,
)
from cache.location import CachePath, member
from cache.plan import Plan
from cache.rows import ImageRows
from cache.spec import SCHEMA, CorruptCacheError, canonical_json

MANIFEST_FOLDER = "manifest"


@dataclass(frozen=True)
class ShardManifest:
    """What one shard holds and what its files must be.

    `files` maps a path inside the cache to its size and hash; `statistics` maps an array to its
    min, max, least and greatest norm, and count of NaN over the rows in use; of region embeddings,
    too, how far storing them has turned them (1 - cosine).
    """

    schema: int
    fingerprint: str
    shard: int
    num_images: int
    num_regions: int
    num_gt: int
    quarantined: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    statistics: Mapping[str, Mapping[str, float]]

    @classmethod
    def load(cls, path: CachePath, shard_index: int) -> Self:
        """Returns the manifest of a shard of the cache at `path`.

        Raises:
            FileNotFoundError: the shard was never committed.
            CorruptCacheError: the manifest is not what was written.
        """
        file = path / manifest_file(shard_index)
        try:
            manifest = cls(**load_checked_json(file))
        except (CorruptCacheError, TypeError):
            raise CorruptCacheError(f"shard {shard_index:06d}: {file} has changed") from None
        if manifest.schema != SCHEMA or manifest.shard != shard_index:
            raise CorruptCacheError(f"shard {shard_index:06d}: {file} belongs to another shard")
        return manifest

    def write(self, path: Path) -> None:
        """Writes the manifest: the moment at which the shard is committed."""
        write_atomic(path / manifest_file(self.shard), dump_checked_json(asdict(self)))

    def problems(self, path: CachePath, *, quick: bool = False) -> list[str]:
        """Returns a line for each file of the shard that is not as committed."""
        found: list[str] = []
        for name, record in self.files.items():
            problem = file_problem(member(path, name), record, quick=quick)
            if problem is not None:
                found.append(f"shard {self.shard:06d}: {path / name} {problem}")
        return found


def manifest_file(shard_index: int) -> str:
    """Returns the path, inside the cache, of a shard's manifest."""
    return f"{MANIFEST_FOLDER}/{shard_index:06d}.json"


def committed_shards(path: Path) -> list[int]:
    """Returns the shards whose manifests are there, whether or not they can be read."""
    names = (file.stem for file in (path / MANIFEST_FOLDER).glob("*.json"))
    return sorted(int(name) for name in names if name.isdecimal())


def build_manifest(
    path: Path,
    plan: Plan,
    fingerprint: str,
    shard_index: int,
    images: Sequence[ImageRows],
    quarantined: Mapping[int, str],
) -> ShardManifest:
    """Returns the manifest of a shard whose files are written and on the disk."""
    good = [rows for rows in images if rows.image_id not in quarantined]
    names = [spec.shard_file(shard_index) for spec in array_specs(plan)]
    return ShardManifest(
        schema=SCHEMA,
        fingerprint=fingerprint,
        shard=shard_index,
        num_images=len(images),
        num_regions=sum(rows.num_regions for rows in good),
        num_gt=sum(len(rows.gt_boxes_xyxy) for rows in good),
        quarantined={str(image_id): quarantined[image_id] for image_id in sorted(quarantined)},
        files={name: file_record(path / name) for name in names},
        statistics=_statistics(good, plan),
    )


def _statistics(images: Sequence[ImageRows], plan: Plan) -> dict[str, dict[str, float]]:
    arrays = {
        "boxes_xyxy": [rows.boxes_xyxy for rows in images],
        "objectness": [rows.objectness for rows in images],
        "max_base_iou": [rows.max_base_iou for rows in images],
        "region_embeddings": [rows.region_embeddings for rows in images],
        "image_embedding": [rows.image_embedding[None] for rows in images if plan.image_embeddings],
        "gt_embeddings": [rows.gt_embeddings for rows in images],
    }
    summaries: dict[str, dict[str, float]] = {}
    for name, pieces in arrays.items():
        used = [piece for piece in pieces if piece.size]
        if used:
            summaries[name] = _summary(used, with_norms=name.endswith(("embeddings", "embedding")))
    if "region_embeddings" in summaries:
        errors = [cosine_errors(piece, plan.storage) for piece in arrays["region_embeddings"]]
        summaries["region_embeddings"] |= _storage_error(np.concatenate(errors))
    return summaries


def _storage_error(errors: NDArray[np.float64]) -> dict[str, float]:
    # Rounded to three digits, as norms are: last bits depend on the machine's order of summation.
    return {
        "mean_cosine_error": float(f"{errors.mean():.2e}"),
        "max_cosine_error": float(f"{errors.max():.2e}"),
    }


def _summary(pieces: Sequence[NDArray[np.float32]], *, with_norms: bool) -> dict[str, float]:
    summary = {
        "min": min(float(piece.min()) for piece in pieces),
        "max": max(float(piece.max()) for piece in pieces),
        "nan": float(sum(int(np.isnan(piece).sum()) for piece in pieces)),
    }
    if with_norms:
        # Rounded: a norm's last bits depend on the machine's order of summation.
        norms = [np.linalg.norm(piece, axis=1) for piece in pieces]
        summary["min_norm"] = round(min(float(norm.min()) for norm in norms), 4)
        summary["max_norm"] = round(max(float(norm.max()) for norm in norms), 4)
    return summary


def quarantine_lines(manifests: Sequence[ShardManifest]) -> bytes:
    """Returns the content of quarantine.jsonl: all shards' images that could not be used."""
    lines = [
        canonical_json({"image_id": int(image_id), "reason": manifest.quarantined[image_id]})
        for manifest in manifests
        for image_id in sorted(manifest.quarantined, key=int)
    ]
    return b"".join(line + b"\n" for line in lines)
