"""What an experiment is: frozen dataclasses, experiment files, and dotted overrides.

An experiment is a Python file (``train/configs/NAME.py`` or any path) with a docstring and
``config = TrainConfig(...)``. ``options`` is a dataclass that the task owns.
"""

import ast
import dataclasses
import importlib.util
import json
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from fact_jax.errors import UserError
from fact_jax.mesh import MeshConfig

CONFIGS = Path(__file__).parent / "configs"
DATA_PARALLEL = MeshConfig()


def _require_positive(node: Any, *names: str) -> None:
    for name in names:
        if getattr(node, name) < 1:
            raise ValueError(f"{name} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. ``multipliers``: (path regex, factor) on the learning rate, the first match wins."""

    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    multipliers: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Running average of the weights; decay 0 turns it off."""

    decay: float = 0.9999
    warmup: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Save every so many steps (and at the end).

    What stays: the newest ``keep``; those of every ``keep_every`` steps (0: none); and the ``best``
    ones: by the similarity watched at that very step where the task watches it every so many steps
    (``log.samples_every``), otherwise by the mean loss since the checkpoint before.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int = 0
    best: int = 0

    def __post_init__(self):
        _require_positive(self, "every", "keep")
        if min(self.keep_every, self.best) < 0:
            raise ValueError("keep_every and best must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics every ``every`` steps; sample images every ``samples_every``.

    With 0 there are samples only at the end of the run, with None there are none.

    ``profile_steps``: a profiler trace from the first to the second step, (0, 0) for none.
    ``wandb``: to Weights & Biases too.
    """

    every: int = 50
    samples_every: int | None = 0
    profile_steps: tuple[int, int] = (0, 0)
    wandb: bool = False

    def __post_init__(self):
        _require_positive(self, "every")
        if not 0 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError("profile_steps must be a first and a last step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One experiment. ``task`` is a name in ``train.tasks.TASKS``, ``options`` is its dataclass.

    ``accumulate`` is into how many microbatches a step splits its batch. ``remat`` is what the
    backward pass computes again instead of keeping it, block by block: nothing, everything but
    matrix products, or everything.
    """

    task: str
    steps: int
    batch_size: int
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    accumulate: int = 1
    remat: Literal["none", "dots", "block"] = "none"
    mesh: MeshConfig = DATA_PARALLEL
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    options: Any

    def __post_init__(self):
        _require_positive(self, "steps", "batch_size", "accumulate")


def load_config(name: str | Path) -> tuple[str, TrainConfig]:
    """Read an experiment by name or path: (short name, config)."""
    path = Path(name) if str(name).endswith(".py") else CONFIGS / f"{name}.py"
    if not path.is_file():
        near = get_close_matches(str(name), [known for known, _ in list_configs()], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`fact-train configs` lists the names"
        raise UserError(f"no experiment {str(name)!r} ({path} does not exist); {hint}")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that an experiment may bring its own options and task
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, TrainConfig):
        raise UserError(f"{path} defines no `config = TrainConfig(...)`")
    return path.stem, config


def list_configs() -> list[tuple[str, str]]:
    """(name, first line of the docstring) of every experiment, without running any of them."""
    return [
        (path.stem, (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0])
        for path in sorted(CONFIGS.glob("*.py"))
        if path.stem != "__init__"
    ]


def override(config: TrainConfig, assignments: Sequence[str]) -> TrainConfig:
    """Apply ``key.sub=value`` texts, each converted to its field's type."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"{assignment!r} is not of the form key=value")
        config = _replace(config, config, key, key.split("."), text)
    return config


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf field of a dataclass tree."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{key}.")
        else:
            yield key, value


def to_json(config: TrainConfig) -> dict[str, Any]:
    """Flat dotted keys with JSON values, as kept in a run's folder."""
    return json.loads(json.dumps(dict(flatten(config)), default=_plain))


def defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    """The defaults, as :func:`to_json` writes them, of all settings that have one."""
    found = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            found |= defaults(value, f"{key}.")
        elif field.default is not dataclasses.MISSING:
            found[key] = field.default
    return json.loads(json.dumps(found, default=_plain))


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


def _replace(root: Any, node: Any, key: str, parts: list[str], text: str) -> Any:
    name, rest = parts[0], parts[1:]
    value = getattr(node, name, None) if name in _hints(node) else None
    is_group = dataclasses.is_dataclass(value)
    if name not in _hints(node) or bool(rest) != is_group:
        known = [known for known, _ in flatten(root)]
        near = get_close_matches(key, known, n=1, cutoff=0.0)[0]
        what = "is a group of settings" if is_group and not rest else "is no setting"
        raise UserError(f"{key!r} {what} of this experiment; the nearest is {near!r}")
    new = _replace(root, value, key, rest, text) if rest else _parse(key, text, _hints(node)[name])
    try:
        return dataclasses.replace(node, **{name: new})
    except ValueError as error:
        raise UserError(f"{key}={text}: {error}") from error


def _hints(node: Any) -> dict[str, Any]:
    return typing.get_type_hints(type(node))


def _parse(key: str, text: str, hint: Any) -> Any:
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
        items = ast.literal_eval(value) if isinstance(value, str) else value
        if not isinstance(items, tuple | list):
            raise ValueError(value)
        inner = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
        return tuple(_convert(item, kind) for item, kind in zip(items, inner, strict=True))
    elif hint is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    elif isinstance(value, _ACCEPTED.get(hint, ())) and not isinstance(value, bool):
        return hint(value)
    raise ValueError(value)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, str(hint))
