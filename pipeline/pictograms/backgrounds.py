"""Backgrounds without any third-party picture: gradients, noise, textures, nameless shapes."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

_SHAPES = ("ellipse", "polygon", "line", "arc", "rectangle")
_SUPERSAMPLING = 2


def make_background(generator: np.random.Generator, size: int) -> np.ndarray:
    """Returns a textured square [size, size, 3] float32 in 0..1 with some distractor shapes."""
    paint = _KINDS[generator.integers(len(_KINDS))]
    pixels = paint(generator, size)
    if generator.random() < 0.7:
        strength = generator.uniform(0.02, 0.15)
        pixels = pixels + strength * (_noise(generator, size)[..., None] - 0.5)
    return _with_shapes(generator, np.clip(pixels, 0, 1), num_shapes=int(generator.integers(0, 7)))


def draw_shape(
    generator: np.random.Generator, draw: ImageDraw.ImageDraw,
    *, centre_xy: tuple[float, float], extent: float, colour: tuple[int, ...],
) -> None:  # fmt: skip
    """Draws one nameless shape of about `extent` pixels around a point."""
    x, y = centre_xy
    half_w, half_h = extent / 2 * generator.uniform(0.5, 1, 2)
    box = (x - half_w, y - half_h, x + half_w, y + half_h)
    width = max(1, round(extent * generator.uniform(0.05, 0.2)))
    match _SHAPES[generator.integers(len(_SHAPES))]:
        case "ellipse":
            draw.ellipse(box, fill=colour)
        case "rectangle":
            draw.rectangle(box, fill=colour)
        case "arc":
            draw.arc(box, *sorted(generator.uniform(0, 360, 2)), fill=colour, width=width)
        case "line":
            draw.line(box, fill=colour, width=width)
        case _:
            angles = np.sort(generator.uniform(0, 2 * np.pi, generator.integers(3, 7)))
            corners = np.stack([x + half_w * np.cos(angles), y + half_h * np.sin(angles)], 1)
            draw.polygon([(float(a), float(b)) for a, b in corners], fill=colour)


def random_colour(generator: np.random.Generator) -> np.ndarray:
    """Returns [3] float32 in 0..1: greyish more often than vivid, as most of the world is."""
    grey = generator.uniform(0.1, 0.95)
    tint = generator.uniform(-1, 1, 3) * generator.uniform(0.02, 0.45)
    return np.clip(grey + tint, 0, 1).astype(np.float32)


def _with_shapes(
    generator: np.random.Generator, pixels: np.ndarray, *, num_shapes: int
) -> np.ndarray:
    if not num_shapes:
        return pixels
    size = len(pixels)
    large = size * _SUPERSAMPLING
    layer = Image.new("RGBA", (large, large), (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for _ in range(num_shapes):
        colour = tuple(int(c) for c in (random_colour(generator) * 255).round())
        opacity = int(generator.integers(110, 256))
        draw_shape(
            generator, draw,
            centre_xy=(generator.uniform(0, large), generator.uniform(0, large)),
            extent=large * generator.uniform(0.06, 0.4), colour=(*colour, opacity),
        )  # fmt: skip
    shapes = layer.resize((size, size), Image.Resampling.BOX)
    over = np.asarray(shapes, dtype=np.float32) / 255
    alpha = over[..., 3:]
    return pixels * (1 - alpha) + over[..., :3] * alpha


def _noise(generator: np.random.Generator, size: int) -> np.ndarray:
    """Returns value noise [size, size] float32 in 0..1, rough or smooth."""
    field = np.zeros((size, size), dtype=np.float32)
    weight, total, cells = 1.0, 0.0, int(generator.integers(2, 6))
    persistence = generator.uniform(0.35, 0.8)
    while cells <= size:
        coarse = Image.fromarray(generator.random((cells, cells), dtype=np.float32))
        field += weight * np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
        total += weight
        weight, cells = weight * persistence, cells * 2
    return np.clip(field / total, 0, 1)


def _mix(share: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first + share[..., None].astype(np.float32) * (second - first)


def _ramp(generator: np.random.Generator, size: int) -> np.ndarray:
    """Returns positions [size, size] along a random direction, about 0..1 across the square."""
    angle = generator.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    return np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None] + 0.5


def _plain(generator: np.random.Generator, size: int) -> np.ndarray:
    return np.broadcast_to(random_colour(generator), (size, size, 3))


def _gradient(generator: np.random.Generator, size: int) -> np.ndarray:
    share = np.clip(_ramp(generator, size), 0, 1)
    return _mix(share, random_colour(generator), random_colour(generator))


def _spotlight(generator: np.random.Generator, size: int) -> np.ndarray:
    axis = np.linspace(0, 1, size, dtype=np.float32)
    x, y = generator.uniform(0, 1, 2)
    distance = np.hypot(axis[None, :] - x, axis[:, None] - y)
    share = np.clip(distance * generator.uniform(0.8, 1.6), 0, 1)
    return _mix(share, random_colour(generator), random_colour(generator))


def _clouds(generator: np.random.Generator, size: int) -> np.ndarray:
    share = np.clip((_noise(generator, size) - 0.5) * generator.uniform(1.5, 4) + 0.5, 0, 1)
    return _mix(share, random_colour(generator), random_colour(generator))


def _stripes(generator: np.random.Generator, size: int) -> np.ndarray:
    waves = np.sin(_ramp(generator, size) * generator.uniform(3, 18) * 2 * np.pi)
    share = np.clip(0.5 + waves * generator.uniform(0.5, 4), 0, 1)
    return _mix(share, random_colour(generator), random_colour(generator))


def _checks(generator: np.random.Generator, size: int) -> np.ndarray:
    count = generator.uniform(3, 14)
    across, along = _ramp(generator, size), _ramp(generator, size)
    share = (np.floor(across * count) + np.floor(along * count)) % 2
    first = random_colour(generator)
    second = first + generator.uniform(0.15, 0.7) * (random_colour(generator) - first)
    return _mix(share, first, second)


def _grain(generator: np.random.Generator, size: int) -> np.ndarray:
    """Wood or cloth: noise drawn out along one axis."""
    rows = int(generator.integers(8, size // 2))
    stretched = Image.fromarray(generator.random((rows, 3), dtype=np.float32))
    share = np.asarray(stretched.resize((size, size), Image.Resampling.BICUBIC))
    if generator.random() < 0.5:
        share = share.T
    return _mix(np.clip(share, 0, 1), random_colour(generator), random_colour(generator))


def _patches(generator: np.random.Generator, size: int) -> np.ndarray:
    """Flat regions around random points, as walls, floors and table tops meet."""
    num_points = int(generator.integers(2, 9))
    points = generator.uniform(0, size, (num_points, 2)).astype(np.float32)
    axis = np.arange(size, dtype=np.float32)
    distances = (axis[None, :, None] - points[:, 0]) ** 2 + (
        axis[:, None, None] - points[:, 1]
    ) ** 2
    colours = np.stack([random_colour(generator) for _ in range(num_points)])
    return colours[distances.argmin(-1)]


_KINDS: tuple[Callable[[np.random.Generator, int], np.ndarray], ...] = (
    _plain,
    _gradient,
    _spotlight,
    _clouds,
    _clouds,
    _stripes,
    _checks,
    _grain,
    _patches,
)
