"""Adapter, resampler and face encoder in plain PyTorch, under the released names.

``ops`` holds the layers: ``torch.nn``, or ComfyUI's, which move and cast their weights when used.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Endings of files that may hold some."""
State = dict[str, Tensor]
RESAMPLER, PROCESSOR = "local_fac_prj.", ".attn2.processor."
_DIM_HEAD_KEY = "fact_jax.resampler.dim_head"
_RELEASED_DIM_HEAD, _RELEASED_ENCODER_HEADS = 64, 8
_PUBLIC_ENCODER_WIDTHS = (256, 512, 768)
# What only adapters of comparisons have in their resampler's configuration.
_VARIATIONS = ("encoder_blocks", "embedding", "input_tokens")
# The encoder's global head compares identities; no picture needs it.
_HEAD = ("feature.", "senet.", "mask_token")


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of (b, n, c) over (b, m, c); ``mask`` (b, n, m) says who sees what."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    return functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class GatedAttention(nn.Module):
    """Visual tokens ask, visual and face tokens answer."""

    def __init__(self, dim: int, ops: Any):
        super().__init__()
        self.to_q = ops.Linear(dim, dim, bias=False)
        self.to_k = ops.Linear(dim, dim, bias=False)
        self.to_v = ops.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([ops.Linear(dim, dim)])


