"""LoRAs merged into a base's weights and taken out again."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fact_convert.io.lazy_tensor import LazyTensor, State, Tensor
from fact_convert.lora.layers import Layer, squeeze_kernel
from fact_convert.lora.reading import Lora
from fact_convert.mapping import Difference, key_prefix, map_torch_key
from fact_convert.rules.key_tables import TABLES
from fact_convert.weights import dump_some, kind_of
from fact_jax.utils.errors import UserError


def merge_lora(
    states: Mapping[str, State], lora: Lora, scale: float = 1.0, dtype: str | None = None
) -> dict[str, State]:
    """:func:`merge_loras` of one LoRA."""
    return merge_loras(states, [(lora, scale)], dtype)


def merge_loras(
    states: Mapping[str, State],
    loras: Sequence[tuple[Lora, float]],
    dtype: str | None = None,
    *,
    remove: bool = False,
) -> dict[str, State]:
    """A base's states by kind with each LoRA added times its scale, each tensor when it is read.

    Sums are taken in float32 and rounded once, to ``dtype`` or to the base's own. What DoRA
    scales depends on the base without the others, and on their order, as in peft; its scale
    multiplies the low-rank part, as there. ``remove`` takes the LoRAs out again, but for the
    rounding of the base's precision. Raises one UserError with every layer that the base does not
    have or has in another shape, for DoRA that is to be removed, and for a scale that is not
    finite; a tensor that is not finite with the LoRAs in it raises one when it is read.
    """
    changes: dict[tuple[str, str], list[tuple[Layer, float]]] = defaultdict(list)
    prefixes = {kind: key_prefix(kind, state) for kind, state in states.items() if kind in TABLES}
    for lora, scale in loras:
        _check(lora, scale, remove)
        difference = Difference()
        for layer in lora.layers:
            key = prefixes.get(layer.kind, "") + layer.key
            base = states.get(layer.kind, {}).get(key)
            if base is None:
                difference.missing.append(f"{layer.kind}/{layer.key}")
            elif not layer.fits(base.shape):
                difference.misshapen.append(_misshapen(layer, key, base.shape))
            else:
                changes[layer.kind, key].append((layer, -scale if remove else scale))
        difference.raise_if_any(f"{lora.path}: the {lora.algorithm} does not fit this base")
    merged: dict[str, dict[str, Tensor]] = {kind: dict(state) for kind, state in states.items()}
    for (kind, key), layers in changes.items():
        merged[kind][key] = _changed(key, merged[kind][key], layers, dtype)
    return dict(merged)


def _check(lora: Lora, scale: float, remove: bool) -> None:
    if not math.isfinite(scale):
        raise UserError(f"{lora.path}: a scale of {scale} is no number to multiply it by")
    if remove and (dora := [x.key for x in lora.layers if x.magnitude is not None]):
        raise UserError(
            f"{lora.path}: is DoRA ({dora[0]}), which also rescaled the base's weights: it cannot "
            "be taken out again"
        )


def _misshapen(layer: Layer, key: str, base: tuple[int, ...]) -> str:
    if layer.magnitude is None or layer.magnitude.shape == base[layer.axis : layer.axis + 1]:
        return f"{layer.kind}/{key}: is {layer.shape}, wanted {squeeze_kernel(base)}"
    count = base[layer.axis : layer.axis + 1]
    return f"{layer.kind}/{key}: {layer.magnitude.size} magnitudes, wanted {count}"


def _changed(
    key: str, base: Tensor, layers: Sequence[tuple[Layer, float]], dtype: str | None
) -> LazyTensor:
    target = np.dtype(dtype or base.dtype)

    def read() -> np.ndarray:
        stored = np.asarray(base)
        before = stored.astype(np.result_type(stored.dtype, np.float32))
        merged = before
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for layer, scale in layers:
                merged = layer.apply(merged, before, scale)
            merged = merged.astype(target)
        if not np.isfinite(merged).all():
            raise UserError(f"{key}: with the LoRA in it, it is no longer finite in {target}")
        return merged

    return LazyTensor(base.shape, target, read)


def merge_into_model(
    kind: str, state: State, loras: Sequence[tuple[Lora, float]], dtype: str | None = None
) -> State:
    """One model's state with its part of the LoRAs, as :func:`merge_loras` adds them."""
    return merge_loras(
        {kind: state}, [(lora_for(lora, kind), scale) for lora, scale in loras], dtype
    )[kind]


def add_lora(module: nnx.Module, lora: Lora, scale: float = 1.0) -> nnx.Module:
    """A UNet or a text encoder with its part of the LoRA added, as :func:`merge_lora` adds it.

    ``module`` stays as it is, and what the LoRA leaves alone is shared. Raises one UserError with
    every layer that the module does not have or has in another shape.
    """
    kind = kind_of(module)
    touched = {layer.key for layer in lora_for(lora, kind).layers}
    prefixes = TABLES[kind].prefixes
    state = dump_some(module, lambda key: any(key.removeprefix(p) in touched for p in prefixes))
    graph, values = nnx.split(module)
    flat = dict(nnx.to_flat_state(values))
    paths = {".".join(map(str, path)): path for path in flat}
    prefix = key_prefix(kind, state)
    for key, array in merge_into_model(kind, state, [(lora, scale)]).items():
        mapping = map_torch_key(kind, key, prefix)
        assert mapping is not None, "dump_some gives names that the rules know"
        held = flat[paths[mapping.jax]]
        value = held.get_value()
        turned = mapping.transform.to_jax(np.asarray(array), value.ndim)
        flat[paths[mapping.jax]] = held.replace(jnp.asarray(turned, value.dtype))
    return nnx.merge(graph, nnx.from_flat_state(list(flat.items())))


def lora_for(lora: Lora, kind: str) -> Lora:
    """The part of a LoRA that changes one kind of model."""
    layers = tuple(layer for layer in lora.layers if layer.kind == kind)
    return dataclasses.replace(lora, layers=layers)
