"""Dotted settings: overrides on the command line, and configurations as flat JSON."""

import ast
import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from fact_jax.utils.errors import UserError
from fact_train.config import TrainConfig

# What runs did before there was a setting for it, where that is not its default.
_EARLIER = {"optimizer.decay_embeddings": True}


def override(config: TrainConfig, assignments: Sequence[str]) -> TrainConfig:
    """Apply ``key.sub=value`` texts, each converted to its field's type.

    Elements of a tuple of dataclasses are named by their number (``options.stages.0.steps=600``),
    or given all at once, as Python or JSON (``options.stages=[{"steps": 600}]``). Ranges are
    checked when all assignments are made. Raises UserError.
    """
    tree = _take_apart(config)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"{assignment!r} is not of the form key=value")
        _assign(tree, key, text)
    return _put_together(tree)


def to_json(config: TrainConfig) -> dict[str, Any]:
    """Flat dotted keys with JSON values, as kept in a run's folder."""
    return _as_json({key: value for key, _, value in _leaves(config)})


def settings_of_run(config: TrainConfig, saved: dict[str, Any]) -> dict[str, Any]:
    """What :func:`to_json` wrote in a run's folder, as this version would write it.

    A setting that is younger than the run is what the run did: its default, unless ``_EARLIER``
    knows better.
    """
    found = defaults(config) | _EARLIER | saved
    for key, _, value in _leaves(config):
        if key in found and isinstance(value, tuple) and value and _is_group(value[0]):
            with contextlib.suppress(UserError, ValueError, TypeError):  # another kind: different
                items = [_convert(item, type(value[0])) for item in found[key]]
                found[key] = [_put_together(item, key) for item in items]
    return _as_json(found)


def defaults(config: TrainConfig) -> dict[str, Any]:
    """The defaults, as :func:`to_json` writes them, of all settings that have one."""
    found = {key: field.default for key, field, _ in _leaves(config)}
    return _as_json({k: v for k, v in found.items() if v is not dataclasses.MISSING})


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(dotted key, field, value) of every leaf field of a tree of dataclasses."""
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), prefix + field.name
        if _is_group(value):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, field, value


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return dataclasses.asdict(value) if _is_group(value) else str(value)

    return json.loads(json.dumps(settings, default=plain))


def _is_group(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


@dataclasses.dataclass
class _Group:
    """A dataclass taken apart, or a tuple of dataclasses (``kind``), whose keys are numbers."""

    kind: type
    values: dict[str, Any]


def _take_apart(value: Any) -> Any:
    if _is_group(value):
        names = [field.name for field in dataclasses.fields(value)]
        return _Group(type(value), {name: _take_apart(getattr(value, name)) for name in names})
    if isinstance(value, tuple) and value and all(map(_is_group, value)):
        return _numbered(map(_take_apart, value))
    return value


def _numbered(items: Iterable[Any]) -> _Group:
    return _Group(tuple, {str(i): item for i, item in enumerate(items)})


def _put_together(node: Any, key: str = "") -> Any:
    """What was taken apart; UserError, with the group's key, where its own check refuses it."""
    if not isinstance(node, _Group):
        return node
    made = {name: _put_together(value, _join(key, name)) for name, value in node.values.items()}
    if node.kind is tuple:
        return tuple(made.values())
    try:
        return node.kind(**made)
    except ValueError as error:
        raise UserError(f"{key}: {error}" if key else str(error)) from None


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _keys(group: _Group, key: str = "") -> Iterator[str]:
    """Dotted keys of everything that can be assigned to."""
    for name, value in group.values.items():
        inner = _join(key, name)
        if isinstance(value, _Group):
            yield from _keys(value, inner)
        if _is_setting(group, name):
            yield inner


def _is_setting(group: _Group, name: str) -> bool:
    """Whether this can be assigned to: a leaf, or a whole tuple of dataclasses."""
    value = group.values.get(name, group)
    return group.kind is not tuple and (not isinstance(value, _Group) or value.kind is tuple)


def _assign(tree: _Group, key: str, text: str) -> None:
    *groups, name = key.split(".")
    node: Any = tree
    for group in groups:
        node = node.values.get(group) if isinstance(node, _Group) else None
    if not (isinstance(node, _Group) and _is_setting(node, name)):
        known = isinstance(node, _Group) and name in node.values
        what = "is a group of settings" if known else "is no setting"
        near = nearest_key(key, list(_keys(tree)))
        raise UserError(f"{key!r} {what} of this experiment; the nearest is {near!r}")
    node.values[name] = _parse(key, text, typing.get_type_hints(node.kind)[name])


def nearest_key(key: str, known: Sequence[str]) -> str:
    """The known dotted key that was most likely meant.

    One that ends in the same name or whose name has these initials (``lr``: ``learning_rate``),
    in the same group if there is one there, otherwise one of similar spelling.
    """
    group, _, name = key.rpartition(".")
    found = [full for full in known if name in (own := full.rpartition(".")[2], _initials(own))]
    found.sort(key=lambda full: full.rpartition(".")[0] != group)
    return found[0] if found else get_close_matches(key, known, n=1, cutoff=0.0)[0]


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def _parse(key: str, text: Any, hint: Any) -> Any:
    try:
        return _convert(text, hint)
    except (ValueError, SyntaxError, TypeError):
        raise UserError(f"{key}={text}: expected {_describe(hint)}") from None


# From text, and from the elements of a literal tuple.
_ACCEPTED = {int: (str, int), float: (str, int, float), str: (str,), Path: (str,)}


def _convert(value: Any, hint: Any) -> Any:
    """Text, or an element of a literal, as the type of a field; ValueError if it is not one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin in (typing.Union, types.UnionType):
        if type(None) in arguments and value in (None, "None", "none"):
            return None
        for option in arguments:
            try:
                return _convert(value, option)
            except (ValueError, SyntaxError, TypeError):
                continue
    elif origin is tuple:
        items = _literal(value) if isinstance(value, str) else value
        if not isinstance(items, tuple | list):
            raise ValueError(value)
        inner = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
        made = [_convert(item, kind) for item, kind in zip(items, inner, strict=True)]
        return _numbered(made) if made and isinstance(made[0], _Group) else tuple(made)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _convert_group(value, hint)
    elif hint is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    elif isinstance(value, _ACCEPTED.get(hint, ())) and not isinstance(value, bool):
        return hint(value)
    raise ValueError(value)


def _convert_group(values: dict, kind: type) -> _Group:
    """A dataclass given as a dict, its ranges not checked yet."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            near = nearest_key(str(name), list(fields))
            raise UserError(f"{name!r} is no setting of a {kind.__name__}; the nearest is {near!r}")
    given = {name: _parse(name, value, hints[name]) for name, value in values.items()}
    for name, field in fields.items():
        if name not in given and field.default is dataclasses.MISSING:
            raise UserError(f"a {kind.__name__} needs {name!r}")
        given.setdefault(name, _take_apart(field.default))
    return _Group(kind, given)


def _literal(text: str) -> Any:
    """A value written in Python or in JSON."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return json.loads(text)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, typing.get_args(hint)))
    inner = (*typing.get_args(hint), None)[0]
    if dataclasses.is_dataclass(inner):
        fields = ", ".join(f'"{field.name}": ...' for field in dataclasses.fields(inner))
        return f"a list [{{{fields}}}, ...]"
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "none",
    }
    return names.get(hint, str(hint))
