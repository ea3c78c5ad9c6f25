"""Pictures inside a page, so that it asks for no other file."""

import base64
import io

from PIL import Image


def data_uri(picture: Image.Image, *, png_up_to: int = 0) -> str:
    """Returns the picture as a data address: JPEG, or PNG if no side is longer than that."""
    small = max(picture.size) <= png_up_to
    encoded = io.BytesIO()
    if small:
        picture.save(encoded, "PNG", optimize=True)
    else:
        picture.save(encoded, "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"
