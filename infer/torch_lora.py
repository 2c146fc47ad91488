"""LoRA files merged into models of diffusers and transformers, without peft."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from converters.lora import LORA_PARTS, Lora, merge
from converters.rules import TABLES


def merge_lora(pipe: Any, lora: Lora, factor: float) -> None:
    """Add ``factor`` times a LoRA to a pipe's UNet and text encoder, in their own precision.

    ``-factor`` takes it out again, but for that precision's rounding. Raises one UserError with
    every layer that the pipe does not have or has in another shape.
    """
    for kind, part in LORA_PARTS.items():
        layers = tuple(layer for layer in lora.layers if layer.kind == kind)
        if layers:
            _merge(getattr(pipe, part), kind, dataclasses.replace(lora, layers=layers), factor)


@torch.no_grad()
def _merge(module: nn.Module, kind: str, lora: Lora, factor: float) -> None:
    touched = {layer.key for layer in lora.layers}
    prefixes = TABLES[kind].prefixes
    tensors = {
        key: tensor
        for key, tensor in module.state_dict().items()
        if any(key.removeprefix(prefix) in touched for prefix in prefixes)
    }
    arrays = {key: tensor.float().cpu().numpy() for key, tensor in tensors.items()}
    for key, merged in merge({kind: arrays}, lora, factor)[kind].items():
        tensors[key].copy_(torch.from_numpy(np.array(merged)))
