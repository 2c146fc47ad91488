"""Maps PyTorch keys to module paths and back by the rule tables.

Both directions are strict: what is missing, unexpected or of the wrong shape is collected and
said in one error.
"""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from fact_convert.io.lazy_tensor import State, Tensor
from fact_convert.rules.key_tables import TABLES
from fact_convert.rules.layer_transforms import ParameterTransform
from fact_jax.utils.errors import UserError, listed

Shapes = Mapping[str, tuple[int, ...]]
"""Our side of a model: shape by path, the path joined with dots."""


@dataclasses.dataclass(frozen=True)
class KeyMapping:
    """A tensor's PyTorch key and module path, and the transform between their layouts."""

    torch: str
    jax: str
    transform: ParameterTransform
    overrides: bool = False


class _Patterns:
    """Names with ``{i}`` placeholders on both sides, looked up from either."""

    def __init__(self, mappings: tuple[KeyMapping, ...]):
        self._by: dict[str, dict[str, list[tuple[re.Pattern, KeyMapping]]]] = {}
        for side in ("torch", "jax"):
            buckets = self._by[side] = defaultdict(list)
            for mapping in mappings:
                pattern = getattr(mapping, side)
                buckets[_mask_numbers(re.sub(r"\{\w+\}", "0", pattern))].append(
                    (_regex(pattern), mapping)
                )

    def find(self, side: str, name: str) -> list[KeyMapping]:
        """Every rule that fits ``name``, with both names filled in."""
        found = []
        for regex, mapping in self._by[side].get(_mask_numbers(name), ()):
            if match := regex.fullmatch(name):
                fields = match.groupdict()
                filled = {s: getattr(mapping, s).format(**fields) for s in ("torch", "jax")}
                found.append(dataclasses.replace(mapping, **filled))
        return found


