"""Writes opened weights in the layout that the output path and options ask for."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from fact_convert.cli.adapters import adapter_config
from fact_convert.cli.inspection import differing_settings
from fact_convert.cli.opening import (
    ADAPTER_PARTS,
    ADDED_TOKENS,
    CONFIGS,
    PIPELINE,
    Weights,
    added_tokens,
    canonical,
    check_supported,
    pipeline_said,
    step_of,
)
from fact_convert.io.hashing import CONTENT
from fact_convert.io.lazy_tensor import LazyTensor, State, Tensor, release
from fact_convert.io.parallel import thread_map
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.torch_io import write_torch_file
from fact_convert.io.weight_files import file_format
from fact_convert.models.adapter import add_dim_head, as_texts, write_adapter
from fact_convert.models.diffusers_folder import (
    WeightFileOptions,
    configs_beside,
    plan_model,
    plan_pipeline,
    read_scheduler,
    write_model,
    write_pipeline,
)
from fact_convert.models.inferred_configs import UNTOLD, infer_config
from fact_convert.models.pipeline import pipeline_class, read_schedule_config
from fact_convert.models.single_file import (
    OTHER_NOISE,
    PREDICTION,
    prediction_texts,
    schedule_tensors,
    write_ldm,
)
from fact_convert.models.training_checkpoint import provenance, to_jax, write_checkpoint
from fact_convert.models.validation import reshape_pointwise, vocab_size
from fact_convert.weights import cast_state, read_config
from fact_jax.diffusion.noise_schedules import NoiseSchedule
from fact_jax.utils.errors import UserError, error_context, listed

_OWN_KEYS = {"format", "version", "config", "software", "command", "sources", "step", "encoder"}
_OWN_KEYS |= {"not loaded", ADDED_TOKENS, CONTENT, CONFIGS, PIPELINE, PREDICTION}
"""Keys of the metadata that fact-convert writes."""
_SOURCE_METADATA = "metadata"
"""Where a checkpoint's ``meta`` keeps the metadata of the file that it was made of."""


def check_numbers(weights: Weights) -> None:
    """Compute every tensor and drop it: UserError if one is damaged or overflows its dtype."""
    arrays = list(weights.tensors().values())
    for _ in thread_map(lambda array: release(np.asarray(array)), arrays):
        pass


def watch_weights(weights: Weights, read: Callable[[int], None]) -> Weights:
    """The weights, calling ``read`` with the number of bytes of every tensor that is read."""

    def watched(array: Tensor) -> LazyTensor:
        def found() -> np.ndarray:
            read(array.nbytes)
            return np.asarray(array)

        return LazyTensor(array.shape, array.dtype, found)

    states = {
        kind: {key: watched(array) for key, array in state.items()}
        for kind, state in weights.states.items()
    }
    return dataclasses.replace(weights, states=states)


def cast_weights(weights: Weights, dtype: str | None) -> Weights:
    """The weights lazily cast to a dtype (a name); None leaves them as they are."""
    states = {kind: cast_state(state, dtype) for kind, state in weights.states.items()}
    return dataclasses.replace(weights, states=states)


def save(
    weights: Weights,
    out: Path,
    *,
    layout: str | None,
    beside: Path | None,
    files: WeightFileOptions,
    dim_head: int | None,
    force: bool,
    dry_run: bool,
) -> str:
    """Write weights; gives the name of the layout, which follows from ``out`` if it is None.

    ``beside`` is a folder with the configurations, the tokenizer and the scheduler that a
    diffusers folder needs, where the source has none; ``files`` is how its weights are stored.
    With ``dry_run`` everything is checked and nothing is written.
    """
    if beside is not None:
        configs = {**weights.configs, **configs_beside(beside, weights.states)}
        if "clip_text" in configs and added_tokens(weights):
            # It may be the configuration of the base before it learned them.
            rows = vocab_size(weights.states["clip_text"])
            configs["clip_text"] = {**configs["clip_text"], "vocab_size": rows}
        scheduler = read_scheduler(beside) or weights.scheduler
        source = weights
        weights = dataclasses.replace(weights, configs=configs, scheduler=scheduler)
        weights.notes.extend(_overruled(source, weights, beside))
    check_supported(weights)
    if dry_run:
        check_numbers(weights)
    layout = layout or _layout(weights, out)
    if layout != "diffusers" and files != WeightFileOptions():
        raise UserError(f"{out}: only folders have variants, shards and legacy files")
    if layout == "file" and weights.kind == "pipeline":
        raise UserError(f"{out}: a whole base in one file has the original layout: no --format")
    if layout == "onnx":
        _save_onnx(weights, out, dry_run, replace=force)
    elif layout == "diffusers":
        _save_folder(weights, out, beside, dry_run, files=files, force=force)
    else:
        original = layout == "original"
        options = {"original": original, "replace": force, "dry_run": dry_run}
        save_torch(weights, out, dim_head, **options)
    return layout


