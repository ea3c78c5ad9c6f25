"""Pictures as a viewer shows them: turned as their EXIF orientation says.

Only for pictures that nobody annotated. Boxes of data sets are drawn on the pixels as stored.
"""

import struct

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

AS_STORED = 1
_PROBLEMS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    struct.error,
    UserWarning,  # where the process takes warnings for errors
)
"""What Pillow raises of EXIF data that are not sound."""


def orientation_of(image: Image.Image) -> int:
    """Returns a picture's EXIF orientation, 1 (as stored) to 8; 1 where none can be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, AS_STORED)
    except _PROBLEMS:  # its pixels may be sound all the same
        return AS_STORED
    return orientation if orientation in range(2, 9) else AS_STORED


def turned_upright(
    pixels: UInt8[np.ndarray, "stored_height stored_width 3"], orientation: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns stored pixels as they are to be seen; from 5 on height and width change places."""
    if orientation in (2, 3, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7):
        pixels = pixels[::-1]
    if orientation in (5, 7):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (6, 8):
        pixels = np.rot90(pixels, 1 if orientation == 8 else -1)
    return np.ascontiguousarray(pixels)
