"""LoRA files (arXiv 2106.09685), merged into a base's weights and taken out again.

Layouts: kohya's (``lora_unet_...``, with diffusers' block names or the original ones, and its
convolutions), diffusers' old and new ones, and peft's.
"""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.arrays import Lazy
from converters.kinds import CONV, LINEAR, POINTWISE, Leaf
from converters.ldm import unet_pairs
from converters.mapping import Difference, is_float, place_of, prefix_of
from converters.readers import State, read_file, read_json
from converters.rules import TABLES
from converters.weights import dump_some, kind_of
from fact_jax.errors import UserError

LORA_PARTS = {"unet": "unet", "clip_text": "text_encoder"}
"""The parts of a pipeline that a LoRA changes, by the kind of their layers."""

_PART = re.compile(
    r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?[._](?P<part>down|up|mid|A|B)(?:\.\w+)?\.weight"
    r"|(?:[._]lora)?\.(?P<alpha>alpha))"
)
_PARTS = {"A": "down", "B": "up"}
_OTHER_SORTS = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.dora_scale|lora_magnitude_vector": "DoRA",
    r"\.oft_": "OFT",
    r"\.on_input$": "IA3",
    r"\.diff(_b)?$": "a full difference of weights",
}
"""Relatives of LoRA that are not merged here, by what stands in their keys."""
_KOHYA = {"lora_unet_": "unet", "lora_te_": "clip_text", "lora_te1_": "clip_text"}
_DOTTED = {"unet.": ("unet",), "text_encoder.": ("clip_text",), "": ("unet", "clip_text")}
_SDXL = re.compile(r"lora_te2_|text_encoder_2\.|label_emb|add_embedding|transformer_blocks.[1-9]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What is added to one weight of the base: ``alpha / rank * up @ down``.

    ``key`` is the weight's PyTorch name in a model of this ``kind``, without a prefix. ``mid`` is
    the convolution that stands between the other two in some of kohya's.
    """

    kind: str
    key: str
    down: np.ndarray
    up: np.ndarray
    alpha: float
    mid: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), and height and width of a convolution's kernel unless it is 1 x 1."""
        inner = self.down if self.mid is None else self.mid
        kernel = inner.shape[2:]
        return self.up.shape[0], self.down.shape[1], *(() if math.prod(kernel) == 1 else kernel)

    def delta(self) -> np.ndarray:
        """What it adds at scale 1, in float32."""
        down, up = (_matrix(a) for a in (self.down, self.up))
        if self.mid is not None:
            # up (o, r) after mid (r, s, h, w) after down (s, i): one convolution.
            middle = np.asarray(self.mid, np.float32)
            product = np.einsum("or,rshw,si->oihw", up, middle, down, optimize=True)
        else:
            product = up @ down
        return product.reshape(self.shape) * np.float32(self.alpha / self.rank)


def _matrix(array: np.ndarray) -> np.ndarray:
    return np.asarray(array.reshape(array.shape[0], -1), np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file; ``metadata`` is what it says of itself."""

    path: Path
    layers: tuple[Layer, ...]
    metadata: Mapping[str, str]


def read_lora(path: str | os.PathLike) -> Lora:
    """Read a LoRA file, or a folder as peft and diffusers save them.

    Raises one UserError with every key that belongs to no layer of Stable Diffusion 1.5, and says
    so if the file is for SDXL or is another sort of change than a LoRA.
    """
    path = Path(path)
    file, config = _find(path) if path.is_dir() else (path, {})
    state, text = read_file(file)
    if not config and "lora_adapter_metadata" in text:
        config = _read_settings(text["lora_adapter_metadata"], file)
    difference, parts = Difference(), {}
    for key, array in state.items():
        if match := _PART.fullmatch(key):
            part = "alpha" if match["alpha"] else _PARTS.get(match["part"], match["part"])
            parts.setdefault(match["layer"], {})[part] = array
        else:
            difference.unexpected.append(key)
    _refuse_other_sorts(file, state)
    layers: dict[tuple[str, str], Layer] = {}
    for name, found in parts.items():
        place = _locate(name)
        if place is None:
            difference.unexpected.append(name)
        elif place in layers:
            difference.other.append(f"{name}: a second change of {place[1]}")
        elif layer := _layer(name, place, found, config, difference):
            layers[place] = layer
    difference.raise_if_any(f"{file}: not a LoRA for Stable Diffusion 1.5")
    if not layers:
        raise UserError(f"{file}: holds no LoRA")
    return Lora(path=path, layers=tuple(layers.values()), metadata=text)


def is_lora(keys: Iterable[str]) -> bool:
    """Whether some of a file's keys are those of a LoRA, for whatever model."""
    return any((match := _PART.fullmatch(key)) and match["part"] for key in keys)


def _find(folder: Path) -> tuple[Path, dict]:
    """The weight file of a folder, and peft's settings beside it."""
    for name in ("adapter_model", "pytorch_lora_weights"):
        for suffix in (".safetensors", ".bin"):
            if (file := folder / f"{name}{suffix}").exists():
                settings = folder / "adapter_config.json"
                return file, read_json(settings) if settings.exists() else {}
    raise UserError(f"{folder}: no adapter_model.safetensors, no pytorch_lora_weights.safetensors")


def _read_settings(text: str, file: Path) -> dict:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise UserError(f"{file}: metadata 'lora_adapter_metadata' is not JSON ({err})") from err
    if not isinstance(settings, dict):
        raise UserError(f"{file}: metadata 'lora_adapter_metadata' is not an object")
    return settings


def _refuse_other_sorts(file: Path, state: State) -> None:
    for key in state:
        for mark, name in _OTHER_SORTS.items():
            if re.search(mark, key):
                raise UserError(
                    f"{file}: is {name} ({key}), which is not merged here: only LoRA is"
                )
    wide = [k for k, a in state.items() if "attn2" in k and "to_k" in k and a.shape[1:2] == (2048,)]
    if marks := wide or [key for key in state if _SDXL.search(key)]:
        raise UserError(
            f"{file}: is a LoRA for SDXL ({marks[0]}), the base is Stable Diffusion 1.5"
        )


def _layer(
    name: str,
    place: tuple[str, str],
    found: Mapping[str, np.ndarray],
    config: Mapping,
    difference: Difference,
) -> Layer | None:
    """One layer, if its parts fit each other; else a line in ``difference``."""
    if lacking := [part for part in ("down", "up") if part not in found]:
        difference.missing += [f"{part} of {name}" for part in lacking]
        return None
    matrices = {part: array for part, array in found.items() if part != "alpha"}
    if odd := [array.dtype for array in matrices.values() if not is_float(array.dtype)]:
        difference.other.append(f"{name}: {odd[0]}, wanted floating point")
        return None
    down, up, mid = found["down"], found["up"], found.get("mid")
    inner = down.shape[:1] if mid is None else mid.shape[1:2]
    outer = down.shape[:1] if mid is None else mid.shape[:1]
    wrong = (
        not (down.ndim in (2, 4) and up.ndim in (2, 4) and (mid is None or mid.ndim == 4))
        or down.shape[:1] != inner
        or up.shape[1:2] != outer
        or math.prod(up.shape[2:]) != 1
        or (mid is not None and math.prod(down.shape[2:]) != 1)
        or 0 in down.shape
    )
    if wrong:
        shapes = ", ".join(f"{part} {array.shape}" for part, array in found.items())
        difference.misshapen.append(f"{name}: {shapes}")
        return None
    alpha = _alpha(place, found.get("alpha"), config, down.shape[0])
    if not math.isfinite(alpha):
        difference.other.append(f"{name}: alpha is {alpha}")
        return None
    kind, key = place
    return Layer(kind=kind, key=key, down=down, up=up, alpha=alpha, mid=mid)


def _alpha(place: tuple[str, str], stored: np.ndarray | None, config: Mapping, rank: int) -> float:
    """Alpha as stored, or as peft's settings say, or the rank: then the factor is 1."""
    if stored is not None:
        return float(stored.reshape(-1)[0]) if stored.size == 1 else math.nan
    kind, key = place
    prefix = {"unet": "unet.", "clip_text": "text_encoder."}[kind]

    def setting(name: str, default):
        return config.get(f"{prefix}{name}", config.get(name, default))

    alpha, module = setting("lora_alpha", rank), key.removesuffix(".weight")
    special = setting("alpha_pattern", None)
    for name, value in special.items() if isinstance(special, dict) else ():
        if module == name or module.endswith(f".{name}"):
            alpha = value
    if not isinstance(alpha, int | float):
        return math.nan
    return alpha * (math.sqrt(rank) if setting("use_rslora", False) else 1.0)


def _locate(name: str) -> tuple[str, str] | None:
    """Kind and key of the weight that a layer's name in a LoRA file means, or None."""
    for prefix, kind in _KOHYA.items():
        if name.startswith(prefix):
            module = _unflatten(kind, name.removeprefix(prefix))
            return (kind, f"{module}.weight") if module else None
    name = name.removeprefix("base_model.model.").replace(".processor", "")
    prefix = next(prefix for prefix in _DOTTED if name.startswith(prefix))
    for kind in _DOTTED[prefix]:
        module = _plain_name(kind, name.removeprefix(prefix))
        place = place_of(kind, f"{module}.weight", "")
        if place is not None and _is_matrix(place.leaf):
            return kind, f"{module}.weight"
    return None


def _plain_name(kind: str, module: str) -> str:
    """A module's path without what diffusers' older layouts did to it."""
    if kind == "unet":
        return re.sub(r"\.to_out$", ".to_out.0", module)
    module = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", module)
    return module.removeprefix("text_model.")


def _is_matrix(leaf: Leaf) -> bool:
    return leaf in [kind.leaves[0] for kind in (LINEAR, CONV, POINTWISE)]


def _unflatten(kind: str, flat: str) -> str | None:
    """The module whose path with underscores for dots this is."""
    flat = _from_original(flat) if kind == "unet" else flat.removeprefix("text_model_")
    for pattern, path in _flat_names(kind):
        if match := pattern.fullmatch(flat):
            return path.format(**match.groupdict())
    return None


@functools.cache
def _flat_names(kind: str) -> list[tuple[re.Pattern, str]]:
    paths = [
        rule.torch
        for rule in TABLES[kind].rules
        if _is_matrix(rule.kind.leaves[0]) and ".processor." not in rule.torch
    ]
    escaped = [re.escape(path.replace(".", "_")) for path in paths]
    patterns = [re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", pattern) for pattern in escaped]
    return [(re.compile(pattern), path) for pattern, path in zip(patterns, paths, strict=True)]


def _from_original(flat: str) -> str:
    """A name from the original Stable Diffusion code as diffusers'; others stay as they are."""
    for start, ours in _original_names():
        if flat == start or flat.startswith(f"{start}_"):
            return ours + flat.removeprefix(start)
    return flat


@functools.cache
def _original_names() -> list[tuple[str, str]]:
    """Stable Diffusion 1.5's, the longest first: a LoRA alone does not tell the base's size."""
    keys = {f"down_blocks.{i}.resnets.{j}.norm1.weight" for i in range(4) for j in range(2)}
    keys |= {f"up_blocks.{i}.attentions.0.norm.weight" for i in (1, 2, 3)}
    flat = [tuple(name.replace(".", "_") for name in pair) for pair in unet_pairs(keys)]
    return sorted(flat, key=lambda pair: -len(pair[0]))


def merge(
    states: Mapping[str, State], lora: Lora, scale: float = 1.0
) -> dict[str, dict[str, np.ndarray | Lazy]]:
    """A base's states by kind with ``scale`` times the LoRA added, each tensor when it is read.

    ``-scale`` takes it out again, but for the rounding of the base's precision. Raises one
    UserError with every layer that the base does not have or has in another shape; a tensor that
    is not finite with the LoRA in it raises one when it is read.
    """
    difference = Difference()
    merged = {kind: dict(state) for kind, state in states.items()}
    prefixes = {kind: prefix_of(kind, state) for kind, state in states.items() if kind in TABLES}
    for layer in lora.layers:
        key = prefixes.get(layer.kind, "") + layer.key
        base = states.get(layer.kind, {}).get(key)
        if base is None:
            difference.missing.append(f"{layer.kind}/{layer.key}")
        elif _bare(base.shape) != layer.shape:
            difference.misshapen.append(
                f"{layer.kind}/{key}: is {layer.shape}, wanted {_bare(base.shape)}"
            )
        else:
            merged[layer.kind][key] = _added(key, base, layer, scale)
    difference.raise_if_any(f"{lora.path}: the LoRA does not fit this base")
    return merged


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _added(key: str, base: np.ndarray | Lazy, layer: Layer, scale: float) -> Lazy:
    def read() -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            added = np.float32(scale) * layer.delta().reshape(base.shape)
            merged = (np.asarray(base).astype(np.float32) + added).astype(base.dtype)
        if not np.isfinite(merged).all():
            raise UserError(f"{key}: with the LoRA in it, it is no longer finite in {base.dtype}")
        return merged

    return Lazy(base.shape, base.dtype, read)


def add_lora(module: nnx.Module, lora: Lora, scale: float = 1.0) -> nnx.Module:
    """A UNet or a text encoder with its part of the LoRA added, as :func:`merge` adds it.

    ``module`` stays as it is, and what the LoRA leaves alone is shared. Raises one UserError with
    every layer that the module does not have or has in another shape.
    """
    kind = kind_of(module)
    own = dataclasses.replace(lora, layers=tuple(x for x in lora.layers if x.kind == kind))
    touched = {layer.key for layer in own.layers}
    prefixes = TABLES[kind].prefixes
    state = dump_some(module, lambda key: any(key.removeprefix(p) in touched for p in prefixes))
    graph, values = nnx.split(module)
    flat = dict(nnx.to_flat_state(values))
    paths = {".".join(map(str, path)): path for path in flat}
    prefix = prefix_of(kind, state)
    for key, array in merge({kind: state}, own, scale)[kind].items():
        place = place_of(kind, key, prefix)
        held = flat[paths[place.jax]]
        value = held.get_value()
        turned = place.leaf.to_jax(np.asarray(array), value.ndim)
        flat[paths[place.jax]] = held.replace(jnp.asarray(turned, value.dtype))
    return nnx.merge(graph, nnx.from_flat_state(list(flat.items())))