def _overruled(source: Weights, weights: Weights, beside: Path) -> Iterator[str]:
    """Notes on every setting in which the folder ``beside`` differs from the source."""
    for name, differing in differing_settings(source, weights):
        yield (
            f"{name}: taken from {beside} (--config), though the source says otherwise: "
            f"{listed(differing)}"
        )


def is_folder(out: Path, layout: str | None) -> bool:
    """Whether the output is a folder, decided from its name and ``--format`` alone."""
    if layout is not None:
        return layout == "diffusers"
    return out.suffix.lower() != ".onnx" and file_format(out) is None


def _layout(weights: Weights, out: Path) -> str:
    if out.suffix.lower() == ".onnx":
        return "onnx"
    if file_format(out) is not None or ADAPTER_PARTS & set(weights.states):
        return "original" if weights.kind == "pipeline" else "file"
    return "diffusers"


def _save_folder(
    weights: Weights, out: Path, beside: Path | None, dry_run: bool, **options
) -> None:
    path, states, configs, notes = weights.path, weights.states, weights.configs, weights.notes
    if weights.kind == "pipeline":
        if OTHER_NOISE in weights.left_out and weights.scheduler is None:
            raise UserError(f"{path}: has {OTHER_NOISE}")
        plan = plan_pipeline(
            path,
            states,
            configs,
            beside,
            added_tokens(weights),
            scheduler=weights.scheduler,
            class_name=weights.pipeline_class,
            notes=notes,
        )
        write = functools.partial(write_pipeline, path, out, states, plan)
    elif len(states) == 1:
        ((kind, state),) = states.items()
        config = plan_model(path, kind, state, configs, notes)
        write = functools.partial(write_model, out, kind, state, config)
    else:
        raise UserError(f"{path}: {weights.kind} is not what a folder holds")
    if not dry_run:
        write({"format": "pt", **as_texts(checkpoint_metadata(weights))}, **options)


def _save_onnx(weights: Weights, out: Path, dry_run: bool, *, replace: bool) -> None:
    if set(weights.states) != {"transface"}:
        raise UserError(
            f"{weights.path}: holds {weights.kind}; only a face encoder becomes an ONNX file"
        )
    from fact_convert.models.onnx_export import write_onnx

    state = weights.states["transface"]
    config = plan_model(weights.path, "transface", state, weights.configs, weights.notes)
    if not dry_run:
        write_onnx(state, config, out, replace=replace)


def save_torch(
    weights: Weights,
    out: Path,
    dim_head: int | None = None,
    *,
    original: bool = False,
    replace: bool = True,
    dry_run: bool = False,
) -> None:
    """Write one file for PyTorch: ``.safetensors``, or a pickle of ending ``.ckpt`` or ``.pt``.

    An adapter's ``.safetensors`` is our adapter file, its ``.ckpt`` the released one; ``dim_head``
    is how wide a head of its resampler is, where the source does not say. A whole base is written
    in the original layout, and parts of one if ``original``. Raises UserError for what no rule
    knows, and without ``replace`` if ``out`` is there already; with ``dry_run`` that is all.
    """
    check_supported(weights)
    stored = file_format(out)
    if stored is None:
        raise UserError(f"{out}: a file for PyTorch ends in .safetensors, .ckpt or .pt")
    if original or weights.kind == "pipeline":
        state = _original(weights)
    else:
        state = {key: array for part in weights.states.values() for key, array in part.items()}
        if len(state) != sum(map(len, weights.states.values())):
            raise UserError(f"{weights.path}: holds {weights.kind}, too many models for one file")
    pickled = stored == "pickle"
    texts: dict[str, str] = {}
    if weights.kind == "adapter":
        config = adapter_config(weights, dim_head, guess=not pickled)
        if pickled and config:
            resampler = read_config("resampler", config["resampler"])
            state = add_dim_head(state, resampler)
    else:
        state, texts = _with_settings(weights, state, pickled)
    if dry_run:
        return
    if pickled:
        write_torch_file(out, state, replace=replace)
    elif weights.kind == "adapter":
        write_adapter(out, state, config, checkpoint_metadata(weights), replace=replace)
    else:
        texts = {"format": "pt", **texts, **as_texts(checkpoint_metadata(weights))}
        write_safetensors(out, state, texts, replace=replace)


