"""Pictures inside a page, so that it asks for no other file."""

import base64
import io

from PIL import Image

_SMALL_ENOUGH_FOR_PNG = 256


def data_uri(picture: Image.Image, *, always_jpeg: bool = True) -> str:
    """Returns the picture as a data address: JPEG, or PNG if it is small and that is wanted."""
    small = not always_jpeg and max(picture.size) <= _SMALL_ENOUGH_FOR_PNG
    encoded = io.BytesIO()
    if small:
        picture.save(encoded, "PNG", optimize=True)
    else:
        picture.save(encoded, "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"