def _mask_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _regex(pattern: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", pattern)
    return re.compile(
        "".join(f"(?P<{p}>\\d+)" if i % 2 else re.escape(p) for i, p in enumerate(parts))
    )


@functools.cache
def _patterns(kind: str) -> _Patterns:
    return _Patterns(
        tuple(
            KeyMapping(
                _join(rule.torch, parameter.torch),
                _join(rule.jax, parameter.jax),
                parameter,
                rule.overrides,
            )
            for rule in TABLES[kind].rules
            for parameter in rule.layer.parameters
        )
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if name else path


def key_prefix(kind: str, keys: Iterable[str]) -> str:
    """What stands before every key of this file, of the prefixes that the kind may have."""
    keys = list(keys)
    for prefix in sorted(TABLES[kind].prefixes, key=len, reverse=True):
        if any(key.startswith(prefix) for key in keys):
            return prefix
    return TABLES[kind].prefixes[0]


def map_torch_key(kind: str, key: str, prefix: str) -> KeyMapping | None:
    """Where a PyTorch key belongs, or None if no rule knows it."""
    if not key.startswith(prefix):
        return None
    found = _patterns(kind).find("torch", key.removeprefix(prefix))
    return dataclasses.replace(found[0], torch=key) if found else None


def map_jax_path(kind: str, path: str, prefix: str) -> list[KeyMapping]:
    """The PyTorch names that a path of ours may have, the one that we write first."""
    return [
        dataclasses.replace(mapping, torch=prefix + mapping.torch)
        for mapping in _patterns(kind).find("jax", path)
    ]


def is_ignored(kind: str, key: str, prefix: str) -> bool:
    """Whether the key is one of those that carry no weight."""
    bare = key.removeprefix(prefix)
    return any(_regex(ignored.torch).fullmatch(bare) for ignored in TABLES[kind].ignored)


def is_known(kind: str, key: str, prefix: str) -> bool:
    """Whether a rule maps the key, or it is one that carries no weight."""
    return map_torch_key(kind, key, prefix) is not None or is_ignored(kind, key, prefix)


def infer_kind(keys: Iterable[str]) -> tuple[str | None, float]:
    """The kind whose rules know the most of these keys, and which part of them it knows."""
    keys = list(keys)
    best, share = None, 0.0
    for kind in TABLES:
        prefix = key_prefix(kind, keys)
        known = sum(is_known(kind, key, prefix) for key in keys)
        if keys and known / len(keys) > share:
            best, share = kind, known / len(keys)
    return best, share


@dataclasses.dataclass
class Difference:
    """What does not fit between a file and a model; empty when everything does."""

    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)
    other: list[str] = dataclasses.field(default_factory=list)

    def raise_if_any(self, what: str) -> None:
        """One UserError with every key in it, or nothing."""
        lists = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = [
            f"{len(keys)} {name.replace('other', 'unusable')} ({listed(keys)})"
            for name, keys in lists.items()
            if keys
        ]
        if parts:
            raise UserError(f"{what}: {'; '.join(parts)}")


def match_state(
    kind: str, state: State, targets: Shapes, held: Collection[str] = ()
) -> tuple[str, dict[str, list[KeyMapping]], list[str]]:
    """Decide where every tensor of a PyTorch state goes; read none of them.

    Returns the prefix of the keys, for every path of ours its sources (the winner last), and the
    ignored keys. Paths that are ``held`` already need no source. Raises one UserError with
    everything that does not fit.
    """
    prefix = key_prefix(kind, state)
    difference, ignored = Difference(), []
    sources: dict[str, list[KeyMapping]] = {path: [] for path in targets}
    for key, array in state.items():
        mapping = map_torch_key(kind, key, prefix)
        if mapping is None and is_ignored(kind, key, prefix):
            ignored.append(key)
        elif mapping is None or mapping.jax not in targets:
            difference.unexpected.append(key)
        else:
            sources[mapping.jax].append(mapping)
            _check(mapping, array, targets[mapping.jax], difference)
    for path, mappings in sources.items():
        main = [mapping.torch for mapping in mappings if not mapping.overrides]
        if not main and path not in held:
            names = map_jax_path(kind, path, prefix)
            difference.missing.append(names[0].torch if names else path)
        elif len(main) > 1:
            difference.other.append(f"{' and '.join(main)} are the same weight twice")
        mappings.sort(key=lambda mapping: mapping.overrides)
    if difference.missing and not any(sources.values()):
        other, share = infer_kind(state)
        if other not in (None, kind) and share > 0.5:
            raise UserError(f"these are {other} weights, but {kind} weights were wanted")
    difference.raise_if_any(f"the weights do not fit the {kind}")
    return prefix, sources, ignored


def _check(
    mapping: KeyMapping, array: Tensor, target: tuple[int, ...], difference: Difference
) -> None:
    if mapping.transform.to_jax(array, len(target)).shape != target:
        try:
            wanted = mapping.transform.to_torch(
                np.broadcast_to(np.int8(0), target), array.ndim
            ).shape
        except ValueError:  # a configuration may claim more than an array can be
            wanted = target
        difference.misshapen.append(f"{mapping.torch}: is {array.shape}, wanted {wanted}")
    elif not is_float(array.dtype):
        difference.other.append(f"{mapping.torch}: {array.dtype}, wanted floating point")
    elif array.dtype.itemsize > 4 and not fits(array, np.dtype(np.float32)):
        difference.other.append(f"{mapping.torch}: {array.dtype} that float32 cannot hold exactly")


def match_module(
    kind: str, shapes: Shapes, targets: Shapes, prefix: str
) -> dict[str, list[KeyMapping]]:
    """The other direction: for every path of a module, the PyTorch names it may have.

    ``targets`` is what a model of this configuration has. Raises one UserError with everything
    that does not fit.
    """
    difference = Difference(missing=[path for path in targets if path not in shapes])
    names = {path: map_jax_path(kind, path, prefix) for path in shapes}
    for path, shape in shapes.items():
        if path not in targets or not names[path]:
            difference.unexpected.append(path)
        elif shape != targets[path]:
            difference.misshapen.append(f"{path}: is {shape}, wanted {targets[path]}")
    difference.raise_if_any(f"the {kind} module does not fit its configuration")
    return names


def is_float(dtype: np.dtype) -> bool:
    """Floating point, bfloat16 and the eight-bit sorts included (numpy calls those void)."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float8"))


def fits(array: Tensor, dtype: np.dtype) -> bool:
    """Whether every number survives the way to ``dtype`` and back."""
    with np.errstate(over="ignore"):
        back = array.astype(dtype).astype(array.dtype)
    return np.array_equal(back, array, equal_nan=is_float(array.dtype))
