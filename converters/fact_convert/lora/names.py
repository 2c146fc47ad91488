"""What a layer is called in each layout of LoRA files, and which weight of the base that means."""

import functools
import re

from fact_convert.mapping import map_torch_key
from fact_convert.rules.key_tables import TABLES
from fact_convert.rules.layer_transforms import CONV, LINEAR, POINTWISE, ParameterTransform
from fact_convert.rules.ldm import unet_pairs

LORA_PARTS = {"unet": "unet", "clip_text": "text_encoder"}
"""The parts of a pipeline that a LoRA changes, by the kind of their layers."""
PEFT = "base_model.model."
"""What stands before every key of a file of peft's."""
_KOHYA = {"lora_unet_": "unet", "lora_te_": "clip_text", "lora_te1_": "clip_text"}
_DOTTED = {"unet.": ("unet",), "text_encoder.": ("clip_text",), "": ("unet", "clip_text")}


def layout_of(name: str) -> str:
    """The layout that a layer's name belongs to: ``kohya``, ``peft`` or ``diffusers``."""
    if name.startswith(tuple(_KOHYA)):
        return "kohya"
    return "peft" if name.startswith(PEFT) else "diffusers"


def find_weight(name: str) -> tuple[str, str] | None:
    """Kind and key of the weight that a layer's name in a LoRA file means, or None."""
    for prefix, kind in _KOHYA.items():
        if name.startswith(prefix):
            module = _unflatten(kind, name.removeprefix(prefix))
            return (kind, f"{module}.weight") if module else None
    name = name.removeprefix(PEFT).replace(".processor", "")
    prefix = next(prefix for prefix in _DOTTED if name.startswith(prefix))
    for kind in _DOTTED[prefix]:
        module = _plain_name(kind, name.removeprefix(prefix))
        mapping = map_torch_key(kind, f"{module}.weight", "")
        if mapping is not None and _is_matrix(mapping.transform):
            return kind, f"{module}.weight"
    return None


def module_path(name: str, key: str) -> str:
    """A layer's path in its own model, as the patterns of peft's settings are matched with it."""
    if layout_of(name) == "kohya":
        return key.removesuffix(".weight")
    return re.sub(r"^(unet|text_encoder)\.", "", name.removeprefix(PEFT))


def layer_name(layout: str, kind: str, key: str) -> str:
    """What the layer of a weight is called in a layout: :func:`find_weight` finds it again."""
    module = key.removesuffix(".weight")
    if layout == "peft":
        # As transformers 5 has it; until then `text_model.` stood before it.
        return PEFT + module
    module = f"text_model.{module}" if kind == "clip_text" else module
    if layout == "diffusers":
        return f"{LORA_PARTS[kind]}.{module}"
    prefix = next(prefix for prefix, other in _KOHYA.items() if other == kind)
    return prefix + module.replace(".", "_")


def _plain_name(kind: str, module: str) -> str:
    """A module's path without what diffusers' older layouts did to it."""
    if kind == "unet":
        return re.sub(r"\.to_out$", ".to_out.0", module)
    module = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", module)
    return module.removeprefix("text_model.")


def _is_matrix(parameter: ParameterTransform) -> bool:
    return parameter in [layer.parameters[0] for layer in (LINEAR, CONV, POINTWISE)]


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
        if _is_matrix(rule.layer.parameters[0]) and ".processor." not in rule.torch
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
    flat = [(ldm.replace(".", "_"), ours.replace(".", "_")) for ldm, ours in unet_pairs(keys)]
    return sorted(flat, key=lambda pair: -len(pair[0]))
