"""What `dkdetr cache info` and `dkdetr cache verify` say about a cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from cache.exported import is_export
from cache.location import CachePath, mending
from cache.neighbor_lists import load_parameters
from cache.spec import CorruptCacheError, UnsealedCacheError
from cache.store import CacheInfo, open_cache
from cache.verify import VerifyReport, verify_cache
from dkdetr.data.splits import load_split
from dkdetr.errors import DkdetrError
from dkdetr.progress import progress_of
from pipeline.network_check import why_lost
from pipeline.recall import Recall, cache_recall
from pipeline.zero_shot import ZeroShot, accuracy_by_mode, cached_accuracy, parse_modes

_SHOWN = 20


@dataclass(frozen=True)
class CacheDescription:
    """A cache in words."""

    info: CacheInfo
    names: Mapping[str, int]
    quarantined: Mapping[int, str]
    neighbors: Mapping[str, Any] | None
    """How the neighbour lists were made; None: there are none."""
    storage_error: tuple[float, float]
    """Mean and greatest 1 - cosine of what storing did to region embeddings."""

    def lines(self) -> list[str]:
        """Returns the description as a person reads it."""
        info = self.info
        random = "  RANDOM WEIGHTS: for trials only" if info.random_teacher else ""
        provenance = [
            f"  {key}: {_words(value)}"
            for key, value in info.provenance.items()
            if key not in ("canary", "request")
        ]
        return [
            f"cache      {info.path}, sealed, {info.bytes_on_disk / 1e6:.1f} MB",
            f"split      {info.split}: {info.num_images:,} images, "
            f"{len(self.quarantined)} set aside",
            f"regions    {info.num_regions:,}, at most {info.max_regions} an image, "
            f"{info.embed_dim} dimensions, {_words(info.parts['storage'])}",
            f"crops      {_words(info.parts['crops'])}",
            f"proposals  {_words(info.parts['proposals'])}",
            "storage    turns a region's embedding by 1 - cosine = {:.1e} in the mean, {:.1e} at "
            "most (measured when written)".format(*self.storage_error),
            f"teacher    {info.teacher}{random}",
            f"pictures   {self._cut_and_decoded()}",
            f"names      {self.names['base']} base, {self.names['novel']} novel",
            f"neighbours {self._neighbors()}",
            f"fingerprint {info.fingerprint}",
            f"root       {info.merkle_root}",
            "made by",
            *provenance,
            *(f"set aside  image {number}: {why}" for number, why in self.quarantined.items()),
        ]

    def _neighbors(self) -> str:
        if self.neighbors is None:
            return "none"
        return (
            f"of {self.neighbors['objects']:,} regions, {self.neighbors['search']} search, "
            f"recall {self.neighbors['recall']:.1%}"
        )

    def _cut_and_decoded(self) -> str:
        """Imported caches do not say."""
        decoder = self.info.parts.get("images", {}).get("decoder", "what is not known")
        resampling = self.info.parts["teacher"].get("resampling", "what is not known")
        return f"decoded by {decoder}; crops cut by {resampling}"

    def as_json(self) -> dict[str, Any]:
        """Returns the description as plain data."""
        return {
            **vars(self.info),
            "bytes_on_disk": self.info.bytes_on_disk,
            "names": dict(self.names),
            "quarantined": {str(number): why for number, why in self.quarantined.items()},
            "neighbors": self.neighbors,
            "storage_error": dict(zip(("mean", "max"), self.storage_error, strict=True)),
        }


def _words(value: Any) -> str:
    """Returns plain data in one line as a person reads it: `mode squash, scales 1.0 1.5`."""
    if isinstance(value, Mapping):
        table = cast("Mapping[str, Any]", value)
        return ", ".join(f"{key} {_words(entry)}" for key, entry in table.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_words(entry) for entry in cast("Sequence[Any]", value))
    return str(value)


@dataclass(frozen=True)
class CheckedCache:
    """The result of reading all of a cache, and its proposals' recall where it can be told."""

    report: VerifyReport
    recall: tuple[Recall, ...]
    zero_shot: tuple[ZeroShot, ...]
    no_recall: str
    """Why there is no recall; empty where there is."""
    next_command: str
    """What mends it, if anything is wrong."""

    def lines(self) -> list[str]:
        """Returns the result as a person reads it."""
        report = self.report
        state = "sealed" if report.sealed else "not sealed"
        text = [
            f"{report.path}: {state}, {report.num_shards} shards, {report.num_images:,} images, "
            f"{report.num_regions:,} regions, {report.num_gt:,} base boxes, "
            f"{report.num_quarantined} images set aside"
        ]
        text += [f"problem: {line}" for line in report.problems]
        text += [f"recall of {recall.line()}" for recall in self.recall if recall.shares]
        text += [each.line() for each in self.zero_shot]
        if self.no_recall:
            text.append(f"no recall: {self.no_recall}")
        return text if report.problems else [*text, "no problem found"]

    def as_json(self) -> dict[str, Any]:
        """Returns the result as plain data."""
        recall = {each.group: each.as_json() for each in self.recall}
        zero_shot = {each.mode: vars(each) for each in self.zero_shot}
        report = {**vars(self.report), "recall": recall, "zero_shot": zero_shot}
        return {**report, "no_recall": self.no_recall}

    def raise_problems(self) -> None:
        """Raises CorruptCacheError if there is any problem.

        UnsealedCacheError if it is none but that the cache was not finished.
        """
        if self.report.problems:
            raise (UnsealedCacheError if self.report.unfinished else CorruptCacheError)(
                f"{self.report.path} has {len(self.report.problems)} problem(s), listed above; "
                f"next: {self.next_command}"
            )


