"""The mechanism behind ``rules``: which tensor goes where, in both directions, and nothing else.

Both directions are strict: what is missing, unexpected or of the wrong shape is collected and
said in one error.
"""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from fact_convert.rules.key_tables import TABLES, Table
from fact_convert.rules.layer_transforms import Leaf
from fact_jax.utils.errors import UserError, listed

Shapes = Mapping[str, tuple[int, ...]]
"""Our side of a model: shape by path, the path joined with dots."""


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor's two names, and how it turns from one layout to the other."""

    torch: str
    jax: str
    leaf: Leaf
    overrides: bool = False


class _Patterns:
    """Names with ``{i}`` placeholders on both sides, looked up from either."""

    def __init__(self, places: tuple[Place, ...]):
        self._by: dict[str, dict[str, list[tuple[re.Pattern, Place]]]] = {}
        for side in ("torch", "jax"):
            buckets = self._by[side] = defaultdict(list)
            for place in places:
                pattern = getattr(place, side)
                buckets[_blur(re.sub(r"\{\w+\}", "0", pattern))].append((_regex(pattern), place))

    def find(self, side: str, name: str) -> list[Place]:
        """Every rule that fits ``name``, with both names filled in."""
        found = []
        for regex, place in self._by[side].get(_blur(name), ()):
            if match := regex.fullmatch(name):
                fields = match.groupdict()
                filled = {s: getattr(place, s).format(**fields) for s in ("torch", "jax")}
                found.append(dataclasses.replace(place, **filled))
        return found


def _blur(name: str) -> str:
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
            Place(_join(rule.torch, leaf.torch), _join(rule.jax, leaf.jax), leaf, rule.overrides)
            for rule in TABLES[kind].rules
            for leaf in rule.kind.leaves
        )
    )


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if leaf else path


def table(kind: str) -> Table:
    """The rules of a kind of model."""
    return TABLES[kind]


def prefix_of(kind: str, keys: Iterable[str]) -> str:
    """What stands before every key of this file, of the prefixes that the kind may have."""
    keys = list(keys)
    for prefix in sorted(table(kind).prefixes, key=len, reverse=True):
        if any(key.startswith(prefix) for key in keys):
            return prefix
    return table(kind).prefixes[0]


def place_of(kind: str, key: str, prefix: str) -> Place | None:
    """Where a PyTorch key belongs, or None if no rule knows it."""
    if not key.startswith(prefix):
        return None
    found = _patterns(kind).find("torch", key.removeprefix(prefix))
    return dataclasses.replace(found[0], torch=key) if found else None


def names_of(kind: str, path: str, prefix: str) -> list[Place]:
    """The PyTorch names that a path of ours may have, the one that we write first."""
    return [
        dataclasses.replace(place, torch=prefix + place.torch)
        for place in _patterns(kind).find("jax", path)
    ]


def is_ignored(kind: str, key: str, prefix: str) -> bool:
    """Whether the key is one of those that carry no weight."""
    bare = key.removeprefix(prefix)
    return any(_regex(ignored.torch).fullmatch(bare) for ignored in table(kind).ignored)


def guess_kind(keys: Iterable[str]) -> tuple[str | None, float]:
    """The kind whose rules know the most of these keys, and which part of them it knows."""
    keys = list(keys)
    best, share = None, 0.0
    for kind in TABLES:
        prefix = prefix_of(kind, keys)
        known = sum(
            place_of(kind, key, prefix) is not None or is_ignored(kind, key, prefix) for key in keys
        )
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
    kind: str, state: Mapping[str, np.ndarray], targets: Shapes, held: Collection[str] = ()
) -> tuple[str, dict[str, list[Place]], list[str]]:
    """Decide where every tensor of a PyTorch state goes; read none of them.

    Returns the prefix of the keys, for every path of ours its sources (the winner last), and the
    ignored keys. Paths that are ``held`` already need no source. Raises one UserError with
    everything that does not fit.
    """
    prefix = prefix_of(kind, state)
    difference, ignored = Difference(), []
    sources: dict[str, list[Place]] = {path: [] for path in targets}
    for key, array in state.items():
        place = place_of(kind, key, prefix)
        if place is None and is_ignored(kind, key, prefix):
            ignored.append(key)
        elif place is None or place.jax not in targets:
            difference.unexpected.append(key)
        else:
            sources[place.jax].append(place)
            _check(place, array, targets[place.jax], difference)
    for path, places in sources.items():
        main = [place.torch for place in places if not place.overrides]
        if not main and path not in held:
            names = names_of(kind, path, prefix)
            difference.missing.append(names[0].torch if names else path)
        elif len(main) > 1:
            difference.other.append(f"{' and '.join(main)} are the same weight twice")
        places.sort(key=lambda place: place.overrides)
    if difference.missing and not any(sources.values()):
        other, share = guess_kind(state)
        if other not in (None, kind) and share > 0.5:
            raise UserError(f"these are {other} weights, but {kind} weights were wanted")
    difference.raise_if_any(f"the weights do not fit the {kind}")
    return prefix, sources, ignored


def _check(
    place: Place, array: np.ndarray, target: tuple[int, ...], difference: Difference
) -> None:
    if place.leaf.to_jax(array, len(target)).shape != target:
        try:
            wanted = place.leaf.to_torch(np.broadcast_to(np.int8(0), target), array.ndim).shape
        except ValueError:  # a configuration may claim more than an array can be
            wanted = target
        difference.misshapen.append(f"{place.torch}: is {array.shape}, wanted {wanted}")
    elif not is_float(array.dtype):
        difference.other.append(f"{place.torch}: {array.dtype}, wanted floating point")
    elif array.dtype.itemsize > 4 and not fits(array, np.dtype(np.float32)):
        difference.other.append(f"{place.torch}: {array.dtype} that float32 cannot hold exactly")


def match_module(kind: str, shapes: Shapes, targets: Shapes, prefix: str) -> dict[str, list[Place]]:
    """The other direction: for every path of a module, the PyTorch names it may have.

    ``targets`` is what a model of this configuration has. Raises one UserError with everything
    that does not fit.
    """
    difference = Difference(missing=[path for path in targets if path not in shapes])
    names = {path: names_of(kind, path, prefix) for path in shapes}
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


def fits(array: np.ndarray, dtype: np.dtype) -> bool:
    """Whether every number survives the way to ``dtype`` and back."""
    with np.errstate(over="ignore"):
        back = array.astype(dtype).astype(array.dtype)
    return np.array_equal(back, array, equal_nan=is_float(array.dtype))
