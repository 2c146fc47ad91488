"""Parameter trees: modules as nested dicts, split by path into trained and frozen leaves."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

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


def paths(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a/b/c", leaf) for every leaf, in the tree's own order."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def split_by_paths(tree: Tree, patterns: Iterable[str]) -> tuple[Tree, Tree]:
    """(leaves in whose path a pattern is found, the others). An idle pattern is an error."""
    patterns = list(patterns)
    known = [path for path, _ in paths(tree)]
    idle = [pattern for pattern in patterns if not any(re.search(pattern, path) for path in known)]
    if idle:
        raise ValueError(f"no parameter matches {', '.join(map(repr, idle))}")

    def select(node: Tree, prefix: str, wanted: bool) -> Tree:
        chosen = {}
        for name, value in node.items():
            path = f"{prefix}{name}"
            if isinstance(value, dict):
                value = select(value, f"{path}/", wanted)
                keep = bool(value)
            else:
                keep = any(re.search(pattern, path) for pattern in patterns) is wanted
            if keep:
                chosen[name] = value
        return chosen

    return select(tree, "", True), select(tree, "", False)


def merge(first: Tree, second: Tree, prefix: str = "") -> Tree:
    """The union of two trees; a leaf in both is an error."""
    merged = dict(first)
    for name, value in second.items():
        if name not in merged:
            merged[name] = value
        elif isinstance(value, dict) and isinstance(merged[name], dict):
            merged[name] = merge(merged[name], value, f"{prefix}{name}/")
        else:
            raise ValueError(f"{prefix}{name} is in both trees")
    return merged


def overlay(tree: Tree, changes: Tree) -> Tree:
    """``tree`` with the leaves that ``changes`` holds in their place, in the dtypes of ``tree``."""
    replaced = dict(tree)
    for name, value in changes.items():
        replaced[name] = (
            overlay(tree[name], value)
            if isinstance(value, dict)
            else jnp.asarray(value, tree[name].dtype)
        )
    return replaced


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
