"""Bodies of requests: read within bounds of size and time, as JSON or as a form."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from fact_infer.service.engine import Limits
from fact_infer.service.fields import MAX_ITEMS

_MAX_MARKS = 20_000
"""Brackets and commas of a JSON body, whose length is in its base64: a few bytes of them ask for
a lot of memory."""
_MAX_PARTS = 256


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
        raise HTTPException(408, late, {"Connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "the request ended early") from None
    if kind == "application/json":
        return await asyncio.to_thread(_read_json, bytes(body))
    return await _read_form(request.headers, bytes(body))


def _too_large(limits: Limits) -> HTTPException:
    # What is on its way is not read.
    return HTTPException(
        413, f"a request has at most {limits.body:,} bytes", {"Connection": "close"}
    )


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
