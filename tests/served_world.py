"""A local page on a tiny student, a coloured cache and a short diary, served from a thread."""

import contextlib
import http.client
import io
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from cache.neighbors import NeighborSettings
from dkdetr.inference.predict import DKDETR
from dkdetr.inference.serve import ServedParts, listen, make_server
from pipeline.browse import CacheBrowser
from pipeline.neighbor_stage import ensure_neighbors
from tests.colored_cache import write_colored_cache

EVIL = ("<b>red</b>", 'green" onload="x', "blue & <script>alert(1)</script>", "yellow")


def encoded(height: int = 60, width: int = 90, kind: str = "PNG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def lying(orientation: int, kind: str) -> bytes:
    """A picture of 60 x 90, its upper half blue and its lower red, stored as a camera was held."""
    upright = np.zeros((90, 60, 3), dtype=np.uint8)
    upright[:45, :, 2] = upright[45:, :, 0] = 255
    turns = {1: 0, 3: 2, 6: 1, 8: -1}
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.rot90(upright, turns[orientation])).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def served_parts(folder: Path, detector: DKDETR) -> ServedParts:
    cache = write_colored_cache(folder / "colored", names=EVIL)
    ensure_neighbors(cache, NeighborSettings(k=3))
    browser = CacheBrowser(cache, folder)
    (folder / "größe <b>1.png").write_bytes(encoded())
    (folder / "report.html").write_text("<!doctype html><title>r</title>the report")
    diary = [{"iteration": step, "total": 9.0 - step / 10, "skd": 1.0} for step in range(0, 60, 20)]
    return ServedParts(
        about={"student": "<u>tiny</u>"},
        detector=detector,
        cache_page=lambda images: browser.page(images, served=True).html,
        histories=lambda: {"<s>mine</s>": diary, "fresh": []},
        report=folder / "report.html",
        examples=(folder / "größe <b>1.png",),
    )


@contextlib.contextmanager
def serving(parts: ServedParts) -> Iterator[int]:
    """Yields the port on 127.0.0.1."""
    with listen("127.0.0.1", 0) as listener:
        server = make_server(parts, "127.0.0.1", listener)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=500)
            assert not thread.is_alive(), "the server does not end"


def ask(
    port: int,
    method: str,
    path: str,
    *,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Returns status, headers and body; nothing is tidied on the way, the path neither."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=500)
    try:
        connection.request(method, path, body=body, headers=dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()
