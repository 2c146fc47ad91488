"""Parameter trees: modules as nested dicts, split by path into trained and frozen leaves."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

Tree = dict[Any, Any]


@dataclasses.dataclass(frozen=True)
class SplitModule:
    """A module as its graph definition and its arrays, a nested dict."""

    graph: nnx.GraphDef
    arrays: Tree

    def module(self, arrays: Any) -> Any:
        """The module with these arrays (traced ones too)."""
        return nnx.merge(self.graph, arrays)


def split_module(module: nnx.Module) -> SplitModule:
    """:func:`flax.nnx.split`, the state as a pure dict."""
    graph, state = nnx.split(module)
    return SplitModule(graph, nnx.to_pure_dict(state))


def paths(tree: Tree) -> Iterator[tuple[str, Any]]:
    """("a/b/c", leaf) for every leaf, in the tree's own order."""
    return ((_name(path), leaf) for path, leaf in flatten_dict(tree).items())


def split_by_paths(tree: Tree, patterns: Iterable[str]) -> tuple[Tree, Tree]:
    """(leaves in whose path a pattern is found, the others); ValueError if one is found nowhere."""
    patterns, flat = list(patterns), flatten_dict(tree)
    found = {p: {path for path in flat if re.search(p, _name(path))} for p in patterns}
    if idle := [pattern for pattern, matched in found.items() if not matched]:
        raise ValueError(f"no parameter matches {', '.join(map(repr, idle))}")
    chosen = set().union(*found.values())
    return (
        unflatten_dict({path: leaf for path, leaf in flat.items() if path in chosen}),
        unflatten_dict({path: leaf for path, leaf in flat.items() if path not in chosen}),
    )


def merge(first: Tree, second: Tree) -> Tree:
    """The union of two trees; a leaf in both is an error."""
    one, other = flatten_dict(first), flatten_dict(second)
    if both := one.keys() & other.keys():
        raise ValueError(f"{', '.join(sorted(map(_name, both)))} is in both trees")
    return unflatten_dict(one | other)


def overlay(tree: Tree, changes: Tree) -> Tree:
    """``tree`` with the leaves that ``changes`` holds in their place, in the dtypes of ``tree``."""
    flat = flatten_dict(tree)
    new = flatten_dict(changes).items()
    return unflatten_dict(flat | {path: jnp.asarray(a, flat[path].dtype) for path, a in new})


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def assert_covers(model: Iterable[str], trainable: Iterable[str], frozen: Iterable[str]) -> None:
    """Each path of the model is on exactly one side; ValueError lists all that are not."""
    model, trainable, frozen = set(model), set(trainable), set(frozen)
    problems = {
        "on neither side": model - trainable - frozen,
        "on both sides": trainable & frozen,
        "trainable but not in the model": trainable - model,
        "frozen but not in the model": frozen - model,
    }
    lines = [f"{what}: {', '.join(sorted(which))}" for what, which in problems.items() if which]
    if lines:
        raise ValueError("trainable and frozen do not cover the model; " + "; ".join(lines))
