"""Pascal VOC: one XML file an image, read without trusting it.

Corners are one-based and include the last pixel; here a box is [x, y, width, height] in pixels
from 0, as everywhere else, so that x + width is the picture's edge.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np

from dkdetr.data.annotations import Annotations, BoxTable, ImageInfo
from dkdetr.data.image_files import check_file_name
from dkdetr.data.problems import Problems
from dkdetr.errors import DataError

VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
"""Category ids are their places, from 1."""

_LARGEST_XML = 1 << 20
_DEEPEST = 32


class FaultyXmlError(DataError):
    """What is wrong with one file: a kind of fault, and what of it is this file's own."""

    def __init__(self, path: Path, kind: str, detail: str = "") -> None:
        super().__init__(f"{path}: {kind}" + (f" ({detail})" if detail else ""))
        self.kind, self.detail = kind, detail


@dataclass(frozen=True, eq=False)
class VocObjects:
    """All objects of a list of images, in file order; boxes are whole pixels.

    `image_ids` i64[n], `category_ids` i64[n], `boxes_xywh` f64[n, 4], `is_difficult` bool[n].
    """

    images: tuple[ImageInfo, ...]
    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh: np.ndarray
    is_difficult: np.ndarray


def voc_list_file(devkit: Path, name: str) -> Path:
    """Returns the file of a list: NAME or FOLDER/NAME below the devkit, as `VOC2007/test`.

    Raises:
        DataError: the name leads out of the devkit.
    """
    check_file_name(name)
    folder, _, stem = name.rpartition("/")
    return devkit / folder / "ImageSets" / "Main" / f"{stem.removesuffix('.txt')}.txt"


def voc_root(list_file: Path) -> Path:
    """Returns the folder that holds Annotations/ and JPEGImages/ of a list."""
    return list_file.parents[2]


def read_voc(list_file: Path, problems: Problems | None = None) -> Annotations:
    """Returns the images of a list and their boxes; difficult ones are marked as crowds.

    Raises:
        DataError: see `read_voc_objects`.
    """
    objects = read_voc_objects(list_file, problems)
    sizes = {image.image_id: (image.width, image.height) for image in objects.images}
    image_ids = np.array([image.image_id for image in objects.images], dtype=np.int64)
    boxes = objects.boxes_xywh
    limits = np.array([sizes[i] for i in objects.image_ids.tolist()]).reshape(-1, 2)
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
    cut = np.clip(corners, 0, np.concatenate((limits, limits), axis=1))
    num_cut = int((np.abs(cut - corners).max(axis=1, initial=0) > 1).sum())
    place = np.searchsorted(image_ids, objects.image_ids)
    order = np.argsort(place, kind="stable")
    counts = np.bincount(place, minlength=len(image_ids))
    table = BoxTable(
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        boxes_xyxy=cut.astype(np.float32)[order],
        category_ids=objects.category_ids[order],
        is_crowd=objects.is_difficult[order],
        file_rows=order,
    )
    records = tuple({"id": i, "name": name} for i, name in enumerate(VOC_NAMES, start=1))
    notes = (f"{num_cut} boxes stood out of their image and were cut",) if num_cut else ()
    return Annotations(objects.images, records, table, notes)


def read_voc_objects(list_file: Path, problems: Problems | None = None) -> VocObjects:
    """Returns the objects of a list's images as the files state them.

    The id of an image is its name's number (2008_000001: 2008000001) or, where the names are none,
    its place in the list. Images are in the order of their ids.

    Args:
        list_file: ROOT/ImageSets/Main/NAME.txt.
        problems: takes up what is wrong; without it the first bad files are an error.

    Raises:
        DataError: the list is missing, empty or holds a name that leaves the folder.
    """
    found = Problems(str(list_file)) if problems is None else problems
    names = _names(list_file)
    images: list[ImageInfo] = []
    rows: list[tuple[int, int, int, int, int, int, bool]] = []
    faulty: dict[str, list[str]] = {}
    for image_id, name in sorted(_numbered(names).items()):
        path = voc_root(list_file) / "Annotations" / f"{name}.xml"
        try:
            width, height, objects = _read_image(path)
        except FaultyXmlError as fault:
            of_kind = faulty.setdefault(fault.kind, [])
            of_kind.append(f"{name}.xml" + (f" ({fault.detail})" if fault.detail else ""))
            continue
        images.append(ImageInfo(image_id, f"{name}.jpg", height, width))
        rows += [(image_id, *each) for each in objects]
    for kind, files in faulty.items():
        found.add("annotation files", kind, files)
    if problems is None:
        found.raise_if_any()
    columns = np.array(rows, dtype=np.int64).reshape(-1, 7)
    return VocObjects(
        images=tuple(images),
        image_ids=columns[:, 0],
        category_ids=columns[:, 1],
        boxes_xywh=columns[:, 2:6].astype(np.float64),
        is_difficult=columns[:, 6].astype(bool),
    )


