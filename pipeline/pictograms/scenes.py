"""Scenes: a plan drawn from a seed alone, and its rendering to pixels and visible masks.

The plan never looks at pixels, so which objects stand where is the same on every platform; only
the last pixel of a box may hang on the rasteriser.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pipeline.pictograms.backgrounds import draw_shape, make_background, random_colour
from pipeline.pictograms.drawings import Drawing, render_style, styles

_MAX_OVERLAP = 0.2
_PLACEMENT_TRIES = 20
_MIN_VISIBLE = 0.4
_SPRITE_MARGIN = 2


@dataclass(frozen=True)
class PlannedObject:
    """One drawing to be set into a scene; lengths are pixels of the scene.

    Attributes:
        label: index of the drawing among those of the world.
        style: see `drawings.styles`.
        centre_xy: of the drawing's frame.
        side: its longer side before it is turned.
        angle: degrees.
        flipped: left and right exchanged.
        corner_shifts: perspective: how far each corner moves, as shares of the side.
        gains: what each colour channel is multiplied with.
    """

    label: int
    style: str
    centre_xy: tuple[float, float]
    side: float
    angle: float
    flipped: bool
    corner_shifts: tuple[float, ...]
    gains: tuple[float, float, float]


@dataclass(frozen=True)
class ScenePlan:
    """What stands in a scene, drawn later-over-earlier, and the seed of everything else in it."""

    size: int
    objects: tuple[PlannedObject, ...]
    pixel_seed: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Attributes:
        jpeg: the picture, RGB, size x size, with the marks of its compression.
        masks: [num_objects, size, size] bool: what is visible of each planned object.
    """

    jpeg: bytes
    masks: np.ndarray

    @property
    def pixels(self) -> np.ndarray:
        """The decoded picture [size, size, 3] uint8."""
        return np.array(Image.open(io.BytesIO(self.jpeg)))

    @property
    def boxes_xyxy(self) -> np.ndarray:
        """Tight boxes [num_objects, 4] float32 around the visible pixels (right, bottom open)."""
        return np.array([_tight_box(mask) for mask in self.masks], np.float32).reshape(-1, 4)


class SpriteBank:
    """Rendered drawings of a world, each rasterised once, in halving resolutions."""

    def __init__(self, drawings: Sequence[Drawing]) -> None:
        self.drawings = tuple(drawings)
        self._pyramids: dict[tuple[int, str], tuple[Image.Image, ...]] = {}

    def pyramid(self, label: int, style: str) -> tuple[Image.Image, ...]:
        """Returns the RGBA picture at full, half and quarter size; falls back to style `full`."""
        key = (label, style)
        if key not in self._pyramids:
            self._pyramids[key] = self._render(label, style)
        return self._pyramids[key]

    def _render(self, label: int, style: str) -> tuple[Image.Image, ...]:
        pixels = render_style(self.drawings[label], style)
        if pixels is None and style != "full":
            # Nothing is left of a few drawings without their outlines, say: show them whole.
            return self.pyramid(label, "full")
        assert pixels is not None, f"drawing {self.drawings[label].stem} is empty"
        margin = ((_SPRITE_MARGIN, _SPRITE_MARGIN),) * 2 + ((0, 0),)
        padded = np.pad(np.round(pixels * 255).astype(np.uint8), margin)
        full = Image.fromarray(padded, "RGBA")
        levels = [full]
        for factor in (2, 4):
            small = (max(1, round(full.width / factor)), max(1, round(full.height / factor)))
            levels.append(full.resize(small, Image.Resampling.BOX))
        return tuple(levels)


