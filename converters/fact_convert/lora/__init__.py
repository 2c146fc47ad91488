"""LoRA files (arXiv 2106.09685) and their relatives: read, merged into a base, converted.

Layouts: kohya's and LyCORIS' (``lora_unet_...``, with diffusers' block names or the original
ones), diffusers' old and new ones, and peft's. Algorithms: LoRA with its convolutions, LoHa, LoKr
and each of them with DoRA's magnitudes.
"""

from fact_convert.lora.layers import Layer, LohaLayer, LokrLayer, LoraLayer
from fact_convert.lora.layouts import LAYOUTS, save_lora
from fact_convert.lora.merging import add_lora, lora_for, merge_into_model, merge_lora, merge_loras
from fact_convert.lora.names import LORA_PARTS
from fact_convert.lora.reading import Lora, is_lora, lora_files, read_lora

__all__ = ["LAYOUTS", "LORA_PARTS", "Layer", "LohaLayer", "LokrLayer", "Lora", "LoraLayer"]
__all__ += [
    "add_lora",
    "is_lora",
    "lora_files",
    "lora_for",
    "merge_into_model",
    "merge_lora",
    "merge_loras",
]
__all__ += ["read_lora", "save_lora"]