def _names(list_file: Path) -> list[str]:
    try:
        text = list_file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"no list of images {list_file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{list_file} is no list of image names: not UTF-8 text") from None
    # Lists of one category hold a mark behind each name; it does not matter which images those are.
    names = [line.split()[0] for line in text.splitlines() if line.split()]
    if not names:
        raise DataError(f"{list_file} is empty: a list holds one image name a line")
    for name in names:
        check_file_name(name)
    if len(set(names)) != len(names):
        twice = [name for name, count in Counter(names).items() if count > 1][:20]
        raise DataError(f"{list_file} names images twice: {', '.join(twice)}")
    return names


def _numbered(names: list[str]) -> dict[int, str]:
    digits = [name.replace("_", "") for name in names]
    if all(each.isascii() and each.isdigit() and len(each) < 18 for each in digits):
        numbered = dict(zip(map(int, digits), names, strict=True))
        if len(numbered) == len(names):
            return numbered
    return dict(enumerate(names, start=1))


def _read_image(path: Path) -> tuple[int, int, list[tuple[int, int, int, int, int, bool]]]:
    """Returns width, height and (category id, x, y, width, height, is difficult) of each object."""
    root = parse_xml(path)
    width, height = (_whole(root, f"size/{key}", path) for key in ("width", "height"))
    if width < 1 or height < 1:
        raise FaultyXmlError(path, "a size of nothing", f"{width} x {height}")
    objects: list[tuple[int, int, int, int, int, bool]] = []
    for number, each in enumerate(root.findall("object"), start=1):
        name = (each.findtext("name") or "").strip()
        if name not in VOC_NAMES:
            raise FaultyXmlError(
                path,
                "a name that VOC does not have (names of your own go into a coco: json)",
                f"object {number}: {name[:50]!r}",
            )
        keys = ("xmin", "ymin", "xmax", "ymax")
        left, top, right, bottom = (_whole(each, f"bndbox/{key}", path) for key in keys)
        if right < left or bottom < top or left > width or top > height or right < 1 or bottom < 1:
            raise FaultyXmlError(path, "an empty box or one out of its image", f"object {number}")
        difficult = (each.findtext("difficult") or "0").strip() == "1"
        box = (left - 1, top - 1, right - left + 1, bottom - top + 1)
        objects.append((VOC_NAMES.index(name) + 1, *box, difficult))
    return width, height, objects


def _whole(element: Element, where: str, path: Path) -> int:
    text = element.findtext(where) or ""
    try:
        return int(float(text))  # some files of later years hold fractions
    except (ValueError, OverflowError):
        raise FaultyXmlError(path, "no number", f"{where} is {text[:50]!r}") from None


def parse_xml(path: Path) -> Element:
    """Returns the root of a small XML file.

    Raises:
        FaultyXmlError: it cannot be read, is larger than 1 MiB, nests deeper than 32, or declares a
            document type: entities are how an XML file reads others or grows without end.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_XML + 1)
    except OSError as error:
        raise FaultyXmlError(path, str(error.strerror)) from None
    if len(text) > _LARGEST_XML:
        raise FaultyXmlError(path, f"larger than {_LARGEST_XML:,} bytes")
    builder, depth = TreeBuilder(), 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            raise FaultyXmlError(path, f"nested deeper than {_DEEPEST} elements")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = _refuse(path)
    try:
        parser.Parse(text, True)
        return builder.close()
    except (expat.ExpatError, AssertionError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise FaultyXmlError(path, "not XML", str(error)) from None


def _refuse(path: Path) -> Callable[..., Any]:
    def refuse(*_: Any) -> None:
        raise FaultyXmlError(path, "declares a document type or entities: refused")

    return refuse