def plan_scene(
    seed: tuple[int, ...], *, size: int, num_objects: int, side_range: tuple[float, float],
    held_out_style: bool, draw_label: Callable[[np.random.Generator], int],
) -> ScenePlan:  # fmt: skip
    """Returns a plan of up to `num_objects` objects (fewer where there is no room).

    Args:
        seed: the plan is a pure function of it (and of the other arguments).
        size: side of the scene in pixels.
        num_objects: objects wanted.
        side_range: least and largest longer side of an object, drawn log-uniformly.
        held_out_style: draw the held-out style instead of those of training.
        draw_label: called once for every object that found its place.
    """
    generator = np.random.default_rng((*seed, 0))
    style_names = styles(held_out=held_out_style)
    placed: list[tuple[float, float, float]] = []
    objects: list[PlannedObject] = []
    for _ in range(num_objects):
        place = _free_place(generator, size, side_range, placed)
        if place is None:
            continue
        placed.append(place)
        x, y, side = place
        shifts = generator.uniform(-1, 1, 8) * generator.choice([0.02, 0.12])
        gains = generator.uniform(0.75, 1.1) * generator.uniform(0.88, 1.12, 3)
        objects.append(
            PlannedObject(
                label=draw_label(generator),
                style=style_names[generator.integers(len(style_names))],
                centre_xy=(x, y),
                side=side,
                angle=float(np.clip(generator.normal(0, 14), -40, 40)),
                flipped=bool(generator.random() < 0.5),
                corner_shifts=tuple(float(shift) for shift in shifts),
                gains=(float(gains[0]), float(gains[1]), float(gains[2])),
            )
        )
    objects.sort(key=lambda planned: -planned.side)  # small ones in front
    return ScenePlan(size=size, objects=tuple(objects), pixel_seed=(*seed, 1))


def render_scene(plan: ScenePlan, sprites: SpriteBank) -> Scene:
    """Returns the plan's picture; a pure function of the plan and the rasterised drawings."""
    generator = np.random.default_rng(plan.pixel_seed)
    pixels = make_background(generator, plan.size)
    cutouts = [_cut_out(planned, sprites, plan.size) for planned in plan.objects]
    owner = np.full((plan.size, plan.size), -1, dtype=np.int16)
    for index, cutout in enumerate(cutouts):
        _paint(pixels, owner, cutout, index)
    _occlude(generator, plan, pixels, owner)
    for index, cutout in enumerate(cutouts):
        visible = np.count_nonzero(owner == index)
        if visible < _MIN_VISIBLE * np.count_nonzero(_solid(cutout[1])):
            _paint(pixels, owner, cutout, index)  # hardly seen: bring it to the front
    masks = owner[None] == np.arange(len(cutouts), dtype=np.int16)[:, None, None]
    return Scene(jpeg=_photograph(generator, pixels), masks=masks)


def _free_place(
    generator: np.random.Generator,
    size: int,
    side_range: tuple[float, float],
    placed: Sequence[tuple[float, float, float]],
) -> tuple[float, float, float] | None:
    low, high = np.log(side_range)
    for _ in range(_PLACEMENT_TRIES):
        side = float(np.exp(generator.uniform(low, high)))
        # Now and then an object leaves the picture by up to a fifth of its side.
        margin = side * (0.3 if generator.random() < 0.15 else 0.5)
        x, y = (float(v) for v in generator.uniform(margin, size - margin, 2))
        if all(_overlap((x, y, side), other) <= _MAX_OVERLAP for other in placed):
            return x, y, side
    return None


def _overlap(first: tuple[float, float, float], second: tuple[float, float, float]) -> float:
    """Shared area of two squares (centre and side) over the smaller one's."""
    reach = (first[2] + second[2]) / 2
    smaller = min(first[2], second[2])
    width = min(reach - abs(first[0] - second[0]), smaller)
    height = min(reach - abs(first[1] - second[1]), smaller)
    return max(width, 0.0) * max(height, 0.0) / smaller**2


def _cut_out(
    planned: PlannedObject, sprites: SpriteBank, size: int
) -> tuple[tuple[int, int], np.ndarray]:
    """Returns (left, top) and the warped drawing [height, width, 4] float32, inside the scene.

    A perspective that folds a flat drawing over itself leaves nothing of it: then it has none.
    """
    place, layer = _warp(planned, sprites, size)
    if not _solid(layer).any():
        flat = replace(planned, corner_shifts=(0.0,) * len(planned.corner_shifts))
        return _warp(flat, sprites, size)
    return place, layer