def _with_settings(weights: Weights, state: State, pickled: bool) -> tuple[State, dict[str, str]]:
    """A file's tensors and metadata with its source's configurations and noise schedule.

    A pickle has no metadata: of a base the noise schedule stands in tensors that such files have,
    and what is lost is noted.
    """
    schedule = NoiseSchedule.sd15()
    if "unet" in weights.states and weights.scheduler is not None:
        schedule = read_schedule_config(weights.scheduler)
    if not pickled:
        said = {CONFIGS: weights.configs, PIPELINE: pipeline_said(weights)}
        texts = {name: json.dumps(value) for name, value in said.items() if value}
        return state, prediction_texts(schedule) | texts
    lost = [kind for kind, config in weights.configs.items() if not _is_told(weights, kind, config)]
    if lost:
        weights.notes.append(
            f"{', '.join(lost)}: such a file does not hold the configuration (heads and the like), "
            "which no tensor tells either: keep it for --config, or write .safetensors"
        )
    state = {**state, **schedule_tensors(schedule)}
    if "unet" in weights.states and weights.pipeline_class is not None:
        told = pipeline_class(weights.states["unet"], None)
        if told != weights.pipeline_class:
            weights.notes.append(f"{weights.pipeline_class}: such a file does not say this class")
    return state, {}


def _is_told(weights: Weights, kind: str, config: Mapping) -> bool:
    """Whether a model's configuration can be inferred from its tensors."""
    try:
        found, _ = infer_config(kind, weights.states[kind])
    except UserError:
        return False
    names = UNTOLD.get(kind, ("num_heads", "dim_head"))
    one, other = (read_config(kind, each) for each in (found, config))
    return all(getattr(one, name, None) == getattr(other, name, None) for name in names)


def _original(weights: Weights) -> State:
    states = {
        kind: reshape_pointwise(kind, state, weights.configs[kind])
        if kind in weights.configs
        else state
        for kind, state in weights.states.items()
    }
    with error_context(weights.path):
        return write_ldm({kind: canonical(kind, state) for kind, state in states.items()})


def save_jax(
    weights: Weights,
    out: Path,
    dim_head: int | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
) -> None:
    """Write a checkpoint folder of JAX arrays, with what :func:`save_torch` needs to go back.

    Raises UserError for what no rule knows; with ``dry_run`` that is all.
    """
    check_supported(weights)
    params, kept = to_jax(weights.states)
    meta: dict[str, object] = {"kept": kept}
    if beside := _said_beside(weights):
        meta[_SOURCE_METADATA] = beside
    if weights.configs:
        meta[CONFIGS] = dict(weights.configs)
    if pipeline := pipeline_said(weights):
        meta[PIPELINE] = pipeline
    if weights.kind == "adapter":
        meta["adapter"] = adapter_config(weights, dim_head)
    if dry_run:
        check_numbers(weights)
        return

    def complete_meta() -> dict[str, object]:
        return {**_origin(weights), **meta}

    write_checkpoint(out, params, complete_meta, force=force)


def checkpoint_metadata(weights: Weights) -> dict[str, object]:
    """Metadata of a file made from these weights: provenance, step, the source's own metadata.

    What their own file says beside that (as kohya's ``ss_*``) is kept.
    """
    return {**_said_beside(weights), **_origin(weights)}


def _origin(weights: Weights) -> dict[str, object]:
    known = {key: weights.metadata[key] for key in ("encoder",) if key in weights.metadata}
    if tokens := added_tokens(weights):
        known[ADDED_TOKENS] = [dataclasses.asdict(token) for token in tokens]
    step = step_of(weights)
    found = {**provenance([weights.path, *weights.also]), **known}
    return found if step is None else {**found, "step": step}


def _said_beside(weights: Weights) -> dict[str, str]:
    """The source's own metadata: texts under keys that fact-convert does not write."""
    if weights.format in ("diffusers", "folder"):  # whose metadata is a configuration
        return {}
    said: object = weights.metadata
    if weights.format == "checkpoint":
        said = weights.metadata.get(_SOURCE_METADATA)
    return {
        key: text
        for key, text in (said.items() if isinstance(said, Mapping) else ())
        if isinstance(text, str) and key not in _OWN_KEYS
    }
