"""PyTorch state dicts to modules and back, bit for bit: ``load_state`` and ``dump_state``."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
from flax import nnx

from fact_convert.io.lazy_tensor import State, Tensor, cast, check_range, contiguous
from fact_convert.mapping import (
    KeyMapping,
    Shapes,
    fits,
    is_float,
    map_jax_path,
    match_module,
    match_state,
)
from fact_convert.rules.key_tables import ADAPTER_INFIX, TABLES
from fact_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from fact_jax.models.controlnet import ControlNet, ControlNetConfig
from fact_jax.models.resampler import Resampler, ResamplerConfig
from fact_jax.models.transface import TransFace, TransFaceConfig
from fact_jax.models.unet import UNet, UNetConfig
from fact_jax.models.vae import AutoencoderKL, VAEConfig
from fact_jax.utils.errors import UserError, listed

log = logging.getLogger(__name__)

_MODELS: dict[str, tuple[type[nnx.Module], Any]] = {
    "unet": (UNet, UNetConfig),
    "vae": (AutoencoderKL, VAEConfig),
    "clip_text": (CLIPTextModel, CLIPTextConfig),
    "transface": (TransFace, TransFaceConfig),
    "resampler": (Resampler, ResamplerConfig),
    "controlnet": (ControlNet, ControlNetConfig),
}
_LARGEST = 2**24
"""No width, vocabulary or picture of these models comes near it."""
_MOST_LAYERS = 512
"""Taken at most where there are no tensors to compare with."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Key, dtype and shape of a tensor in the file it came from.

    ``bits`` holds the numbers of tensors that the module has no place for.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    bits: bytes | None = None

    @classmethod
    def of(cls, key: str, array: Tensor, keep: bool = False) -> "TensorInfo":
        return cls(key, array.dtype.name, array.shape, array.tobytes() if keep else None)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a module's weights came from: what is needed to write the very same file again.

    It hangs on the module as the static attribute ``origin`` and goes with it through
    ``nnx.split`` and ``nnx.merge``; a module that was never loaded has none.
    """

    prefix: str
    tensors: tuple[TensorInfo, ...]

    def __hash__(self) -> int:
        return hash((self.prefix, len(self.tensors)))


def load_state(kind: str, state: State, config, *, dtype=jnp.float32) -> nnx.Module:
    """Build a model from a flat PyTorch state.

    ``kind`` is one of unet, vae, clip_text, transface, resampler, controlnet. ``config`` is the
    peer's configuration as a dict (or our frozen config). A ``unet`` state may hold the released
    ``...attn2.processor.*`` keys: then the UNet has adapters. Whatever precision the file has,
    parameters are of ``dtype``, scalars of float32; :func:`dump_state` gives the file's own
    precision back.

    Raises one UserError that lists every missing, unexpected and misshapen key, and one that names
    a key whose numbers are too large for ``dtype``.
    """
    return _build(kind, state, read_config(kind, config, state), dtype)


def add_state(module: nnx.Module, state: State, config) -> nnx.Module:
    """A module with the weights of ``module`` and of ``state`` (an adapter's, say) together.

    ``config`` is the configuration of the result. The parameters of ``module`` are shared, not
    copied. Raises one UserError that lists every missing, unexpected and misshapen key.
    """
    dtype = next(iter(parameters(module).values())).get_value().dtype
    return _build(kind_of(module), state, config, dtype, base=module)


def _build(kind: str, state: State, config, dtype, base: nnx.Module | None = None) -> nnx.Module:
    graph, flat = abstract_state(kind, config)
    held = parameters(base) if base is not None else {}
    prefix, sources, ignored = match_state(kind, state, flat_shapes(flat), held)
    values, replaced = {}, {}
    for path, mappings in sources.items():
        if not mappings:
            values[path] = held[path].get_value()
            continue
        winner, ndim = mappings[-1], len(flat[path].get_value().shape)
        view = winner.transform.to_jax(state[winner.torch], ndim)
        # Scalars are gates, which half precision would round by 0.2 %.
        values[path] = _to_device(view, dtype if ndim else jnp.float32, winner.torch)
        if path in held:
            replaced[map_jax_path(kind, path, prefix)[0].torch] = winner.torch
    kept = {*ignored, *_overridden(sources, state)}
    module = _assemble(graph, flat, values)
    tensors = [TensorInfo.of(key, array, key in kept) for key, array in state.items()]
    module.origin = Origin(prefix, (*_base_tensors(base, replaced, state), *tensors))
    return module


def _base_tensors(
    base: nnx.Module | None, replaced: Mapping[str, str], state: State
) -> list[TensorInfo]:
    """The base's tensors; data that an adapter's copies override are kept aside."""
    if base is None:
        return []
    origin = getattr(base, "origin", None)
    tensors = {tensor.key: tensor for tensor in (origin.tensors if origin else ())}
    differing = []
    for key, array in dump_some(base, lambda name: name in replaced).items():
        if not same_numbers(array, state[replaced[key]]):
            tensors[key] = TensorInfo.of(key, array, keep=True)
            differing.append(replaced[key])
    _say_overridden(differing, list(replaced.values()))
    return list(tensors.values())


def dump_state(module: nnx.Module) -> dict[str, np.ndarray]:
    """The module's weights as a flat PyTorch state: keys, order, precision and bits of the source.

    A tensor that was loaded in half precision and has been trained since, so that half precision
    cannot hold it any more, stays in float32. A module that was never loaded gets the peers' own
    names, float32. Raises one UserError that lists every parameter that does not fit.
    """
    return dump_some(module, lambda key: True)


def dump_some(module: nnx.Module, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """:func:`dump_state` of the keys that are ``wanted``; the others are not copied."""
    kind = kind_of(module)
    origin = getattr(module, "origin", None)
    prefix = origin.prefix if origin else TABLES[kind].prefixes[0]
    flat = parameters(module)
    _, expected = abstract_state(kind, module.config)
    names = match_module(kind, flat_shapes(flat), flat_shapes(expected), prefix)
    mappings = {mapping.torch: mapping for options in names.values() for mapping in options}

    state, written = {}, set()
    for tensor in origin.tensors if origin else ():
        mapping = mappings.get(tensor.key)
        if mapping is not None and not mapping.overrides:
            written.add(mapping.jax)
        if not wanted(tensor.key):
            continue
        if tensor.bits is not None:
            array = np.frombuffer(tensor.bits, np.dtype(tensor.dtype)).reshape(tensor.shape).copy()
        elif mapping is None:
            continue  # the module has lost this part since, as a base without its adapter
        else:
            array = _to_host(flat[mapping.jax], mapping, len(tensor.shape), tensor.dtype)
        state[tensor.key] = array
    for path, options in names.items():
        if path not in written and wanted(options[0].torch):
            state[options[0].torch] = _to_host(flat[path], options[0])
    return state


def cast_state(state: State, dtype: str | None) -> State:
    """A flat state with its floating tensors in ``dtype`` (a name, as float16); None: as it is.

    Each is rounded when it is wanted; UserError then, if a number is too large for ``dtype``.
    """
    if dtype is None:
        return state
    target = jnp.dtype(dtype)
    return {k: cast(a, target, k) if is_float(a.dtype) else a for k, a in state.items()}


def read_config(kind: str, config, state: State | None = None):
    """The peer's configuration (a dict) as ours, with what the state adds: the adapters' width."""
    _, config_class = _model(kind)
    if not isinstance(config, config_class):
        if not isinstance(config, Mapping):
            raise UserError(f"the {kind} configuration is not a dictionary of settings")
        try:
            config = config_class.from_dict(config)
        except (TypeError, ValueError, AttributeError, OverflowError) as err:
            raise UserError(f"the {kind} configuration does not make sense: {err}") from err
    _check_numbers(kind, config, state)
    if kind == "unet":
        mark = f"{ADAPTER_INFIX}linear.weight"
        widths = {a.shape[-1] for k, a in (state or {}).items() if k.endswith(mark) and a.ndim == 2}
        if widths:
            config = dataclasses.replace(config, face_dim=max(widths))
    return config


def _check_numbers(kind: str, config, state: State | None) -> None:
    """UserError for numbers that no layer can have, before anything is built of them.

    How many layers a model has is compared with how many tensors there are, if there are any: a
    layer costs time even where its parameters are never made.
    """
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), field.default
        several = isinstance(usual, tuple)
        usual = next(iter(usual), None) if isinstance(usual, tuple) else usual
        numbers = value if several and isinstance(value, tuple) else (value,)
        if value == field.default == ():
            continue
        whole = isinstance(usual, int) or usual is None
        if isinstance(usual, bool | str) or (usual is None and value is None):
            continue
        least = {"encoder_blocks": 0}.get(field.name, -1 if "_token_id" in field.name else 1)
        fine = _is_whole(least) if whole else _is_positive
        if several != isinstance(value, tuple) or not numbers or not all(map(fine, numbers)):
            raise UserError(
                f"the {kind} configuration does not make sense: {field.name} is {value!r:.80}"
            )
    layers, limit = _count_layers(config), len(state) if state else _MOST_LAYERS
    if layers > limit:
        there = f"there are {limit} tensors" if state else f"at most {limit} are supported"
        raise UserError(f"the {kind} configuration speaks of {layers} layers, but {there}")
    for width, heads in _attentions(config):
        if width % heads:
            raise UserError(
                f"the {kind} configuration does not make sense: {heads} heads cannot share "
                f"{width} channels"
            )


def _is_whole(least: int) -> Callable[[object], bool]:
    return lambda n: isinstance(n, int) and not isinstance(n, bool) and least <= n <= _LARGEST


def _is_positive(n: object) -> bool:
    return isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < math.inf


def _count_layers(config) -> int:
    named = (getattr(config, name, 0) for name in ("num_hidden_layers", "depth"))
    levels = len(getattr(config, "block_out_channels", ()))
    conditions = len(getattr(config, "conditioning_embedding_out_channels", ()))
    return sum(named) + conditions + levels * getattr(config, "layers_per_block", 0)


def _attentions(config) -> Iterator[tuple[int, int]]:
    """Channels and heads wherever the tensors' shapes would let any number of heads pass."""
    if hasattr(config, "heads") and hasattr(config, "block_out_channels"):
        both = list(zip(config.block_out_channels, config.heads, strict=True))
        up = getattr(config, "up_attention", config.down_attention[::-1])[::-1]
        attends = [a or b for a, b in zip(config.down_attention, up, strict=True)]
        yield from (pair for pair, own in zip(both, (*attends[:-1], True), strict=True) if own)
    for width, heads in (("hidden_size", "num_attention_heads"), ("embed_dim", "num_heads")):
        if hasattr(config, width):
            yield getattr(config, width), getattr(config, heads)


def abstract_state(kind: str, config) -> tuple[nnx.GraphDef, dict[str, nnx.Variable]]:
    """A model's structure and the shapes of its parameters by path; nothing is computed."""
    try:
        graph, items = _skeleton(kind, config)
    except (TypeError, ValueError, ArithmeticError, IndexError, AttributeError) as err:
        raise UserError(f"no {kind} can be built from its configuration: {err}") from err
    return graph, dict(items)


def abstract_module(kind: str, config) -> nnx.Module:
    """A model whose parameters are zeros: under ``jax.eval_shape`` they take no memory."""
    graph, flat = abstract_state(kind, config)
    shapes = {path: var.get_value() for path, var in flat.items()}
    return _assemble(graph, flat, {p: jnp.zeros(s.shape, s.dtype) for p, s in shapes.items()})


@functools.lru_cache(maxsize=16)
def _skeleton(kind: str, config):
    model, _ = _model(kind)
    module = nnx.eval_shape(lambda: model(config, rngs=ConstantRngs()))
    graph, state = nnx.split(module)
    return graph, tuple((_dotted(path), var) for path, var in nnx.to_flat_state(state))


class ConstantRngs(nnx.Rngs):
    """Stands in for ``nnx.Rngs`` where no number is ever drawn.

    The counters of real ones make abstract evaluation quadratic in the number of layers.
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)


def parameters(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Every variable of a module by its dotted path."""
    return {_dotted(path): var for path, var in nnx.to_flat_state(nnx.state(module))}


def kind_of(module: nnx.Module) -> str:
    """The kind that :func:`load_state` makes this module of."""
    for kind, (model, _) in _MODELS.items():
        if isinstance(module, model):
            return kind
    raise UserError(f"a {type(module).__name__} is none of: {', '.join(_MODELS)}")


def _model(kind: str) -> tuple[Any, Any]:
    if kind not in _MODELS:
        raise UserError(f"no such kind of model: {kind!r} (known: {', '.join(_MODELS)})")
    return _MODELS[kind]


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def flat_shapes(flat: Mapping[str, nnx.Variable]) -> Shapes:
    """Shapes of variables by their dotted paths."""
    return {path: tuple(var.get_value().shape) for path, var in flat.items()}


def _assemble(graph: nnx.GraphDef, flat: dict[str, nnx.Variable], values: dict) -> nnx.Module:
    split = [(tuple(_index(p) for p in path.split(".")), path) for path in flat]
    state = nnx.from_flat_state([(keys, flat[path].replace(values[path])) for keys, path in split])
    return nnx.merge(graph, state)


def _index(part: str) -> str | int:
    return int(part) if part.isdigit() else part


def _to_device(view: Tensor, dtype, key: str) -> jax.Array:
    # jax may keep the copy's buffer, which nobody else has.
    with np.errstate(over="ignore"):
        copied = contiguous(view, jnp.dtype(dtype))
    return jax.device_put(check_range(copied, view, key))


def _to_host(
    var: nnx.Variable, mapping: KeyMapping, ndim: int | None = None, dtype: str | None = None
) -> np.ndarray:
    value = np.asarray(var.get_value())
    wanted = np.dtype(dtype) if dtype else value.dtype
    if wanted != value.dtype and not fits(value, wanted):
        wanted = value.dtype
    view = mapping.transform.to_torch(value, value.ndim if ndim is None else ndim)
    return contiguous(view, wanted)


def _overridden(sources: Mapping[str, list[KeyMapping]], state: State) -> set[str]:
    """Keys whose numbers a second copy in the same file replaced."""
    doubled = [(each[0].torch, each[-1].torch) for each in sources.values() if each[1:]]
    beaten = {base: copy for base, copy in doubled if not same_numbers(state[base], state[copy])}
    _say_overridden(list(beaten.values()), [copy for _, copy in doubled])
    return set(beaten)


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are alike bit for bit in float32."""
    return one.astype(np.float32).tobytes() == other.astype(np.float32).tobytes()


def _say_overridden(differing: list[str], copies: list[str]) -> None:
    if differing:
        log.warning(
            "%d tensors hold a second copy of the base's weights that differs from them, and the "
            "copy wins, as in the released code: %s",
            len(differing),
            listed(differing),
        )
    elif copies:
        log.info("%d tensors repeat the base's own weights, as %s", len(copies), copies[0])