def _warp(
    planned: PlannedObject, sprites: SpriteBank, size: int
) -> tuple[tuple[int, int], np.ndarray]:
    pyramid = sprites.pyramid(planned.label, planned.style)
    scale = max(pyramid[0].size) / planned.side
    sprite = pyramid[min(int(np.log2(max(scale, 1.0)) + 0.3), len(pyramid) - 1)]
    corners = _corners(planned, aspect=sprite.width / sprite.height)
    left, top = np.maximum(np.floor(corners.min(0)), 0).astype(int)
    right, bottom = np.minimum(np.ceil(corners.max(0)), size).astype(int)
    source = _rectangle(sprite.width, sprite.height)
    if planned.flipped:
        source[:, 0] = sprite.width - source[:, 0]
    warped = sprite.transform(
        (int(right - left), int(bottom - top)),
        Image.Transform.PERSPECTIVE,
        _homography(corners - (left, top), source),
        Image.Resampling.BICUBIC,
    )
    pixels = np.asarray(warped, dtype=np.float32) / 255
    colour = np.clip(pixels[..., :3] * np.array(planned.gains, np.float32), 0, 1)
    return (int(left), int(top)), np.concatenate([colour, pixels[..., 3:]], axis=-1)


def _rectangle(width: float, height: float) -> np.ndarray:
    return np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float64)


def _corners(planned: PlannedObject, *, aspect: float) -> np.ndarray:
    """Returns where the four corners of the drawing's frame fall in the scene, [4, 2]."""
    width, height = planned.side * min(1, aspect), planned.side * min(1, 1 / aspect)
    centred = _rectangle(width, height) - (width / 2, height / 2)
    centred += np.reshape(planned.corner_shifts, (4, 2)) * planned.side
    angle = np.deg2rad(planned.angle)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return centred @ turn + planned.centre_xy


def _homography(target: np.ndarray, source: np.ndarray) -> tuple[float, ...]:
    """Returns Pillow's eight coefficients of the projection that takes target to source."""
    rows: list[list[float]] = []
    for (x, y), (u, v) in zip(target, source, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    return tuple(float(c) for c in np.linalg.solve(np.array(rows), source.reshape(-1)))


def _paint(
    pixels: np.ndarray, owner: np.ndarray, cutout: tuple[tuple[int, int], np.ndarray], index: int
) -> None:
    (left, top), layer = cutout
    height, width = layer.shape[:2]
    window = (slice(top, top + height), slice(left, left + width))
    alpha = layer[..., 3:]
    pixels[window] = pixels[window] * (1 - alpha) + layer[..., :3] * alpha
    owner[window][_solid(layer)] = index


def _solid(layer: np.ndarray) -> np.ndarray:
    """Returns where a cut-out counts as visible; strokes thinner than a pixel never get opaque."""
    alpha = layer[..., 3]
    return alpha > 0.5 * min(1.0, float(alpha.max()))


def _occlude(
    generator: np.random.Generator, plan: ScenePlan, pixels: np.ndarray, owner: np.ndarray
) -> None:
    """Lays a nameless shape over the edge of some objects."""
    for planned in plan.objects:
        if generator.random() > 0.15:
            continue
        angle = generator.uniform(0, 2 * np.pi)
        x, y = np.array(planned.centre_xy) + 0.45 * planned.side * np.array(
            [np.cos(angle), np.sin(angle)]
        )
        layer = Image.new("L", (plan.size, plan.size), 0)
        extent = planned.side * generator.uniform(0.25, 0.5)
        draw_shape(generator, ImageDraw.Draw(layer), centre_xy=(x, y), extent=extent, colour=(255,))
        covered = np.asarray(layer) > 127
        pixels[covered] = random_colour(generator)
        owner[covered] = -1


def _photograph(generator: np.random.Generator, pixels: np.ndarray) -> bytes:
    """Returns the picture as a camera might have taken it: light, noise, blur, JPEG."""
    light = generator.uniform(0.8, 1.15) * generator.uniform(0.94, 1.06, 3)
    noise = generator.normal(0, generator.uniform(0, 0.025), pixels.shape)
    lit = np.clip(pixels * light + noise, 0, 1)
    image = Image.fromarray(np.round(lit * 255).astype(np.uint8), "RGB")
    if generator.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(float(generator.uniform(0.3, 0.9))))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=int(generator.integers(60, 96)))
    return data.getvalue()


def _tight_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
