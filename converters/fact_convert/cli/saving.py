"""Weights to whatever a path and a person ask for: for ``fact-convert``."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fact_convert.cli.opening import (
    ADAPTER_PARTS,
    Weights,
    added_tokens,
    canonical,
    check_known,
    save_torch,
    texts_about,
)
from fact_convert.io.lazy_tensor import fetch, release
from fact_convert.io.parallel import in_threads
from fact_convert.io.reading import State, stored_as
from fact_convert.models.diffusers_folder import (
    Files,
    configs_beside,
    plan_model,
    plan_pipeline,
    read_scheduler,
    write_model,
    write_pipeline,
)
from fact_convert.models.pipeline import read_schedule_config
from fact_convert.models.single_file import OTHER_NOISE
from fact_convert.models.validation import vocabulary_of
from fact_convert.rules.key_tables import ADAPTER_MARK
from fact_convert.weights import in_precision, read_config
from fact_jax.utils.errors import UserError, listed

_COPY = f"{ADAPTER_MARK}ln."


def check_numbers(weights: Weights) -> None:
    """Work out every tensor and drop it: UserError for one that is damaged or cannot be rounded."""
    arrays = [array for _, array in weights.tensors()]
    for _ in in_threads(lambda array: release(np.asarray(array)), arrays, fetch):
        pass


def in_dtype(weights: Weights, dtype: str | None) -> Weights:
    """The weights rounded to a precision, each when it is wanted; None leaves them as they are."""
    states = {kind: in_precision(state, dtype) for kind, state in weights.states.items()}
    return dataclasses.replace(weights, states=states)


def save(
    weights: Weights,
    out: Path,
    *,
    layout: str | None,
    beside: Path | None,
    files: Files,
    dim_head: int | None,
    force: bool,
    dry_run: bool,
    wrote: Callable[[int], None] | None = None,
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
            rows = vocabulary_of(weights.states["clip_text"])
            configs["clip_text"] = {**configs["clip_text"], "vocab_size": rows}
        scheduler = read_scheduler(beside) or weights.scheduler
        source = weights
        weights = dataclasses.replace(weights, configs=configs, scheduler=scheduler)
        weights.notes.extend(_overruled(source, weights, beside))
    check_known(weights)
    if dry_run:
        check_numbers(weights)
    layout = layout or _layout(weights, out)
    if layout != "diffusers" and files != Files():
        raise UserError(f"{out}: only folders have variants, shards and legacy files")
    if layout == "file" and weights.kind == "pipeline":
        raise UserError(f"{out}: a whole base in one file has the original layout: no --format")
    if layout == "onnx":
        _save_onnx(weights, out, dry_run, replace=force)
    elif layout == "diffusers":
        _save_folder(weights, out, beside, dry_run, files=files, force=force, wrote=wrote)
    else:
        original = layout == "original"
        options = {"original": original, "replace": force, "dry_run": dry_run}
        save_torch(weights, out, dim_head, wrote, **options)
    return layout


def _overruled(source: Weights, weights: Weights, beside: Path) -> Iterator[str]:
    """A line for all that the folder ``beside`` says otherwise than the source itself."""
    readers = {kind: functools.partial(read_config, kind) for kind in source.configs}
    pairs = {kind: (source.configs[kind], weights.configs[kind]) for kind in readers}
    if source.scheduler is not None:
        readers["scheduler"] = read_schedule_config
        pairs["scheduler"] = source.scheduler, weights.scheduler
    for name, read in readers.items():
        own, other = pairs[name]
        try:
            differing = _differing(read(own), read(other))
        except UserError as err:  # of the source: what is taken is checked afterwards
            differing = [str(err)]
        if own != other and differing:
            yield (
                f"{name}: taken from {beside} (--config), though the source says otherwise: "
                f"{listed(differing)}"
            )


def _differing(own, other) -> list[str]:
    names = [field.name for field in dataclasses.fields(own)]
    pairs = {name: (getattr(own, name), getattr(other, name)) for name in names}
    return [f"{name} {b}, not {a}" for name, (a, b) in pairs.items() if a != b]


def is_folder(out: Path, layout: str | None) -> bool:
    """Whether a folder is to be written there, as far as it shows before anything is read."""
    if layout is not None:
        return layout == "diffusers"
    return out.suffix.lower() != ".onnx" and stored_as(out) is None


def _layout(weights: Weights, out: Path) -> str:
    if out.suffix.lower() == ".onnx":
        return "onnx"
    if stored_as(out) is not None or ADAPTER_PARTS & set(weights.states):
        return "original" if weights.kind == "pipeline" else "file"
    return "diffusers"


def _save_folder(
    weights: Weights, out: Path, beside: Path | None, dry_run: bool, **options
) -> None:
    path, states, configs, notes = weights.path, weights.states, weights.configs, weights.notes
    if weights.kind == "pipeline":
        if OTHER_NOISE in weights.left_out and weights.scheduler is None:
            raise UserError(f"{path}: has {OTHER_NOISE}")
        said = {"scheduler": weights.scheduler, "class_name": weights.pipeline_class}
        added = added_tokens(weights)
        plan = plan_pipeline(path, states, configs, beside, added, notes=notes, **said)
        write = functools.partial(write_pipeline, path, out, states, plan)
    elif len(states) == 1:
        ((kind, state),) = states.items()
        config = plan_model(path, kind, state, configs, notes)
        write = functools.partial(write_model, out, kind, state, config)
    else:
        raise UserError(f"{path}: {weights.kind} is not what a folder holds")
    if not dry_run:
        write({"format": "pt", **texts_about(weights)}, **options)


def _save_onnx(weights: Weights, out: Path, dry_run: bool, *, replace: bool) -> None:
    if set(weights.states) != {"transface"}:
        raise UserError(
            f"{weights.path}: holds {weights.kind}; only a face encoder becomes an ONNX file"
        )
    from fact_convert.io.onnx_export import write_onnx

    state = weights.states["transface"]
    config = plan_model(weights.path, "transface", state, weights.configs, weights.notes)
    if not dry_run:
        write_onnx(state, config, out, replace=replace)


def adapter_in(weights: Weights) -> Weights:
    """The adapter among other weights, alone. UserError if there is none, or not all of it."""
    states: dict[str, State] = {kind: {} for kind in ("adapter", "resampler")}
    for kind, state in weights.states.items():
        if kind in ADAPTER_PARTS:
            states[kind] |= state
        elif kind == "unet":
            states["adapter"] |= {k: a for k, a in state.items() if ADAPTER_MARK in k}
    if absent := [kind for kind, state in states.items() if not state]:
        absent = " and no ".join(absent)
        raise UserError(f"{weights.path}: no whole adapter: {weights.kind}, but no {absent}")
    return dataclasses.replace(weights, states=states)


def without_copies(weights: Weights, base: Weights | None) -> tuple[Weights, list[str]]:
    """An adapter without its copies of the base's norm2, and what there is to say of them.

    Released files may hold such copies, which win over the base's own. Those that are the base's
    bit for bit are left out; those that differ stay. Without ``base`` all stay.
    """
    adapter = weights.states.get("adapter", {})
    copies = [key for key in adapter if _COPY in key]
    if base is None:
        note = "copies of its base's norm2 kept: --base BASE leaves out those that BASE has too"
        return weights, [f"{weights.path}: {len(copies)} {note}"] if copies else []
    if "unet" not in base.states or not adapter:
        kinds = f"{weights.path} is {weights.kind}, {base.path} is {base.kind}"
        raise UserError(f"--base wants an adapter and its base, but {kinds}")
    own = canonical("unet", base.states["unet"])
    norms = {key: own.get(_norm2(key)) for key in copies}
    if absent := [key for key, norm in norms.items() if norm is None]:
        raise UserError(
            f"{weights.path}: made for another base, {base.path} has no block for {listed(absent)}"
        )
    same = {key for key, norm in norms.items() if _same(adapter[key], norm)}
    notes = []
    if same:
        notes.append(f"left out {len(same)} copies of the base's norm2: they are its own numbers")
    if differing := [key for key in copies if key not in same]:
        notes.append(
            f"KEPT {len(differing)} norm2 that differ from the base's and replace them wherever "
            f"this adapter is used: {listed(differing)}"
        )
    kept = {key: array for key, array in adapter.items() if key not in same}
    states = {**weights.states, "adapter": kept}
    return dataclasses.replace(weights, states=states), notes


def _norm2(key: str) -> str:
    block, _, leaf = key.partition(_COPY)
    return f"{block}.norm2.{leaf}"


def _same(one, other) -> bool:
    a, b = (np.asarray(array).astype(np.float32) for array in (one, other))
    return a.tobytes() == b.tobytes()
