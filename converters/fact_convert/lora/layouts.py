"""A LoRA written in another layout: kohya's, diffusers' or peft's."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fact_convert.io.hashing import CONTENT
from fact_convert.io.json_io import write_json
from fact_convert.io.lazy_tensor import State, Tensor
from fact_convert.io.output_paths import output_folder
from fact_convert.io.safetensors_io import DTYPES, write_safetensors
from fact_convert.lora.layers import Layer
from fact_convert.lora.merging import lora_for
from fact_convert.lora.names import LORA_PARTS, layer_name
from fact_convert.lora.peft_config import (
    CONFIG_NAME,
    FILE_STEMS,
    KOHYA_METADATA_KEY,
    METADATA_KEY,
    PeftConfig,
)
from fact_convert.lora.reading import Lora
from fact_jax.utils.errors import UserError

LAYOUTS = ("kohya", "diffusers", "peft")
_ALPHA_DTYPE = "alpha_dtype"
"""Metadata of ours: the precision that a source of kohya's had its alphas in, if not its own."""
_NAMES = {
    "kohya": ("lora_down.weight", "lora_up.weight", "dora_scale"),
    "diffusers": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    "peft": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
}
_DEFAULTS = {
    "peft_type": "LORA",
    "base_model_name_or_path": None,
    "task_type": None,
    "inference_mode": True,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "init_lora_weights": True,
}


def save_lora(
    lora: Lora,
    out: Path,
    layout: str,
    *,
    force: bool = False,
    dry_run: bool = False,
) -> None:
    """Write a LoRA in one of :data:`LAYOUTS`, its tensors bit for bit.

    kohya's and diffusers' is a ``.safetensors`` file, peft's a folder, of UNet and text encoder
    one with a folder for each. kohya's layout holds alphas as tensors, the others in peft's
    settings; the settings of the source are kept where they still say the same. Raises UserError
    for what the layout cannot hold; with ``dry_run`` that is all.
    """
    out = Path(out)
    if (out.suffix == ".safetensors") == (layout == "peft"):
        wanted = "a folder" if layout == "peft" else "a file .safetensors"
        raise UserError(f"{out}: in {layout}'s layout, a LoRA is {wanted}")
    check = [_problem(layer, layout) for layer in lora.layers]
    if problems := [problem for problem in check if problem]:
        raise UserError(f"{lora.path}: {problems[0]} ({len(problems)} layers)")
    kinds = [kind for kind in LORA_PARTS if lora_for(lora, kind).layers]
    settings = {kind: _settings(lora_for(lora, kind)) for kind in kinds}
    replaced = (METADATA_KEY, KOHYA_METADATA_KEY, CONTENT)
    metadata = {k: v for k, v in lora.metadata.items() if k not in replaced}
    own = {layer.parts["down"].dtype.name for layer in lora.layers}
    if layout != "kohya" and lora.alpha_dtype and own != {lora.alpha_dtype}:
        metadata[_ALPHA_DTYPE] = lora.alpha_dtype
    if dry_run:
        return
    if layout == "peft":
        _write_folder(lora, out, settings, metadata, force)
        return
    packed = {f"{LORA_PARTS[k]}.{n}": v for k, said in settings.items() for n, v in said.items()}
    if layout == "kohya":
        metadata.pop(_ALPHA_DTYPE, None)
    if layout == "diffusers" or lora.settings:
        key = METADATA_KEY if layout == "diffusers" else KOHYA_METADATA_KEY
        metadata[key] = json.dumps(packed)
    texts = {"format": "pt", **metadata}
    write_safetensors(out, _state(lora, layout), texts, replace=force)


def _write_folder(
    lora: Lora,
    out: Path,
    settings: Mapping[str, Mapping],
    metadata: Mapping[str, str],
    force: bool,
) -> None:
    with output_folder(out, force=force) as folder:
        for kind, said in settings.items():
            home = folder / LORA_PARTS[kind] if len(settings) > 1 else folder
            home.mkdir(exist_ok=True)
            state = _state(lora_for(lora, kind), "peft")
            file = home / f"{FILE_STEMS[0]}.safetensors"
            write_safetensors(file, state, {"format": "pt", **metadata})
            write_json(home / CONFIG_NAME, said)


