"""A local page: drop a picture, type words, see boxes; browse a cache and a run's curves.

It listens on 127.0.0.1 unless told otherwise, serves nothing by path (a route is a fixed name or
a number into a list made at the start) and fetches nothing. `serve_guard` says who may ask.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from anyio import to_thread
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from cache.spec import CacheError
from dkdetr.defaults import DEFAULT_THRESHOLD
from dkdetr.errors import DkdetrError, UsageError
from dkdetr.inference.picture_sources import PICTURE_TYPES
from dkdetr.inference.predict import DKDETR
from dkdetr.inference.serve_curves import curves_page
from dkdetr.inference.serve_finder import (
    MAX_NAMES,
    MAX_UPLOAD_BYTES,
    MAX_WORDS_LENGTH,
    Finder,
)
from dkdetr.inference.serve_guard import DOCUMENT_POLICY, Guard, allowed_hosts

_UPLOAD_SECONDS = 60
_MAX_REQUESTS_AT_ONCE = 24
_MAX_HEADER_BYTES = 64 * 1024
_UPLOAD_TYPES = frozenset({*PICTURE_TYPES.values(), "application/octet-stream"})
History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ServedParts:
    """What a page shows. What is None or empty has no place on it."""

    about: Mapping[str, str]
    """Label and value of each line at the page's foot."""
    detector: DKDETR | None = None
    words_problem: str = ""
    """Why words cannot be typed; empty: they can."""
    cache_page: Callable[[str], str] | None = None
    """From `images` (a number, or ids) to an HTML document."""
    histories: Callable[[], Mapping[str, History]] | None = None
    """The diaries of runs by their names, read anew each time."""
    report: Path | None = None
    examples: Sequence[Path] = ()
    """Pictures to try."""
    threshold: float = DEFAULT_THRESHOLD
    """Where the slider of scores begins."""


def build_app(parts: ServedParts, hosts: frozenset[str]) -> Guard:
    """Returns the ASGI application; `hosts` are the Host headers that are answered."""
    page = _Page(parts)
    routes = [
        Route("/", page.home),
        Route("/page.css", page.style),
        Route("/page.js", page.script),
        Route("/api/about", page.about),
        Route("/api/predict", page.predict, methods=["POST"]),
        Route("/examples/{number:int}", page.example),
        Route("/cache", page.cache),
        Route("/curves", page.curves),
        Route("/report", page.report),
    ]
    return Guard(Starlette(routes=routes), hosts)


def serve(
    parts: ServedParts,
    *,
    host: str,
    port: int,
    say: Callable[[str], None],
    opened: Callable[[str], None] | None = None,
) -> None:
    """Serves until Ctrl-C or SIGTERM.

    Args:
        parts: what is shown.
        host: one address of this machine; anybody who reaches it can use the page.
        port: 0 takes a free one.
        say: told the page's address once it can be opened.
        opened: told the bare address.

    Raises:
        UsageError: an address that is not this machine's, or a port in use.
    """
    listener = listen(host, port)
    # What it is bound to, not how it was spelt: 0 and 0.0 are 0.0.0.0.
    bound = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    if bound.is_unspecified:
        listener.close()
        raise UsageError(
            f"--host {host} would listen everywhere, without a password: name one address, or "
            "keep 127.0.0.1 and reach it through a tunnel (ssh -L)"
        )
    shown = f"[{host}]" if ":" in host else host
    if not bound.is_loopback:
        say(f"anybody who reaches {shown} can use this page: it has no password")
    address = f"http://{shown}:{listener.getsockname()[1]}/"
    say(f"{address}  (Ctrl-C ends it)")
    if opened is not None:
        opened(address)
    with listener:
        make_server(parts, host, listener).run(sockets=[listener])


def make_server(parts: ServedParts, host: str, listener: socket.socket) -> uvicorn.Server:
    """Returns the server of a socket that `listen` opened on `host`; it is not started."""
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        build_app(parts, allowed_hosts(host, port)),
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        server_header=False,
        limit_concurrency=_MAX_REQUESTS_AT_ONCE,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket; port 0 takes a free one.

    Raises:
        UsageError: an address that is not this machine's, or a port in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise UsageError(f"cannot listen on {host}, port {port}: {error}; try --port 0") from None
    return listener


