"""Bodies of requests: read within bounds of size and time, as JSON or as a form."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fact_infer.service.engine import Limits
from fact_infer.service.fields import MAX_ITEMS

_MAX_MARKS = 20_000
"""Brackets and commas of a JSON body, whose length is in its base64: a few bytes of them ask for
a lot of memory."""
_MAX_PARTS = 256
_LINGERING = 8
"""Times the largest body: how much is read and forgotten after an answer."""


async def read_body(request: Request, limits: Limits) -> dict[str, Any]:
    """The fields of a request: of a form, where what is repeated is a list, or of a JSON object.

    Raises HTTPException: 400, 408 (too slow), 413 (too large) or 415 (neither of the two).
    """
    kind, _, _ = request.headers.get("content-type", "").partition(";")
    kind = kind.strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise HTTPException(415, "send application/json or multipart/form-data")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limits.body:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limits.body:
                    raise _too_large(limits)
                body += chunk
    except TimeoutError:
        late = f"the request did not arrive within {limits.body_seconds:g} s"
        raise HTTPException(408, late) from None
    except ClientDisconnect:
        raise HTTPException(400, "the request ended early") from None
    if kind == "application/json":
        return await asyncio.to_thread(_read_json, bytes(body))
    return await _read_form(request.headers, bytes(body))


def _too_large(limits: Limits) -> HTTPException:
    return HTTPException(413, f"a request has at most {limits.body:,} bytes")


class LingeringClose:
    """ASGI middleware: an answer that comes before the end of a body can be read by who sends it.

    A server that closes while bytes arrive resets the connection, and the client's system may then
    throw the answer away. So it is sent whole, what still arrives is forgotten for at most
    ``limits.body_seconds`` and eight bodies, and the connection is closed only then.
    """

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            return await self._app(scope, receive, send)
        arriving = True

        async def received() -> Message:
            nonlocal arriving
            message = await receive()
            arriving = arriving and message.get("more_body", False)
            return message

        async def forget() -> None:
            size = 0
            while arriving and size < _LINGERING * self._limits.body:
                size += len((await received()).get("body", b""))

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and arriving:
                more = [*message.get("headers", []), (b"connection", b"close")]
                message = {**message, "headers": more}
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not (last and arriving):
                return await send(message)
            await send({**message, "more_body": True})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(forget(), self._limits.body_seconds)
            await send({"type": "http.response.body", "body": b""})

        await self._app(scope, received, sent)


def _read_json(body: bytes) -> dict[str, Any]:
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > _MAX_MARKS:
        raise HTTPException(413, f"a JSON body has at most {_MAX_MARKS:,} values")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(content, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return content


async def _read_form(headers: Headers, body: bytes) -> dict[str, Any]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(
        headers, stream(), max_files=_MAX_PARTS, max_fields=_MAX_PARTS, max_part_size=1 << 20
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError, UnicodeError) as error:
        text = getattr(error, "message", None) or "it cannot be read"
        raise HTTPException(400, f"the form is malformed: {text}") from None
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        # A file's own name is never used.
        content = await value.read() if isinstance(value, UploadFile) else value
        if name not in fields:
            fields[name] = content
        elif isinstance(fields[name], list):
            fields[name].append(content)
        else:
            fields[name] = [fields[name], content]
        if isinstance(fields[name], list) and len(fields[name]) > MAX_ITEMS:
            raise HTTPException(400, f"{name} is given more than {MAX_ITEMS} times")
    await form.close()
    return fields
