"""FACT's face adapter in plain PyTorch, written from its equations, inside diffusers' UNet.

Every token asks queries, face tokens too, and the attention matrix is materialised: as slow and
as literal as it can be, so that it shares no shortcut with the model under test.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.functional import gelu, layer_norm, linear

from tests.parity.peers import normal

SHAPES = {
    "linear.weight": ("c", "f"),
    "linear.bias": ("c",),
    "norm1.weight": ("c",),
    "norm1.bias": ("c",),
    "norm2.weight": ("c",),
    "norm2.bias": ("c",),
    "attn.to_q.weight": ("c", "c"),
    "attn.to_k.weight": ("c", "c"),
    "attn.to_v.weight": ("c", "c"),
    "attn.to_out.0.weight": ("c", "c"),
    "attn.to_out.0.bias": ("c",),
    "ff.net.0.proj.weight": ("8c", "c"),
    "ff.net.0.proj.bias": ("8c",),
    "ff.net.2.weight": ("c", "4c"),
    "ff.net.2.bias": ("c",),
    "alpha_attn": (),
    "alpha_dense": (),
}


def random_adapters(unet: torch.nn.Module, face_dim: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights in the released key names for every transformer block; alphas from 0.3 to 0.9."""
    blocks = [name for name, _ in transformer_blocks(unet)]
    return {
        f"{name}.attn2.processor.{key}": array
        for i, name in enumerate(blocks)
        for key, array in random_adapter(
            unet.get_submodule(name).norm2.normalized_shape[0], face_dim, seed + 100 * i
        ).items()
    }


def random_adapter(channels: int, face_dim: int, seed: int) -> dict[str, np.ndarray]:
    """One block's weights, under the released names after ``attn2.processor.``."""
    sizes = {"c": channels, "f": face_dim, "4c": 4 * channels, "8c": 8 * channels}
    state = {}
    for i, (key, dims) in enumerate(SHAPES.items()):
        array = normal(seed + i, *(sizes[dim] for dim in dims))
        if key.startswith("alpha"):
            state[key] = np.asarray(0.6 + 0.3 * np.tanh(array), np.float32)
        elif len(dims) == 2:
            state[key] = array / np.sqrt(array.shape[1], dtype=np.float32)
        else:
            state[key] = 0.2 * array + np.float32("norm" in key and "weight" in key)
    return state


def face_adapter(
    w: dict[str, torch.Tensor], x: torch.Tensor, face: torch.Tensor, heads: int, scale
) -> torch.Tensor:
    """x1 = x + s tanh(a) SA(norm1([x; linear(f)])); x1 + s tanh(a') FF(norm2(x1))."""
    n, c = x.shape[1:]
    tokens = torch.cat([x, linear(face, w["linear.weight"], w["linear.bias"])], dim=1)
    tokens = layer_norm(tokens, (c,), w["norm1.weight"], w["norm1.bias"])
    q, k, v = (
        linear(tokens, w[f"attn.to_{name}.weight"]).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name in "qkv"
    )
    weights = (q @ k.mT / (c // heads) ** 0.5).softmax(-1)
    mixed = linear(
        (weights @ v).transpose(1, 2).flatten(2), w["attn.to_out.0.weight"], w["attn.to_out.0.bias"]
    )
    x = x + scale * torch.tanh(w["alpha_attn"]) * mixed[:, :n]
    hidden = layer_norm(x, (c,), w["norm2.weight"], w["norm2.bias"])
    hidden, gate = linear(hidden, w["ff.net.0.proj.weight"], w["ff.net.0.proj.bias"]).chunk(2, -1)
    fed = linear(hidden * gelu(gate), w["ff.net.2.weight"], w["ff.net.2.bias"])
    return x + scale * torch.tanh(w["alpha_dense"]) * fed


def transformer_blocks(unet: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [(n, m) for n, m in unet.named_modules() if type(m).__name__ == "BasicTransformerBlock"]


def weights_under(state: dict[str, np.ndarray], block: str) -> dict[str, torch.Tensor]:
    """The adapter's weights of one transformer block."""
    prefix = f"{block}.attn2.processor."
    return {
        key.removeprefix(prefix): torch.from_numpy(array)
        for key, array in state.items()
        if key.startswith(prefix)
    }


@contextlib.contextmanager
def adapted(
    unet: torch.nn.Module, state: dict[str, np.ndarray], face: torch.Tensor, scale
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Within this context every transformer block applies its adapter after its self-attention.

    Yields the tokens before and after each adapter, in the order in which they are called.
    """
    passed, handles = [], []
    for name, block in transformer_blocks(unet):
        handles += _insert(block, weights_under(state, name), face, scale, passed)
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def _insert(block: torch.nn.Module, weights: dict, face: torch.Tensor, scale, passed: list) -> list:
    entering = []

    def remember(_, args):
        entering.append(args[0])

    def adapt(attn1, _, output):
        # The block is about to compute ``output + hidden``.
        hidden = entering.pop()
        before = hidden + output
        after = face_adapter(weights, before, face, attn1.heads, scale)
        passed.append((before, after))
        return after - hidden

    return [block.register_forward_pre_hook(remember), block.attn1.register_forward_hook(adapt)]