class _Page:
    """The routes."""

    def __init__(self, parts: ServedParts) -> None:
        self._parts = parts
        self._finder = Finder(parts.detector) if parts.detector else None
        # One at a time: a student's forward pass takes the whole machine.
        self._turn = anyio.CapacityLimiter(1)

    async def home(self, request: Request) -> Response:
        """The page itself, the same for everybody."""
        del request
        return HTMLResponse(_asset("serve_page.html"))

    async def style(self, request: Request) -> Response:
        """Its style."""
        del request
        return Response(_asset("serve_page.css"), media_type="text/css")

    async def script(self, request: Request) -> Response:
        """Its script."""
        del request
        return Response(_asset("serve_page.js"), media_type="text/javascript")

    async def about(self, request: Request) -> Response:
        """What there is to see, and the limits."""
        del request
        parts = self._parts
        return JSONResponse(
            {
                "about": dict(parts.about),
                "student": self._finder is not None,
                "names": list(self._finder.own_names) if self._finder else [],
                "words_problem": parts.words_problem,
                "threshold": parts.threshold,
                "max_bytes": MAX_UPLOAD_BYTES,
                "max_names": MAX_NAMES,
                "max_words": MAX_WORDS_LENGTH,
                "examples": [path.name for path in parts.examples],
                "cache": parts.cache_page is not None,
                "curves": parts.histories is not None,
                "report": parts.report is not None,
            }
        )

    async def predict(self, request: Request) -> Response:
        """Boxes for the picture in the request's body and the names in its address."""
        if self._finder is None:
            return _error(404, "no student is served: dkdetr serve RUN")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in _UPLOAD_TYPES:
            return _error(415, f"send a picture (JPEG, PNG, WebP, BMP), not '{kind[:80]}'")
        try:
            data = await _body(request)
        except _TooLargeError:
            return _error(413, f"the picture is larger than {MAX_UPLOAD_BYTES // 2**20} MB")
        except TimeoutError:
            return _error(408, f"the picture did not come within {_UPLOAD_SECONDS} s")
        except ClientDisconnect:
            return _error(400, "the connection ended before the picture did")
        words = request.query_params.get("words", "")
        try:
            found = await to_thread.run_sync(self._finder.find, data, words, limiter=self._turn)
        except DkdetrError as error:
            return _error(422, str(error))
        return JSONResponse(found)

    async def example(self, request: Request) -> Response:
        """One of the pictures to try, by its number."""
        number = request.path_params["number"]
        if number >= len(self._parts.examples):
            return _error(404, "there is no such picture")
        path = self._parts.examples[number]
        if not path.is_file():
            return _error(404, f"'{path.name}' is gone")
        content = await to_thread.run_sync(path.read_bytes)
        return Response(content, media_type=PICTURE_TYPES[path.suffix.lower()])

    async def cache(self, request: Request) -> Response:
        """Regions of the cache, their neighbours and the teacher's names."""
        if self._parts.cache_page is None:
            return _error(404, "no cache is served: dkdetr serve --cache PATH")
        images = request.query_params.get("images", "6")
        try:
            page = await to_thread.run_sync(self._parts.cache_page, images, limiter=self._turn)
        except (DkdetrError, CacheError) as error:
            return _error(422, str(error))
        return _document(page)

    async def curves(self, request: Request) -> Response:
        """The losses of the runs so far."""
        del request
        histories = self._parts.histories
        if histories is None:
            return _error(404, "no run is served: dkdetr serve RUN")
        # Beside the loop: a long diary would hold every other request up.
        return _document(await to_thread.run_sync(lambda: curves_page(histories())))

    async def report(self, request: Request) -> Response:
        """The page that `dkdetr report` or the demo wrote."""
        del request
        path = self._parts.report
        if path is None or not path.is_file():
            return _error(404, "there is no report: dkdetr report RUN")
        return _document(await to_thread.run_sync(lambda: path.read_text(encoding="utf-8")))


class _TooLargeError(Exception):
    """The body is longer than is read."""


async def _body(request: Request) -> bytes:
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > MAX_UPLOAD_BYTES:
        raise _TooLargeError
    data = bytearray()
    async with asyncio.timeout(_UPLOAD_SECONDS):
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_UPLOAD_BYTES:
                raise _TooLargeError
    return bytes(data)


def _document(html: str) -> Response:
    return HTMLResponse(html, headers={"content-security-policy": DOCUMENT_POLICY})


def _error(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status_code=status)


def _asset(name: str) -> str:
    return (files("dkdetr.inference") / name).read_text(encoding="utf-8")
