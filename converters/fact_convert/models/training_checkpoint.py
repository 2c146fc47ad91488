"""Training checkpoints (Orbax folders of nested JAX arrays) to flat PyTorch states and back.

A checkpoint is a folder with the items ``state`` (a dict with ``params`` and perhaps ``ema``, each
nested as the modules are) and ``meta`` (JSON).
"""

import concurrent.futures
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fact_convert.io.hashing import file_sha256
from fact_convert.io.json_io import read_json, write_json
from fact_convert.io.lazy_tensor import State, Tensor
from fact_convert.io.output_paths import output_folder
from fact_convert.io.parallel import thread_map
from fact_convert.io.safetensors_io import DTYPES
from fact_convert.io.zarr_io import read_tree, write_tree
from fact_convert.mapping import Difference, is_ignored, key_prefix, map_jax_path, map_torch_key
from fact_convert.rules.key_tables import RESAMPLER_PREFIX, TABLES
from fact_jax.utils.command_line import version_of
from fact_jax.utils.errors import UserError

_PARAM_NAMES = {
    "adapter": "adapter",
    "resampler": "resampler",
    "unet": "unet",
    "clip_text": "text_encoder",
    "vae": "vae",
    "transface": "encoder",
    "controlnet": "controlnet",
}
"""What each kind is called in ``params`` where several are trained together."""
_BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}
_TRAINING_ONLY = {"centres"}
"""What is trained beside a model and thrown away: the class centres of the encoder's loss."""


def find_checkpoint(path: str | os.PathLike) -> Path | None:
    """The checkpoint that a folder is, or the newest one that it holds."""
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if (folder / "state" / "_METADATA").exists():
            return folder
        if folder.is_dir():
            steps = [step for step in folder.iterdir() if step.name.isdecimal()]
            whole = [step for step in steps if (step / "state" / "_METADATA").exists()]
            if whole:
                return max(whole, key=lambda step: int(step.name))
    return None


def read_checkpoint(path: str | os.PathLike, weights: str = "ema") -> tuple[State, dict]:
    """A checkpoint's parameters as flat dotted paths in the JAX layout, and its ``meta``.

    ``weights`` is ``ema`` (the running average, or the parameters where there is none) or
    ``params``. Each tensor is read when it is wanted, and compared with the sum that ``meta`` has
    of it. Raises UserError for a folder that is damaged or holds no parameters.
    """
    folder = find_checkpoint(path)
    if folder is None:
        raise UserError(f"{path}: no whole checkpoint in it")
    meta = folder / "meta" / "metadata"
    about = read_json(meta) if meta.exists() else {}
    flat = read_tree(folder / "state", weights, about.get("checksums"))
    if not flat:
        raise UserError(f"{folder}: holds no parameters")
    return flat, about


def to_torch(flat: State, kept: Mapping[str, Mapping] | None = None) -> Mapping[str, State]:
    """Parameters by dotted path -> flat PyTorch states by kind, with the names that files have.

    ``kept`` are the tensors that :func:`to_jax` put aside. Raises one UserError with every path
    that no rule knows, and one if something put aside has the name of a weight.
    """
    difference = Difference()
    states: dict[str, dict[str, Tensor]] = {}
    for kind, part in _by_kind(flat).items():
        state = states[kind] = {}
        for path, array in part.items():
            if names := map_jax_path(kind, path, _prefix(kind)):
                transform = names[0].transform
                state[names[0].torch] = transform.to_torch(array, array.ndim)
            else:
                difference.unexpected.append(path)
    difference.raise_if_any("the checkpoint's parameters are not known here")
    try:
        for kind, aside in (kept or {}).items():
            prefixes = {key_prefix(kind, aside), *TABLES[kind].prefixes}
            for key, (dtype, values) in aside.items():
                if any(map_torch_key(kind, key, prefix) for prefix in prefixes):
                    raise UserError(
                        f"what the checkpoint put aside has the name of a weight: {key}"
                    )
                states[kind][key] = np.array(values, _BY_NAME[dtype])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as err:
        raise UserError(f"what the checkpoint put aside is damaged ({err!r})") from err
    return states


def _by_kind(flat: State) -> Mapping[str, State]:
    parts: dict[str, dict[str, Tensor]] = {}
    for path, array in flat.items():
        name, _, rest = path.partition(".")
        if name not in _TRAINING_ONLY:
            parts.setdefault(name, {})[rest] = array
    kinds = {name: kind for kind, name in _PARAM_NAMES.items()}
    if set(parts) <= set(kinds):
        return {kinds[name]: part for name, part in parts.items()}
    # One model, not under a name of its own: the kind that knows the most of its paths.
    known = {kind: sum(bool(map_jax_path(kind, path, "")) for path in flat) for kind in TABLES}
    return {max(known, key=known.__getitem__): flat}


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
        prefix = key_prefix(kind, state)
        for key, array in state.items():
            mapping = map_torch_key(kind, key, prefix)
            if mapping is None and is_ignored(kind, key, prefix):
                kept.setdefault(kind, {})[key] = (array.dtype.name, array.tolist())
                continue
            if mapping is None:
                difference.unexpected.append(key)
                continue
            *parents, last = (_PARAM_NAMES[kind], *mapping.jax.split("."))
            node = params
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = mapping.transform.to_jax(array, array.ndim)
    difference.raise_if_any("these weights are not known here")
    return params, kept


def write_checkpoint(
    path: str | os.PathLike,
    params: Mapping,
    meta: Mapping | Callable[[], Mapping],
    *,
    force: bool = False,
) -> None:
    """Write a checkpoint folder that :func:`read_checkpoint` reads, whole or not at all.

    ``meta`` may be a function, which is called while the tensors are written: hashing their file
    takes as long.
    """
    with (
        output_folder(path, force=force) as folder,
        concurrent.futures.ThreadPoolExecutor(1) as beside,
    ):
        about = beside.submit(meta if callable(meta) else lambda: meta)
        sums = write_tree(folder / "state", {"params": params, "ema": None})
        write_json(folder / "meta" / "metadata", {**about.result(), "checksums": sums})
        handlers = "orbax.checkpoint._src.handlers"
        items = {
            "state": f"{handlers}.standard_checkpoint_handler.StandardCheckpointHandler",
            "meta": f"{handlers}.json_checkpoint_handler.JsonCheckpointHandler",
        }
        write_json(folder / "_CHECKPOINT_METADATA", {"item_handlers": items})


def file_sums(source: str | os.PathLike) -> dict[str, str]:
    """The SHA-256 of a weight file, or by their names of those in a folder, as sha256sum has it."""
    source = Path(source)
    files = _weight_files(source)
    names = [source.name if f == source else f.relative_to(source).as_posix() for f in files]
    return dict(zip(names, thread_map(file_sha256, files), strict=True))


def provenance(sources: Sequence[str | os.PathLike]) -> dict[str, str]:
    """Provenance metadata: the program, and hashes of the source files.

    Of a folder the SHA-256 of every weight file; of a training checkpoint that of its ``meta``,
    which holds the sum of every tensor. No name or path is in it: equal sources give equal texts.
    """
    files = [file for source in sources for file in _weight_files(Path(source))]
    hashes = list(thread_map(file_sha256, files))
    return {"software": f"fact-jax {version_of()}", "sources": json.dumps(hashes)}


def _weight_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    checkpoint = find_checkpoint(source)
    if checkpoint is not None:
        meta = checkpoint / "meta" / "metadata"
        return [meta] if meta.is_file() else []
    return sorted([*source.rglob("*.safetensors"), *source.rglob("*.bin")])
