"""LoRA files merged into models of diffusers and transformers, without peft."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from converters.lora import LORA_PARTS, Lora, merge_all, only
from converters.rules import TABLES


def merge_loras(pipe: Any, loras: Sequence[tuple[Lora, float]]) -> None:
    """Add each LoRA times its factor to a pipe's UNet and text encoder, in their own precision.

    Raises one UserError with every layer that the pipe does not have or has in another shape.
    """
    for kind, part in LORA_PARTS.items():
        own = [(only(lora, kind), factor) for lora, factor in loras]
        if any(lora.layers for lora, _ in own):
            _merge(getattr(pipe, part), kind, own)


@torch.no_grad()
def _merge(module: nn.Module, kind: str, loras: Sequence[tuple[Lora, float]]) -> None:
    touched = {layer.key for lora, _ in loras for layer in lora.layers}
    prefixes = TABLES[kind].prefixes
    tensors = {
        key: tensor
        for key, tensor in module.state_dict().items()
        if any(key.removeprefix(prefix) in touched for prefix in prefixes)
    }
    arrays = {key: tensor.float().cpu().numpy() for key, tensor in tensors.items()}
    for key, merged in merge_all({kind: arrays}, loras)[kind].items():
        tensors[key].copy_(torch.from_numpy(np.array(merged)))