def describe_cache(path: CachePath) -> CacheDescription:
    """Returns what a sealed cache holds.

    Raises:
        CacheError: it is not sealed or damaged.
    """
    reader = open_cache(path)
    is_base = reader.text()[0]["is_base"]
    names = {"base": sum(is_base), "novel": len(is_base) - sum(is_base)}
    listed = load_parameters(path) if reader.neighbors() is not None else None
    return CacheDescription(
        reader.info,
        names,
        reader.quarantined,
        neighbors=listed,
        storage_error=reader.storage_error(),
    )


def verify_and_report(
    path: CachePath, data_root: Path, *, crop_modes: str = "", device: str = "auto"
) -> CheckedCache:
    """Returns what is wrong with a cache, its proposals' recall and its teacher's accuracy.

    What is wrong may be its network of `fit`, too: lost, damaged or another's; recall and accuracy
    are those of what it proposed then. Recall needs the split's annotations; where they are not at
    hand the result says so.

    Args:
        path: the cache.
        data_root: where the split lies.
        crop_modes: whose zero-shot accuracy is wanted besides the cached mode's: modes with
            commas, or `all`; needs the teacher's weights and the pictures.
        device: where the teacher runs for that.

    Raises:
        CacheError: there is no cache at all.
        DkdetrError: modes are asked for, and the teacher or the split is not at hand.
    """
    modes = parse_modes(crop_modes)
    mends = f"dkdetr cache export CACHE {path}" if is_export(path) else mending(path)
    with progress_of("verify") as advance:
        found = verify_cache(path, on_shard=advance)
    report = found
    if not is_export(path) and (lost := why_lost(path)):
        report = replace(found, problems=(*found.problems, lost), unfinished=False)
    if found.problems or not found.sealed:
        return CheckedCache(report, (), (), "the cache is not whole", mends)
    reader = open_cache(path)
    cached = cached_accuracy(reader)
    zero_shot = (cached,) if cached else ()
    try:
        split = load_split(reader.info.split, data_root)
    except DkdetrError as error:
        if modes:
            raise
        return CheckedCache(report, (), zero_shot, str(error), mends)
    if modes:
        zero_shot += accuracy_by_mode(reader, split, modes, device)
    return CheckedCache(report, cache_recall(reader, split), zero_shot, "", mends)