def _problem(layer: Layer, layout: str) -> str | None:
    """Why a layout cannot hold a layer, if it cannot."""
    if layer.algorithm != "LoRA":
        return f"is {layer.algorithm}; only LoRA and DoRA are converted"
    if layer.scalar != 1:
        return "has scalars beside its alphas, which only LyCORIS reads"
    if layout != "kohya" and "mid" in layer.parts:
        return f"has convolutions of three parts (lora_mid), which {layout} does not have"
    if layout != "kohya" and layer.axis:
        return f"has DoRA's magnitudes for the inputs, {layout} has them for the outputs"
    return None


def _state(lora: Lora, layout: str) -> State:
    down, up, magnitude = _NAMES[layout]
    state: dict[str, Tensor] = {}
    for layer in lora.layers:
        name = layer_name(layout, layer.kind, layer.key)
        state[f"{name}.{down}"], state[f"{name}.{up}"] = layer.parts["down"], layer.parts["up"]
        if "mid" in layer.parts:
            state[f"{name}.lora_mid.weight"] = layer.parts["mid"]
        if layer.magnitude is not None:
            shape = _magnitude_shape(layer, layout)
            state[f"{name}.{magnitude}"] = layer.magnitude.reshape(shape)
        if layout == "kohya":
            state[f"{name}.alpha"] = _alpha(layer, lora)
    return state


def _magnitude_shape(layer: Layer, layout: str) -> list[int]:
    """kohya's (n, 1, ...), (1, n, ...) of inputs; peft's (n,), of convolutions (1, n, 1, 1)."""
    ndim = layer.parts["down"].ndim
    if layout != "kohya" and ndim == 2:
        return [-1]
    axis = layer.axis if layout == "kohya" else 1
    return [-1 if i == axis else 1 for i in range(ndim)]


def _alpha(layer: Layer, lora: Lora) -> np.ndarray:
    """Alpha as a tensor, in the first precision that holds it: the source's, the layer's own."""
    said = lora.alpha_dtype or lora.metadata.get(_ALPHA_DTYPE)
    known = [dtype for dtype in DTYPES.values() if dtype.name == said]
    for dtype in (*known, layer.parts["down"].dtype, np.dtype(np.float32)):
        with np.errstate(over="ignore"):
            alpha = np.asarray(layer.alpha).astype(dtype)
        if float(alpha) == layer.alpha:
            return alpha
    return np.asarray(layer.alpha, np.float64)


def _settings(lora: Lora) -> dict[str, object]:
    """peft's settings of one model's layers: those of the source, if they say the same."""
    (kind,) = {layer.kind for layer in lora.layers}
    modules = {layer.key.removesuffix(".weight"): layer for layer in lora.layers}
    source = lora.settings.get(kind)
    values = dict(source.values) if source else {}
    if source and _says_the_same(source, modules):
        return values
    magnitudes = {layer.magnitude is not None for layer in lora.layers}
    if len(magnitudes) > 1:
        raise UserError(f"{lora.path}: only some layers are DoRA, which peft does not have")
    ranks = {module: layer.rank for module, layer in modules.items()}
    alphas = {module: _whole(layer.alpha) for module, layer in modules.items()}
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    return {
        **_DEFAULTS,
        **values,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "target_modules": sorted(modules),
        "use_dora": magnitudes.pop(),
        "use_rslora": False,
    }


def _says_the_same(source: PeftConfig, modules: Mapping[str, Layer]) -> bool:
    # Which pattern fits may depend on a prefix that the names had in the source.
    return "target_modules" in source.values and all(
        source.rank(module) == layer.rank
        and source.alpha(module, layer.algorithm, layer.rank) == layer.alpha
        and source.dora == (layer.magnitude is not None)
        for module, layer in modules.items()
    )


def _whole(alpha: float) -> float | int:
    return int(alpha) if alpha.is_integer() else alpha
