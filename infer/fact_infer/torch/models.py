"""Face encoder and resampler in PyTorch, under the released names; see fact_jax.models."""

import os
from collections import OrderedDict
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fact_convert.io.lazy_tensor import State, release
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.models.transface import TransFaceConfig
from fact_jax.utils.errors import UserError, listed

Module = TypeVar("Module", bound=nn.Module)
# The global head compares identities and fills masked tokens in training: no picture needs it.
_HEAD = ("feature.", "senet.", "mask_token")


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Fused attention of (b, n, c) over (b, m, c); ``mask`` (b, n, m): who sees what."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    return functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class _SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(q, k, v, self.heads))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.ReLU6(), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TransFaceTokens(nn.Module):
    """Crops (b, 3, s, s) in [-1, 1] to the tokens (b, n, d) that condition the adapter."""

    def __init__(self, config: TransFaceConfig):
        super().__init__()
        dim, patch = config.embed_dim, config.patch_size
        self.config = config
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, dim))
        self.blocks = nn.ModuleList([_Block(dim, config.num_heads) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, crops: Tensor) -> Tensor:
        x = self.patch_embed.proj(crops).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _PerceiverAttention(nn.Module):
    def __init__(self, config: ResamplerConfig):
        super().__init__()
        inner = config.dim_head * config.heads
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.dim)
        self.norm2 = nn.LayerNorm(config.dim)
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_kv = nn.Linear(config.dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        keys, values = self.to_kv(torch.cat([self.norm1(tokens), latents], dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(latents), keys, values, self.heads))


class Resampler(nn.Module):
    """TransFace tokens (b, n, e) of one photo to face tokens (b, m, o)."""

    def __init__(self, config: ResamplerConfig):
        super().__init__()
        self.config, dim = config, config.dim
        self.latents = nn.Parameter(torch.randn(1, config.num_queries, dim) / dim**0.5)
        self.proj_in = nn.Linear(config.embedding_dim, dim)
        self.layers = nn.ModuleList(
            [
                nn.ModuleList([_PerceiverAttention(config), _feed_forward(dim)])
                for _ in range(config.depth)
            ]
        )
        self.proj_out = nn.Linear(dim, config.output_dim)
        self.norm_out = nn.LayerNorm(config.output_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.proj_in(tokens)
        latents = self.latents.expand(len(x), -1, -1)
        for attention, feed_forward in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


def _feed_forward(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, 4 * dim, bias=False),
        nn.GELU(),
        nn.Linear(4 * dim, dim, bias=False),
    )


def encoder_from(
    state: State, config: TransFaceConfig, source: str | os.PathLike
) -> TransFaceTokens:
    """The encoder with the weights of a TransFace file; its global head is left out."""
    tokens = {key: array for key, array in state.items() if not key.startswith(_HEAD)}
    with torch.device("meta"):
        encoder = TransFaceTokens(config)
    return load_strictly(encoder, tokens, source)


def load_strictly(
    module: Module,
    state: State,
    source: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
) -> Module:
    """Fill a module (it may be on the meta device) with a state of numpy arrays.

    Raises one UserError that lists every missing, unexpected and misshapen key of ``source``.
    """
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    misshapen = [
        f"{key} {state[key].shape} instead of {shape}"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(problems.values()):
        raise UserError(
            f"{source}: "
            + "; ".join(f"{len(k)} {name} ({listed(k)})" for name, k in problems.items() if k)
        )
    tensors = {}
    for key in wanted:
        tensors[key] = torch.from_numpy(np.array(state[key], np.float32)).to(dtype)
        release(state[key])  # never a second copy of the whole state: an adapter alone is 0.8 GB
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval()
