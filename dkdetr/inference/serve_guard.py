"""Who may ask the local page for what: its own tab, and nobody else's.

A page on 127.0.0.1 is reachable from every site that the same browser shows. Three things keep
those out: the Host header must be this server's (a name that somebody else's DNS points here is
not), what is posted must come from the page itself and what is asked for must not be part of
somebody else's (Origin, Sec-Fetch-Site; a link may be followed), and no answer may be framed,
sniffed, kept or read by another origin.
"""

from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The content security policy of whatever sets no other."""
DOCUMENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
"""For documents that carry their own style and pictures, and no script at all."""
_HEADERS = {
    "content-security-policy": PAGE_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_DEFAULT_PORT = 80


@dataclass(frozen=True)
class Refusal:
    """Why a request is not answered."""

    status: int
    reason: str


def allowed_hosts(address: str, port: int) -> frozenset[str]:
    """Returns the Host headers that mean this server: its address, and localhost's names."""
    own = f"[{address}]" if ":" in address else address
    names = {own, *_LOOPBACK} if own in _LOOPBACK else {own}
    hosts = {f"{name}:{port}" for name in names}
    return frozenset(hosts | names if port == _DEFAULT_PORT else hosts)


def refusal(method: str, headers: Headers, hosts: frozenset[str]) -> Refusal | None:
    """Returns why a request must not be answered, or None."""
    host = headers.get("host", "")
    if host.lower() not in hosts or len(headers.getlist("host")) != 1:
        return Refusal(421, f"this server is not '{host[:80]}': open the address that it printed")
    if method in ("GET", "HEAD"):
        followed = {headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")}
        if headers.get("sec-fetch-site") == "cross-site" and followed != {"navigate", "document"}:
            return Refusal(403, "a page of another site may not ask for this")
        return None
    origin = headers.get("origin")
    if origin is not None and origin.lower() != f"http://{host.lower()}":
        return Refusal(403, "a page of another origin may not ask for this")
    if headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return Refusal(403, "a page of another site may not ask for this")
    return None


class Guard:
    """Refuses strangers and puts the security headers on every answer.

    Args:
        app: what answers the others.
        hosts: see `allowed_hosts`.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or hands it on."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = refusal(scope["method"], Headers(scope=scope), self._hosts)
        answer = self._app
        if refused is not None:
            answer = JSONResponse({"error": refused.reason}, status_code=refused.status)
        await answer(scope, receive, send_with_headers)
