"""Who may ask: the bearer token, and no other website through a person's browser."""

import hmac
import ipaddress
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fact_infer.service.metrics import Metrics

_GUARDED = ("/v1/", "/metrics", "/docs", "/openapi.json")
"""What needs the token. Load balancers have none, and the page has a login of its own."""


class Guard:
    """ASGI middleware: refuses who may not ask, and counts all responses.

    On a loopback address only loopback names are answered (else a website could point a name of its
    own there), and a browser's request from another site's page never.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, loopback: bool, metrics: Metrics):
        self._app, self._loopback, self._metrics = app, loopback, metrics
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            refused = scope["type"] == "websocket" and self._refusal(scope)
            return None if refused else await self._app(scope, receive, send)

        if scope["method"] == "HEAD":  # answered as GET; the server leaves the body out
            scope = {**scope, "method": "GET"}

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.responses.labels(route, str(message["status"])).inc()
                headers = message.setdefault("headers", [])
                headers.append((b"x-content-type-options", b"nosniff"))
            await send(message)

        if (refusal := self._refusal(scope)) is not None:
            status, text = refusal
            more = {"WWW-Authenticate": "Bearer"} if status == 401 else None
            return await JSONResponse({"detail": text}, status, more)(scope, receive, counted)
        await self._app(scope, receive, counted)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy in front may go by the other: what is left would be a request of its own.
            return 400, "send Content-Length or Transfer-Encoding, not both"
        if self._loopback and not is_loopback(_name(host)):
            return 403, "this service answers on this machine alone: ask for localhost"
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "a page of another site may not ask"
        if self._token is None or not scope["path"].startswith(_GUARDED):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), self._token):
            return None
        return 401, "send the header Authorization: Bearer TOKEN"


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, as seen from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in ("localhost", "testserver")


def warning_of(host: str, token: Any) -> str | None:
    """What to tell an operator whose service anyone in the network can reach."""
    if is_loopback(host) or token:
        return None
    return f"anyone who reaches {host} can draw here: --token-file asks for a token"
