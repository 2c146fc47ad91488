"""OpenAPI's view of the operations, and a page of it that loads nothing from elsewhere."""

import html
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fact_infer.service.jobs import FINISHED

if TYPE_CHECKING:
    from fact_infer.service.operations import Operation

_ERRORS = {
    400: "the body cannot be read",
    401: "the token is missing or wrong",
    403: "asked by another site's page",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "neither JSON nor a form",
    422: "a field is wrong: `detail` says which, in one sentence",
    429: "the queue is full: try again after `Retry-After` seconds",
    503: "the service is about to end",
}
_PROGRESS = {"step": "integer", "steps": "integer", "phase": "string"}


def _object(fields: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    plain = {k: {"type": v} if isinstance(v, str | list) else v for k, v in fields.items()}
    return {"type": "object", "properties": plain} | more


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_PICTURE = {"url": "string", "width": "integer", "height": "integer", "sha256": "string"}
_JOB = _object(
    {
        "id": "string",
        "kind": "string",
        "state": {"enum": ["preparing", "queued", "running", *FINISHED]},
        "position": ["integer", "null"],
        "progress": _object(_PROGRESS),
        "seconds": "number",
        "notes": _list({"type": "string"}),
        "error": ["string", "null"],
        "pictures": _list(_object({**_PICTURE, "record": _object({})})),
        "sheet": _object(_PICTURE, type=["object", "null"]),
    },
    required=["id", "kind", "state", "progress", "notes", "error", "pictures"],
)
_NUMBERS = _list({"type": "number"})
_FACE = {"points": _list(_NUMBERS), "box": _NUMBERS, "score": "number", "crop": "string"}
_FACES = _object(
    {
        "height": "integer",
        "width": "integer",
        "faces": _list(_object({**_FACE, "seen": "string"})),
        "notes": _list({"type": "string"}),
    },
    required=["faces", "notes"],
)
_DETAIL = _object({"detail": {}})


def _json(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _json(_ERRORS[status], _DETAIL) for status in statuses or _ERRORS}


def _body(operation: "Operation") -> dict[str, Any]:
    required = [field.name for field in operation.fields if field.required]
    json_fields = {field.name: field.schema() for field in operation.fields}
    form_fields = {}
    for field in operation.fields:
        schema = json_fields[field.name]
        if field.kind == "file":
            one = {"type": "string", "format": "binary"}
            schema = {**(_list(one) if field.many else one), "description": field.help}
        elif field.kind in ("pairs", "numbers"):
            schema = {"type": "string", "description": field.help}
        form_fields[field.name] = schema
    kinds = {"application/json": json_fields, "multipart/form-data": form_fields}
    return {
        "required": True,
        "content": {
            kind: {"schema": _object(fields, required=required, additionalProperties=False)}
            for kind, fields in kinds.items()
        },
    }


def of_operation(operation: "Operation") -> dict[str, Any]:
    """What FastAPI is told of an address that draws."""
    done, later = "finished, within `wait` seconds", "queued: ask for it at `Location`"
    return {
        "summary": operation.summary,
        "operation_id": operation.kind,
        "responses": {200: _json(done, _JOB), 202: _json(later, _JOB), **_errors()},
        "openapi_extra": {"requestBody": _body(operation)},
    }


def of_faces(operation: "Operation") -> dict[str, Any]:
    """What FastAPI is told of the address that finds faces."""
    return {
        "summary": operation.summary,
        "operation_id": operation.kind,
        "responses": {200: _json("the faces, from left to right", _FACES), **_errors()},
        "openapi_extra": {"requestBody": _body(operation)},
    }


def of_job(summary: str) -> dict[str, Any]:
    """What FastAPI is told of an address of a job."""
    gone = _json("there is no such job", _DETAIL)
    return {
        "summary": summary,
        "responses": {200: _json("the job", _JOB), 404: gone, **_errors(401, 403, 422)},
    }


def of_picture(summary: str) -> dict[str, Any]:
    """What FastAPI is told of an address of a picture."""
    gone = _json("there is no such picture", _DETAIL)
    png = {"description": "a PNG file", "content": {"image/png": {"schema": {"type": "string"}}}}
    return {
        "summary": summary,
        "responses": {200: png, 404: gone, **_errors(401, 403, 422)},
    }


_STYLE = """
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;
margin:2rem auto;padding:0 1rem}h2{margin-top:2.5rem;border-bottom:1px solid #8886}
code,pre{font:14px/1.4 ui-monospace,monospace}pre{background:#8882;padding:.8rem;overflow:auto;
border-radius:.4rem}table{border-collapse:collapse;width:100%}td,th{text-align:left;
vertical-align:top;padding:.3rem .8rem .3rem 0;border-bottom:1px solid #8884}
.verb{font-weight:600;color:#2563eb}@media(prefers-color-scheme:dark){.verb{color:#93c5fd}}
"""
_EXAMPLE = """curl -H 'Accept: image/png' -o portrait.png 'http://HOST/v1/generate?wait=600' \\
  -F prompt='a portrait of a smiling person' -F photo=@photo.jpg -F points=@photo.points.json

curl 'http://HOST/v1/generate' -H 'Content-Type: application/json' \\
  -d '{"prompt": "a portrait", "photo": "BASE64", "points": [[x, y], ... five of them]}'
curl 'http://HOST/v1/jobs/ID?wait=30'"""


def page(schema: Mapping[str, Any]) -> str:
    """A page of the whole interface, plain HTML."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{schema['info']['title']} API"
        f"</title><meta name=viewport content='width=device-width'><style>{_STYLE}</style><main>"
        f"<h1>{schema['info']['title']} API</h1><p>Machines read <a href='openapi.json'>"
        "openapi.json</a>. Files go as parts of a form, or in JSON as base64.</p>"
        f"<pre>{html.escape(_EXAMPLE)}</pre>"
    ]
    for path, methods in schema["paths"].items():
        for verb, about in methods.items():
            parts.append(
                f"<h2><span class=verb>{verb.upper()}</span> <code>{html.escape(path)}</code></h2>"
                f"<p>{html.escape(about['summary'])}</p>"
            )
            rows = {
                each["name"]: each["schema"] | {"description": each.get("description", "")}
                for each in about.get("parameters", ())
            }
            content = about.get("requestBody", {}).get("content", {})
            rows |= content.get("application/json", {}).get("schema", {}).get("properties", {})
            if rows:
                parts.append("<table><tr><th>field<th>type<th>default<th></tr>")
                parts += [_row(name, field) for name, field in rows.items()]
                parts.append("</table>")
            answers = "; ".join(
                f"<b>{status}</b> {html.escape(answer['description'])}"
                for status, answer in about["responses"].items()
            )
            parts.append(f"<p>{answers}.</p>")
    return "".join([*parts, "</main></html>"])


def _row(name: str, field: Mapping[str, Any]) -> str:
    kind = field.get("type", "number or several")
    kind = f"{field['items'].get('type', 'value')}, several" if kind == "array" else kind
    kind = "base64" if "base64" in json.dumps(field) else kind
    cells = [name, kind, json.dumps(field["default"]) if "default" in field else ""]
    columns = "".join(f"<td><code>{html.escape(str(cell))}</code>" for cell in cells)
    return f"<tr>{columns}<td>{html.escape(field.get('description', ''))}</tr>"