class FaceAdapter(nn.Module):
    """What FACT adds to one transformer block, between self-attention and text cross-attention."""

    def __init__(self, dim: int, face_dim: int, inner: int, own_norm: bool, ops: Any):
        super().__init__()
        self.linear = ops.Linear(face_dim, dim)
        self.norm1, self.norm2 = ops.LayerNorm(dim), ops.LayerNorm(dim)
        self.attn = GatedAttention(dim, ops)
        self.ff = nn.Module()
        gate = nn.Module()
        gate.proj = ops.Linear(dim, 2 * inner)
        self.ff.net = nn.ModuleList([gate, nn.Identity(), ops.Linear(inner, dim)])
        self.alpha_attn = nn.Parameter(torch.zeros(()))
        self.alpha_dense = nn.Parameter(torch.zeros(()))
        # Released files may hold a copy of the block's ``norm2``, which then wins.
        self.ln = ops.LayerNorm(dim) if own_norm else None

    def face_keys(self, face: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (b, m, c) of face tokens (b, m, d)."""
        tokens = self.norm1(self.linear(face))
        return self.attn.to_k(tokens), self.attn.to_v(tokens)

    def gated(self, x: Tensor, keys: Tensor, values: Tensor, heads: int, mask: Any) -> Tensor:
        """The attention of ``x``, normed, over ``keys`` and ``values`` of all tokens."""
        return self.attn.to_out[0](attend(self.attn.to_q(x), keys, values, heads, mask))

    def feed_forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.ff.net[0].proj(x).chunk(2, dim=-1)
        return self.ff.net[2](hidden * functional.gelu(gate))


class Resampler(nn.Module):
    """Encoder tokens (b, n, e) of one photo to face tokens (b, m, o)."""

    def __init__(self, state: State, dim_head: int, ops: Any):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros_like(state["latents"]))
        dim, inner = self.latents.shape[2], len(state["layers.0.0.to_q.weight"])
        self.heads = inner // dim_head
        self.proj_in = ops.Linear(state["proj_in.weight"].shape[1], dim)
        self.layers = nn.ModuleList()
        for _ in range(_count(state, "layers.")):
            attention = nn.Module()
            attention.norm1, attention.norm2 = ops.LayerNorm(dim), ops.LayerNorm(dim)
            attention.to_q = ops.Linear(dim, inner, bias=False)
            attention.to_kv = ops.Linear(dim, 2 * inner, bias=False)
            attention.to_out = ops.Linear(inner, dim, bias=False)
            wide, narrow = (ops.Linear(*s, bias=False) for s in ((dim, 4 * dim), (4 * dim, dim)))
            forward = nn.Sequential(ops.LayerNorm(dim), wide, nn.GELU(), narrow)
            self.layers.append(nn.ModuleList([attention, forward]))
        output = len(state["proj_out.weight"])
        self.proj_out, self.norm_out = ops.Linear(dim, output), ops.LayerNorm(output)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.proj_in(tokens)
        latents = self.latents.to(x).expand(len(x), -1, -1)
        for layer, forward in self.layers:
            asked = layer.norm2(latents)
            keys, values = layer.to_kv(torch.cat([layer.norm1(x), asked], dim=1)).chunk(2, dim=-1)
            latents = latents + layer.to_out(attend(layer.to_q(asked), keys, values, self.heads))
            latents = latents + forward(latents)
        return self.norm_out(self.proj_out(latents))


class FaceEncoder(nn.Module):
    """TransFace: crops (b, 3, s, s) in [-1, 1] to tokens (b, n, e)."""

    def __init__(self, state: State, heads: int, crop_size: int, ops: Any):
        super().__init__()
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        self.heads, self.crop_size = heads, crop_size
        self.patch_embed = nn.Module()
        self.patch_embed.proj = ops.Conv2d(3, dim, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.zeros_like(state["pos_embed"]))
        self.blocks = nn.ModuleList()
        for _ in range(_count(state, "blocks.")):
            block = nn.Module()
            block.norm1, block.norm2 = ops.LayerNorm(dim), ops.LayerNorm(dim)
            block.attn, block.mlp = nn.Module(), nn.Module()
            block.attn.qkv = ops.Linear(dim, 3 * dim, bias=False)
            block.attn.proj = ops.Linear(dim, dim)
            block.mlp.fc1, block.mlp.fc2 = ops.Linear(dim, 4 * dim), ops.Linear(4 * dim, dim)
            self.blocks.append(block)
        self.norm = ops.LayerNorm(dim)

    def forward(self, crops: Tensor) -> Tensor:
        x = self.patch_embed.proj(crops).flatten(2).transpose(1, 2)
        x = x + self.pos_embed.to(x)
        for block in self.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
            x = x + block.attn.proj(attend(q, k, v, self.heads))
            x = x + block.mlp.fc2(functional.relu6(block.mlp.fc1(block.norm2(x))))
        return self.norm(x)


def read_adapter(path: str, ops: Any = nn) -> tuple[Resampler, dict[str, FaceAdapter]]:
    """The resampler, and the adapter of every block by its path in diffusers' UNet.

    From our ``.safetensors`` or the released ``.ckpt``; ValueError for anything else.
    """
    state, metadata = read_weights(path)
    dim_head = state.pop(_DIM_HEAD_KEY, None)
    own, blocks = {}, {}
    for key, tensor in state.items():
        block, mark, name = key.partition(PROCESSOR)
        if key.startswith(RESAMPLER):
            own[key.removeprefix(RESAMPLER)] = tensor
        elif mark:
            blocks.setdefault(block, {})[name] = tensor
        else:
            raise ValueError(f"{path} is no FACT adapter: {key} is unknown")
    if not own or not blocks:
        raise ValueError(f"{path} is no FACT adapter: no {RESAMPLER}* or no *{PROCESSOR}* in it")
    try:
        said = json.loads(metadata.get("config", "{}")).get("resampler", {})
        other = "form" in metadata or any(name in said for name in _VARIATIONS)
        width = int(said.get("dim_head") or (_RELEASED_DIM_HEAD if dim_head is None else dim_head))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no whole FACT adapter: {error}") from None
    if other:
        raise ValueError(f"{path} is an adapter of another form: only fact-infer draws with it")
    try:
        resampler = _filled(Resampler(own, width, ops), own)
        adapters = {}
        for block, tensors in blocks.items():
            dim, face_dim = tensors["linear.weight"].shape
            inner = tensors["ff.net.2.weight"].shape[1]
            adapter = FaceAdapter(dim, face_dim, inner, "ln.weight" in tensors, ops)
            adapters[block] = _filled(adapter, tensors)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no whole FACT adapter: {error}") from None
    return resampler, adapters


def read_encoder(path: str, ops: Any = nn) -> FaceEncoder:
    """A TransFace: our ``model.safetensors`` with its ``config.json``, or the released file."""
    state, metadata = read_weights(path)
    state = {key: tensor for key, tensor in state.items() if not key.startswith(_HEAD)}
    beside = os.path.join(os.path.dirname(path), "config.json")
    try:
        config = json.loads(metadata.get("configs", "{}")).get("transface", {})
        if not config and path.endswith(".safetensors") and os.path.isfile(beside):
            with open(beside, encoding="utf-8") as opened:
                config = json.load(opened)
        width = state["pos_embed"].shape[2]
        if "num_heads" not in config and width not in _PUBLIC_ENCODER_WIDTHS:
            raise ValueError("no config.json beside it says how many heads it has")
        heads = int(config.get("num_heads", _RELEASED_ENCODER_HEADS))
        encoder = FaceEncoder(state, heads, int(config.get("img_size", 112)), ops)
        if heads < 1 or width % heads:
            raise ValueError(f"its config.json says {heads} heads, its tokens are {width} wide")
        side = encoder.crop_size // encoder.patch_embed.proj.weight.shape[2]
        if side**2 != state["pos_embed"].shape[1]:
            raise ValueError("its config.json is that of another encoder")
        return _filled(encoder, state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no whole TransFace encoder: {error}") from None


def read_weights(path: str) -> tuple[State, Mapping[str, str]]:
    """The tensors of a file, and the metadata of a ``.safetensors``; nothing in it is executed."""
    # Neither library's words are handed on: torch's advise to let the file run its code.
    try:
        if path.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(path, "pt") as opened:
                return {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is damaged, no file of weights, or holds more than tensors "
            f"({type(error).__name__}): it is not opened"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no tensors by name")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}, {}


def _filled(module: nn.Module, state: State) -> Any:
    module.load_state_dict({key: tensor.float() for key, tensor in state.items()}, strict=True)
    return module.requires_grad_(False).eval()


def _count(state: State, prefix: str) -> int:
    numbers = {key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix)}
    return max(map(int, numbers), default=-1) + 1


def combine_photos(tokens: Tensor, how: str) -> Tensor:
    """Tokens (p, m, d) of one person's photos to (1, tokens, d): all of them, or their mean."""
    if how == "concat":
        return tokens.flatten(0, 1)[None]
    if how == "average":
        return tokens.mean(dim=0)[None]
    if how != "normalized":
        raise ValueError(f"combine is concat, average or normalized, not {how!r}")
    lengths = tokens.norm(dim=-1, keepdim=True)
    mean = (tokens / lengths.clamp(min=1e-6)).mean(dim=0)
    unit = mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return (unit * lengths.mean(dim=0))[None]


def null_tokens(resampler: Resampler, encoder: FaceEncoder, device: Any) -> Tensor:
    """The condition 'no face' (1, m, d): the resampler of all-zero encoder tokens."""
    return resampler(torch.zeros(encoder.pos_embed.shape, device=device))
