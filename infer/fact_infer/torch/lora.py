"""LoRA files merged into models of diffusers and transformers, without peft."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fact_convert.io.lazy_tensor import State
from fact_convert.io.weight_files import read_weights
from fact_convert.lora import LORA_PARTS, Lora, lora_for, merge_into_model
from fact_convert.models.pipeline import PARTS
from fact_convert.rules.key_tables import TABLES


def merge_loras(pipe: Any, folder: Path, loras: Sequence[tuple[Lora, float]]) -> None:
    """Add each LoRA times its factor to the UNet and text encoder of a pipe read from ``folder``.

    The sums are of the folder's own numbers, rounded once to the pipe's precision. Raises one
    UserError with every layer that the pipe does not have or has in another shape.
    """
    for kind, part in LORA_PARTS.items():
        own = [(lora_for(lora, kind), factor) for lora, factor in loras]
        if any(lora.layers for lora, _ in own):
            state = read_weights(folder / part, PARTS[part][1])
            _merge(getattr(pipe, part), kind, state, own)


@torch.no_grad()
def _merge(module: nn.Module, kind: str, state: State, loras: Sequence[tuple[Lora, float]]) -> None:
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    touched = {layer.key for lora, _ in loras for layer in lora.layers}
    tensors = {_without_prefix(kind, key): tensor for key, tensor in module.state_dict().items()}
    for key, merged in merge_into_model(kind, state, loras, dtype).items():
        name = _without_prefix(kind, key)
        if name in touched:
            # Exact: PyTorch takes no bfloat16 of NumPy's.
            numbers = torch.from_numpy(np.array(merged, np.float32))
            tensors[name].copy_(numbers.reshape(tensors[name].shape))


def _without_prefix(kind: str, key: str) -> str:
    prefix = next(p for p in (*TABLES[kind].prefixes, "") if key.startswith(p))
    return key.removeprefix(prefix)
