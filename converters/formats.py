"""Any file or folder of weights, opened without being told what it is: for ``fact-convert``."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from converters.adapter import (
    RELEASED_DIM_HEAD,
    infer_resampler,
    read_metadata,
    write_adapter,
)
from converters.mapping import guess_kind, is_ignored, place_of, prefix_of
from converters.orbax import find_checkpoint, read_checkpoint, to_jax, to_torch, write_checkpoint
from converters.pipeline import PARTS
from converters.readers import PICKLES, State, read_file, read_json, read_weights
from converters.rules import ADAPTER_MARK, RESAMPLER_PREFIX
from converters.weights import read_config
from converters.writers import write_pickle, write_safetensors
from fact_jax.errors import UserError

ADAPTER_PARTS = {"adapter", "resampler"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What was found at a path: flat PyTorch states by kind of model.

    ``format`` is how it is stored. ``metadata`` is what it says of itself: for an adapter file its
    metadata, for a checkpoint of the trainer its ``meta`` and the step.
    """

    path: Path
    format: str
    states: Mapping[str, State]
    metadata: Mapping[str, object]

    @property
    def kind(self) -> str:
        """One word for all of it."""
        if set(self.states) == ADAPTER_PARTS:
            return "adapter"
        return "pipeline" if self.format == "diffusers" else " + ".join(self.states)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor with a name that is the same in all formats."""
        for part, state in self.states.items():
            prefix = prefix_of(part, state) if part != "unknown" else ""
            for key, array in state.items():
                yield f"{part}/{key.removeprefix(prefix)}", array


def open_weights(
    path: str | os.PathLike, *, variant: str | None = None, weights: str = "ema"
) -> Weights:
    """Open a diffusers folder, a model folder, a checkpoint of the trainer, or a weight file.

    ``weights`` picks the running average (``ema``) or the parameters (``params``) of a checkpoint.
    Tensors that no rule knows are kept under the kind ``unknown``. Raises UserError for what is
    not readable.
    """
    path = Path(path)
    if not path.is_dir():
        state, text = read_file(path)
        metadata = read_metadata(text, path) if text.get("format") != "pt" else {}
        suffix = {".safetensors": "safetensors"}.get(path.suffix, "PyTorch pickle")
        return Weights(path=path, format=suffix, states=by_kind(state), metadata=metadata)
    if (path / "model_index.json").exists():
        return _open_pipeline(path, variant)
    if find_checkpoint(path) is not None:
        flat, meta = read_checkpoint(path, weights)
        states = to_torch(flat, meta.get("kept", {}))
        return Weights(path=path, format="checkpoint", states=states, metadata=meta)
    for stem in ("model", "diffusion_pytorch_model"):
        if any(path.glob(f"{stem}*.safetensors")):
            state = read_weights(path, stem, variant)
            config = read_json(path / "config.json") if (path / "config.json").exists() else {}
            return Weights(path=path, format="folder", states=by_kind(state), metadata=config)
    raise UserError(
        f"{path}: no weights that are known here: no model_index.json, no checkpoint of the "
        "trainer, no model.safetensors"
    )


def _open_pipeline(path: Path, variant: str | None) -> Weights:
    states = {
        kind: read_weights(path / part, stem, variant) for part, (kind, stem) in PARTS.items()
    }
    index = read_json(path / "model_index.json")
    return Weights(path=path, format="diffusers", states=states, metadata=index)


def by_kind(state: State) -> dict[str, State]:
    """One file's tensors, by the kind of model that they belong to."""
    if any(key.startswith(RESAMPLER_PREFIX) for key in state):
        parts: dict[str, State] = {"adapter": {}, "resampler": {}}
        for key, array in state.items():
            part = "resampler" if key.startswith(RESAMPLER_PREFIX) else "adapter"
            parts[part][key] = array
        return {part: found for part, found in parts.items() if found}
    kind, share = guess_kind(state)
    return {kind if kind and share > 0.5 else "unknown": state}


def unknown_keys(weights: Weights) -> dict[str, list[str]]:
    """For every kind, the keys in it that its rules do not know."""
    found = {}
    for kind, state in weights.states.items():
        best = guess_kind(state)[0] if kind == "unknown" else kind
        prefix = prefix_of(best, state) if best else ""
        keys = [
            key
            for key in state
            if not best
            or (place_of(best, key, prefix) is None and not is_ignored(best, key, prefix))
        ]
        if keys:
            found[best or "unknown"] = keys
    return found


def summary(weights: Weights) -> dict[str, object]:
    """What ``fact-convert inspect`` says, as plain data."""
    parts = {}
    for part, state in weights.states.items():
        dtypes = sorted({array.dtype.name for array in state.values()})
        count = sum(array.size for array in state.values())
        parts[part] = {"tensors": len(state), "parameters": count, "dtypes": dtypes}
        repeated = sum(f"{ADAPTER_MARK}ln." in key for key in state)
        if repeated:
            parts[part]["copies of the base's norm2"] = repeated
    about: dict[str, object] = {
        "path": str(weights.path),
        "kind": weights.kind,
        "format": weights.format,
        "parts": parts,
    }
    if step := _step(weights):
        about["step"] = step
    if unknown := unknown_keys(weights):
        about["unknown keys"] = {
            f"nearest to {kind}" if "unknown" in weights.states else kind: keys
            for kind, keys in unknown.items()
        }
    hidden = {"checksums", "kept", "step"}
    said = {key: value for key, value in weights.metadata.items() if key not in hidden}
    return about | ({"metadata": said} if said else {})


