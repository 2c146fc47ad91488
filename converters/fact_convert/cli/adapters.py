"""Extracts an adapter from a checkpoint, drops copies of base norms, finds its configuration."""

import dataclasses

from fact_convert.cli.opening import ADAPTER_PARTS, Weights, adapter_said, canonical
from fact_convert.io.lazy_tensor import Tensor
from fact_convert.mapping import key_prefix
from fact_convert.models.adapter import find_resampler_config
from fact_convert.rules.key_tables import ADAPTER_INFIX
from fact_convert.weights import read_config, same_numbers
from fact_jax.utils.errors import UserError, error_context, listed

_COPY = f"{ADAPTER_INFIX}ln."


def extract_adapter(weights: Weights) -> Weights:
    """The adapter's tensors alone. UserError if there are none, or not all of them."""
    states: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("adapter", "resampler")}
    for kind, state in weights.states.items():
        if kind in ADAPTER_PARTS:
            states[kind] |= state
        elif kind == "unet":
            states["adapter"] |= {k: a for k, a in state.items() if ADAPTER_INFIX in k}
    if absent := " and no ".join(kind for kind, state in states.items() if not state):
        raise UserError(f"{weights.path}: no whole adapter: {weights.kind}, but no {absent}")
    return dataclasses.replace(weights, states=states)


def drop_norm_copies(weights: Weights, base: Weights | None) -> tuple[Weights, list[str]]:
    """An adapter without its copies of the base's norm2, and notes about them.

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
    if absent := [key for key in copies if _norm2(key) not in own]:
        raise UserError(
            f"{weights.path}: made for another base, {base.path} has no block for {listed(absent)}"
        )
    same = {key for key in copies if same_numbers(adapter[key], own[_norm2(key)])}
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


def adapter_config(weights: Weights, dim_head: int | None, guess: bool = True) -> dict:
    """The configuration for an adapter file's metadata: its source's, else inferred from shapes.

    Without ``guess`` it is empty where the heads are not known for certain.
    """
    said = adapter_said(weights)
    metadata = {"config": said} if said else weights.metadata
    if not said and not guess and dim_head is None and "dim_head" not in metadata:
        return {}
    prefix = key_prefix("resampler", weights.states["resampler"])
    own = {key.removeprefix(prefix): a for key, a in weights.states["resampler"].items()}
    with error_context(weights.path):
        found, note = find_resampler_config(own, metadata, dim_head)
        config = read_config("resampler", found, own)
    weights.notes.extend([note] if note else [])
    return {**said, "resampler": config.to_dict()}
