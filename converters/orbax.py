"""Checkpoints of ``train/``: nested JAX arrays in Orbax folders, to flat PyTorch states and back.

A checkpoint is a folder with the items ``state`` (a dict with ``params`` and perhaps ``ema``, each
nested as the modules are) and ``meta`` (JSON).
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from converters.mapping import Difference, is_ignored, names_of, place_of, prefix_of
from converters.readers import State
from converters.rules import RESAMPLER_PREFIX, TABLES
from converters.writers import whole_folder
from fact_jax.errors import UserError

_HEADS = {
    "adapter": "adapter",
    "resampler": "resampler",
    "unet": "unet",
    "clip_text": "text_encoder",
    "vae": "vae",
    "transface": "encoder",
}
"""What each kind is called in ``params`` where several are trained together."""
_TRAINING_ONLY = {"centres"}
"""What is trained beside a model and thrown away: the class centres of the encoder's loss."""


def find_checkpoint(path: str | os.PathLike) -> Path | None:
    """The checkpoint that a folder is or holds: of a run or a folder of steps the newest."""
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if (folder / "state" / "_METADATA").exists():
            return folder
        if folder.is_dir():
            steps = [step for step in folder.iterdir() if step.name.isdigit()]
            whole = [step for step in steps if (step / "state" / "_METADATA").exists()]
            if whole:
                return max(whole, key=lambda step: int(step.name))
    return None


def read_checkpoint(path: str | os.PathLike, weights: str = "ema") -> tuple[State, dict]:
    """A checkpoint's parameters as flat dotted paths in the JAX layout, and its ``meta``.

    ``weights`` is ``ema`` (the running average, or the parameters where there is none) or
    ``params``. Raises UserError for a folder that is damaged or holds no parameters.
    """
    folder = find_checkpoint(path)
    if folder is None:
        raise UserError(f"{path}: no whole checkpoint in it")
    meta = _read_meta(folder)
    try:
        # Orbax finds nothing at a relative path.
        name, tree = _restore((folder / "state").resolve(), weights)
    except UserError:
        raise
    except Exception as err:  # what Orbax raises for a damaged folder has no common type
        line = str(err).strip().splitlines()
        raise UserError(
            f"{folder}: damaged, it cannot be read ({(line or [type(err).__name__])[0][:200]})"
        ) from err
    flat = dict(_flatten(tree))
    _verify(folder, name, flat, meta.get("checksums", {}))
    return flat, meta


def _restore(folder: Path, weights: str) -> tuple[str, dict]:
    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of files that never exist
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        held = checkpointer.metadata(folder)
        held = getattr(held, "item_metadata", held)
        tree = getattr(held, "tree", held)
        name = weights if tree.get(weights) is not None else "params"
        if not isinstance(tree.get(name), dict) or not tree[name]:
            raise UserError(f"{folder}: holds no parameters")
        wanted = {name: tree[name]}
        template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), wanted)
        as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        arguments = ocp.args.PyTreeRestore(
            item=template, restore_args=as_numpy, partial_restore=True
        )
        return name, checkpointer.restore(folder, args=arguments)[name]


def _read_meta(folder: Path) -> dict:
    file = folder / "meta" / "metadata"
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as err:
        raise UserError(f"{file}: not valid JSON ({err})") from err


def _flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", np.asarray(value)


def _verify(folder: Path, name: str, flat: State, checksums: Mapping[str, int]) -> None:
    # Orbax itself hands out changed bytes without a word.
    wrong = [
        path
        for path, array in flat.items()
        if (known := checksums.get(f"{name}/{path.replace('.', '/')}")) is not None
        and known != checksum(array)
    ]
    if wrong:
        raise UserError(f"{folder}: damaged, not what was written: {', '.join(wrong)}")


def checksum(array: np.ndarray) -> int:
    """The 32-bit sum that the trainer stores of a leaf: its words, each times an odd number."""
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    odd = 2 * np.arange(words.size, dtype=np.uint32) + 1
    return int(np.sum(words.astype(np.uint32) * odd, dtype=np.uint32))


def to_torch(flat: State, kept: Mapping[str, Mapping] | None = None) -> dict[str, State]:
    """Parameters by dotted path -> flat PyTorch states by kind, with the names that files have.

    ``kept`` are the tensors that :func:`to_jax` put aside. Raises one UserError with every path
    that no rule knows.
    """
    difference = Difference()
    states: dict[str, State] = {}
    for kind, part in _by_kind(flat).items():
        state = states[kind] = {}
        for path, array in part.items():
            if names := names_of(kind, path, _prefix(kind)):
                leaf = names[0].leaf
                state[names[0].torch] = np.array(leaf.to_torch(array, array.ndim), order="C")
            else:
                difference.unexpected.append(path)
    difference.raise_if_any("the checkpoint's parameters are not known here")
    for kind, aside in (kept or {}).items():
        for key, (dtype, values) in aside.items():
            states[kind][key] = np.array(values, dtype)
    return states


def _by_kind(flat: State) -> dict[str, State]:
    heads: dict[str, State] = {}
    for path, array in flat.items():
        head, _, rest = path.partition(".")
        if head not in _TRAINING_ONLY:
            heads.setdefault(head, {})[rest] = array
    kinds = {head: kind for kind, head in _HEADS.items()}
    if set(heads) <= set(kinds):
        return {kinds[head]: part for head, part in heads.items()}
    # One model, not under a name of its own: the kind that knows the most of its paths.
    known = {kind: sum(bool(names_of(kind, path, "")) for path in flat) for kind in TABLES}
    return {max(known, key=known.get): flat}


def _prefix(kind: str) -> str:
    return RESAMPLER_PREFIX if kind == "resampler" else TABLES[kind].prefixes[0]


def to_jax(states: Mapping[str, State]) -> tuple[dict, dict[str, dict]]:
    """Flat PyTorch states by kind (as :func:`to_torch` gives them) -> nested ``params``.

    Also gives what carries no weight and has no place in them, as data for JSON. Raises one
    UserError with every key that no rule knows.
    """
    difference = Difference()
    params: dict = {}
    kept: dict[str, dict] = {}
    for kind, state in states.items():
        prefix = prefix_of(kind, state)
        for key, array in state.items():
            place = place_of(kind, key, prefix)
            if place is None and is_ignored(kind, key, prefix):
                kept.setdefault(kind, {})[key] = (array.dtype.name, array.tolist())
                continue
            if place is None:
                difference.unexpected.append(key)
                continue
            *parents, last = (_HEADS[kind], *place.jax.split("."))
            node = params
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = np.array(place.leaf.to_jax(array, array.ndim), order="C")
    difference.raise_if_any("these weights are not known here")
    return params, kept


def write_checkpoint(
    path: str | os.PathLike, params: Mapping, meta: Mapping, *, force: bool = False
) -> None:
    """Write a checkpoint folder that :func:`read_checkpoint` reads, whole or not at all."""
    import orbax.checkpoint as ocp

    state = {"params": dict(params), "ema": None}
    with (
        whole_folder(path, force=force) as folder,
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta))
        )
        checkpointer.save(folder.resolve(), args=arguments, force=True)