def _step(weights: Weights) -> int | None:
    if "step" in weights.metadata:
        return weights.metadata["step"]
    folder = find_checkpoint(weights.path) if weights.format == "checkpoint" else None
    if folder is None or not folder.name.isdigit():
        return None
    # A run that went on from trained weights counts its own steps in its folders' names.
    return int(folder.name) + weights.metadata.get("steps_before", 0)


def save_torch(weights: Weights, out: Path, dim_head: int | None = None, wrote=None) -> None:
    """Write one file for PyTorch: ``.safetensors``, or a pickle of ending ``.ckpt`` or ``.pt``.

    An adapter's ``.safetensors`` is our adapter file, its ``.ckpt`` the released one; ``dim_head``
    is how wide a head of its resampler is, where the source does not say. ``wrote`` is called
    with the number of bytes of every tensor written. Raises UserError for what no rule knows.
    """
    _check_known(weights)
    state = {key: array for part in weights.states.values() for key, array in part.items()}
    if len(state) != sum(map(len, weights.states.values())):
        raise UserError(f"{weights.path}: holds {weights.kind}, too many models for one file")
    if out.suffix in PICKLES:
        write_pickle(out, state, wrote)
    elif out.suffix != ".safetensors":
        raise UserError(f"{out}: a file for PyTorch ends in .safetensors, .ckpt or .pt")
    elif weights.kind == "adapter":
        write_adapter(out, state, _adapter_config(weights, dim_head), _provenance(weights), wrote)
    else:
        write_safetensors(out, state, {"format": "pt"}, wrote)


def save_jax(
    weights: Weights, out: Path, dim_head: int | None = None, *, force: bool = False
) -> None:
    """Write a checkpoint folder of JAX arrays, with what :func:`save_torch` needs to go back."""
    _check_known(weights)
    params, kept = to_jax(weights.states)
    meta = {**_provenance(weights), "kept": kept}
    if weights.kind == "adapter":
        meta["adapter"] = _adapter_config(weights, dim_head)
    write_checkpoint(out, params, meta, force=force)


def _check_known(weights: Weights) -> None:
    if unknown := unknown_keys(weights):
        keys = [key for found in unknown.values() for key in found]
        raise UserError(
            f"{weights.path}: {len(keys)} unexpected ({', '.join(keys)}); nearest kind: "
            f"{', '.join(unknown)}"
        )


def _provenance(weights: Weights) -> dict[str, object]:
    known = {key: weights.metadata[key] for key in ("encoder",) if key in weights.metadata}
    step = _step(weights)
    return known if step is None else known | {"step": step}


def _adapter_config(weights: Weights, dim_head: int | None) -> Mapping[str, object]:
    """What the file shall say of the adapter's models: what its source says, else the shapes."""
    config = weights.metadata.get("config") or {}
    for said in (weights.metadata.get("adapter"), config, _trained_with(config)):
        if isinstance(said, Mapping) and isinstance(said.get("resampler"), Mapping):
            return {key: said[key] for key in ("unet", "resampler") if key in said}
    if dim_head is None and weights.format == "checkpoint":
        raise UserError(f"{weights.path}: does not say how wide a head is; give --dim-head")
    resampler = {
        key.removeprefix(RESAMPLER_PREFIX): array
        for key, array in weights.states["resampler"].items()
    }
    try:
        found = infer_resampler(resampler, dim_head or RELEASED_DIM_HEAD)
    except UserError as err:
        raise UserError(f"{weights.path}: {err} (--dim-head)") from err
    return {"resampler": read_config("resampler", found).to_dict()}


def _trained_with(config: Mapping[str, object]) -> dict[str, object]:
    """The resampler in the trainer's settings, which it stores by dotted names."""
    mark = "options.resampler."
    found = {k.removeprefix(mark): value for k, value in config.items() if k.startswith(mark)}
    return {"resampler": found} if found else {}


def compare(one: Weights, other: Weights, tolerance: float) -> list[str]:
    """A line for every tensor that only one has or that differs by more than ``tolerance``.

    Precisions may differ: numbers are compared. NaN equals NaN.
    """
    first, second = dict(one.tensors()), dict(other.tensors())
    lines = [f"only in {one.path}: {key}" for key in first if key not in second]
    lines += [f"only in {other.path}: {key}" for key in second if key not in first]
    for key in first.keys() & second.keys():
        a, b = first[key], second[key]
        if a.shape != b.shape:
            lines.append(f"{key}: {a.shape} against {b.shape}")
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore"):
            far = ~((np.abs(a - b) <= tolerance) | (a == b) | (np.isnan(a) & np.isnan(b)))
            if far.any():
                largest = np.nanmax(np.abs(a - b)[far], initial=0)
                lines.append(f"{key}: largest difference {largest:.3g}, {far.sum()} of {a.size}")
    return sorted(lines)
