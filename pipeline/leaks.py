"""Whether a proposal source has seen what the split calls novel (method B.6).

OV-COCO's novel categories are few and common, so a source that has learned their boxes finds them
as if they were base: refused. LVIS's are rare, and proposals of such sources are published beside
others: allowed, with a warning and a mark in the cache. Names alone are compared, and the source's
own words; no novel box is looked at.
"""

from dataclasses import dataclass
from typing import Any

from dkdetr.data.prompts import readable_name
from dkdetr.data.splits import Split
from dkdetr.errors import DataError
from pipeline.proposals import Seen

_SHOWN = 10


@dataclass(frozen=True)
class LeakCheck:
    """What is known of a source under a split's protocol; None: nobody knows."""

    seen: Seen
    uses_novel_names: bool | None
    saw_novel_boxes: bool | None
    reason: str
    """Why it leaks, or why nothing can be said; empty where all is well."""

    @property
    def leaks(self) -> bool:
        """True if it has certainly seen boxes or names that are novel here; with a reason."""
        return bool(self.reason and (self.uses_novel_names or self.saw_novel_boxes))

    def provenance(self) -> dict[str, Any]:
        """Returns what the cache keeps of it."""
        return {
            "source": self.seen.source,
            "detector": self.seen.detector,
            "uses_novel_names": _word(self.uses_novel_names),
            "saw_novel_boxes": _word(self.saw_novel_boxes),
            **({"why": self.reason} if self.reason else {}),
            **self.seen.details,
        }


def check_leaks(seen: Seen, split: Split) -> LeakCheck:
    """Returns what a source has seen of the split's novel categories.

    Raises:
        DataError: it has seen them, and the split's protocol is OV-COCO's.
    """
    found = _compare(seen, split)
    if found.leaks and split.protocol == "ovcoco":
        raise DataError(
            f"the proposals' source ({seen.source}) leaks novel categories of {split.name}: "
            f"{found.reason}. Scores on novel names would mean nothing; use --proposals fit, or a "
            "source that has learned from base boxes alone"
        )
    return found


def remarks(found: LeakCheck, split: Split) -> tuple[str, ...]:
    """Returns what a user should know of it, in lines."""
    if found.leaks:
        return (
            f"LEAK: the proposals' source has seen novel categories of {split.name}: "
            f"{found.reason}; the cache is marked, and its scores compare with no other's",
        )
    return (f"proposals: {found.reason}",) if found.reason else ()


def _compare(seen: Seen, split: Split) -> LeakCheck:
    novel = {readable_name(each.name): each for each in split.categories if not each.is_base}
    if not novel:
        return LeakCheck(seen, seen.uses_novel_names, seen.saw_novel_boxes, "")
    learned = sorted({readable_name(name) for name in seen.names} & set(novel))
    if learned:
        shown = ", ".join(learned[:_SHOWN])
        return LeakCheck(seen, True, True, f"it learned the boxes of {len(learned)}: {shown}")
    if seen.uses_novel_names or seen.saw_novel_boxes:
        reason = seen.reason or "it says that it has seen them"
        return LeakCheck(seen, seen.uses_novel_names, seen.saw_novel_boxes, reason)
    num_base = len(split.categories) - len(novel)
    labelled = [each.name for each in novel.values() if each.category_id in seen.category_ids]
    if labelled and len(seen.category_ids) > 1:
        shown = ", ".join(sorted(labelled)[:_SHOWN])
        reason = f"its boxes are labelled as {len(labelled)} of them: {shown}"
        return LeakCheck(seen, True, True, reason)
    if seen.num_classes > num_base:
        reason = f"it tells {seen.num_classes} classes apart, and only {num_base} are base"
        return LeakCheck(seen, True, True, reason)
    if seen.saw_novel_boxes is None:
        reason = (
            "nobody knows whether the file's detector has seen novel boxes; state it with "
            "'?novel=unseen' or '?novel=seen'"
        )
        return LeakCheck(seen, None, None, reason)
    return LeakCheck(seen, seen.uses_novel_names, seen.saw_novel_boxes, "")


def _word(flag: bool | None) -> bool | str:
    return "unknown" if flag is None else flag
