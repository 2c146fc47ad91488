"""The options of a command as fields of a request: one table for command line, API and page."""

import argparse
import base64
import binascii
import dataclasses
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

from fact_jax.utils.errors import UserError

Kind = Literal["int", "float", "text", "flag", "file", "numbers", "pairs", "choice"]
POINTS = ("points", "template_points")
"""Files that may be plain JSON in a JSON body."""
MAX_ITEMS = 64
"""Values of one field that may be repeated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """An option: ``name`` as in Python, ``many`` where it may be repeated."""

    name: str
    kind: Kind
    many: bool
    default: Any
    required: bool
    help: str
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] = str

    def read(self, value: Any) -> Any:
        """A value of JSON or of a form as argparse would have it; UserError if it is none.

        Files are bytes, from a form or as base64 in JSON; ``POINTS`` may be plain JSON.
        """
        if self.kind == "pairs":
            return self._pairs(value)
        if not self.many:
            return self._one(value)
        if self.name in POINTS and _is_points(value):
            value = [value]
        values = value if isinstance(value, list) else [value]
        if len(values) > MAX_ITEMS:
            raise UserError(f"{self.name} is given {len(values)} times: at most {MAX_ITEMS}")
        return [self._one(item) for item in values]

    def _one(self, value: Any) -> Any:
        try:
            return getattr(self, f"_{self.kind}")(value)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            raise UserError(f"{self.name} must be {self.wanted}, got {_shown(value)}") from None

    @property
    def wanted(self) -> str:
        """What one value is, in words."""
        words = {
            "int": "a whole number",
            "float": "a number",
            "text": "a text",
            "flag": "true or false",
            "file": "a file (in JSON its bytes as base64)",
            "numbers": "a number, or several",
            "pairs": 'an object as {"up_blocks": 0.5}',
        }
        return words.get(self.kind) or f"one of {', '.join(self.choices)}"

    def _int(self, value: Any) -> int:
        if isinstance(value, str) and len(value) <= 20:
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > sys.maxsize:
            raise ValueError
        return value

    def _float(self, value: Any) -> float:
        if isinstance(value, str):
            return float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        return float(min(max(value, -sys.float_info.max), sys.float_info.max))

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError
        return value

    def _choice(self, value: Any) -> str:
        if value not in self.choices:
            raise ValueError
        return value

    def _flag(self, value: Any) -> bool:
        words = ("false", "0", "true", "1")
        return value if isinstance(value, bool) else words.index(self._text(value).lower()) > 1

    def _numbers(self, value: Any) -> float | tuple[float, ...]:
        if isinstance(value, list):
            if not 1 <= len(value) <= MAX_ITEMS:
                raise ValueError
            return tuple(map(self._float, value))
        return self.parse(value) if isinstance(value, str) else self._float(value)

    def _pairs(self, value: Any) -> list[tuple[str, float]]:
        if isinstance(value, str):
            value = [value]
        try:
            if isinstance(value, dict):
                found = [(name, self._float(factor)) for name, factor in value.items()]
            else:
                found = [self.parse(self._text(text)) for text in value]
            if len(found) > MAX_ITEMS:
                raise ValueError
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            raise UserError(f"{self.name} must be {self.wanted}, got {_shown(value)}") from None
        return found

    def _file(self, value: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        if self.name in POINTS and isinstance(value, list | dict):
            return json.dumps({"points": value} if isinstance(value, list) else value).encode()
        try:
            # A data: URL is what a browser has.
            return base64.b64decode(self._text(value).rpartition("base64,")[2], validate=True)
        except binascii.Error:
            raise ValueError from None

    def schema(self) -> dict[str, Any]:
        """The field in OpenAPI's words."""
        number: dict[str, Any] = {"type": "number"}
        one: dict[str, Any] = {
            "int": {"type": "integer"},
            "float": number,
            "text": {"type": "string"},
            "flag": {"type": "boolean"},
            "file": {"type": "string", "contentEncoding": "base64"},
            "numbers": {"oneOf": [number, {"type": "array", "items": number, "minItems": 1}]},
            "pairs": {"type": "object", "additionalProperties": number},
            "choice": {"type": "string", "enum": list(self.choices)},
        }[self.kind]
        if self.many and self.kind != "pairs":
            one = {"type": "array", "items": one, "maxItems": MAX_ITEMS}
        more = {} if self.default in (None, []) else {"default": self.default}
        return {**one, "description": self.help, **more}


def fields_of(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> list[Field]:
    """The options of a parser, but those named ``without``, in their order."""
    return [
        _field(action)
        for action in parser._actions
        if action.dest not in {"help", *without} and action.dest != argparse.SUPPRESS
    ]


def _field(action: argparse.Action) -> Field:
    many = isinstance(action, argparse._AppendAction) or action.nargs == "+"
    kinds: dict[Any, Kind] = {int: "int", float: "float", Path: "file", None: "text", str: "text"}
    kind: Kind = kinds.get(action.type, "pairs" if many else "numbers")
    if action.choices:
        kind = "choice"
    if isinstance(action, argparse._StoreTrueAction):
        kind = "flag"
    return Field(
        name=action.dest,
        kind=kind,
        many=many,
        default=action.default,
        required=action.required,
        help=" ".join((action.help or action.dest).split()),
        choices=tuple(action.choices or ()),
        parse=action.type if callable(action.type) else str,
    )


def read_fields(fields: list[Field], given: dict[str, Any]) -> dict[str, Any]:
    """Every field's value, its default where it is not given; UserError for a wrong one."""
    known = {field.name: field for field in fields}
    for name in given:
        if name not in known:
            raise UserError(f"no field {name!r}; known are {', '.join(known)}")
    values = {}
    for name, field in known.items():
        value = given.get(name)
        if value is None:
            if field.required:
                raise UserError(f"{name} is missing: it must be {field.wanted}")
            values[name] = list(field.default) if field.many and field.default else field.default
            values[name] = [] if field.default == [] else values[name]
        else:
            values[name] = field.read(value)
    return values


def _is_points(value: Any) -> bool:
    """Five points of one photo, not a list of such."""
    return isinstance(value, dict) or (
        isinstance(value, list) and len(value) == 5 and all(_is_pair(item) for item in value)
    )


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and not any(isinstance(number, list | dict | str) for number in value)
    )


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, bytes | str | int | float | bool) else ""
    return (text if len(text) <= 40 else text[:40] + "...") or f"a {type(value).__name__}"
