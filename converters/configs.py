"""Configurations that tensors give away: widths, depths and which blocks attend.

What no tensor says (heads, groups of norms, the size of a picture) is what Stable Diffusion 1.x
has.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from converters.adapter import infer_resampler
from converters.arrays import Lazy
from converters.encoder import infer_encoder
from converters.mapping import match_state, prefix_of
from converters.readers import State
from converters.weights import read_config, skeleton
from fact_jax.errors import UserError
from fact_jax.models.clip_text import CLIPTextConfig
from fact_jax.models.controlnet import ControlNetConfig
from fact_jax.models.unet import UNetConfig
from fact_jax.models.vae import VAEConfig

_CLIP_HEAD = 64
_CLIP_WORDS = 49408
"""Rows of CLIP's own vocabulary, which its start and end tokens close; learned tokens follow."""


def infer_config(kind: str, state: State) -> dict:
    """The peer's configuration of a model of these tensors. UserError if they are no such model."""
    prefix = prefix_of(kind, state)
    bare = {key.removeprefix(prefix): array for key, array in state.items()}
    if kind not in _INFER:
        raise UserError(f"tensors alone do not say how a {kind} is configured")
    try:
        return _INFER[kind](bare)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as err:
        raise UserError(f"not a whole {kind}: {err} is missing or misshapen") from err


def check_fits(kind: str, state: State, config: Mapping) -> None:
    """UserError with every missing, unexpected and misshapen key, unless all of them fit."""
    _, flat = skeleton(kind, read_config(kind, config, state))
    match_state(kind, state, {path: tuple(v.get_value().shape) for path, v in flat.items()})


def _unet(state: State) -> dict:
    widths = _widths(state, "down_blocks.{}.resnets.0.conv1.weight")
    attended = [f"{way}_blocks.{{}}.attentions.0.norm.weight" for way in ("down", "up")]
    first = min(key for key in state if key.endswith("attn2.to_k.weight"))
    projection = min(key for key in state if key.endswith(".proj_in.weight"))
    return UNetConfig(
        in_channels=state["conv_in.weight"].shape[1],
        out_channels=state["conv_out.weight"].shape[0],
        block_out_channels=widths,
        down_attention=tuple(attended[0].format(i) in state for i in range(len(widths))),
        up_attention=tuple(attended[1].format(i) in state for i in range(len(widths))),
        layers_per_block=_count(state, r"down_blocks\.0\.resnets\.(\d+)\."),
        cross_attention_dim=state[first].shape[1],
        heads=(8,) * len(widths),
        norm_num_groups=_groups(widths),
        use_linear_projection=state[projection].ndim == 2,
    ).to_dict()


def _controlnet(state: State) -> dict:
    widths = _widths(state, "down_blocks.{}.resnets.0.conv1.weight")
    attended = "down_blocks.{}.attentions.0.norm.weight"
    first = min(key for key in state if key.endswith("attn2.to_k.weight"))
    projection = min(key for key in state if key.endswith(".proj_in.weight"))
    hint = "controlnet_cond_embedding"
    blocks = _widths(state, f"{hint}.blocks.{{}}.weight")
    first_hint = state[f"{hint}.conv_in.weight"]
    return ControlNetConfig(
        in_channels=state["conv_in.weight"].shape[1],
        block_out_channels=widths,
        down_attention=tuple(attended.format(i) in state for i in range(len(widths))),
        layers_per_block=_count(state, r"down_blocks\.0\.resnets\.(\d+)\."),
        cross_attention_dim=state[first].shape[1],
        heads=(8,) * len(widths),
        norm_num_groups=_groups(widths),
        use_linear_projection=state[projection].ndim == 2,
        conditioning_channels=first_hint.shape[1],
        conditioning_embedding_out_channels=(first_hint.shape[0], *blocks[1::2]),
    ).to_dict()


def _vae(state: State) -> dict:
    widths = _widths(state, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    return VAEConfig(
        in_channels=state["encoder.conv_in.weight"].shape[1],
        out_channels=state["decoder.conv_out.weight"].shape[0],
        latent_channels=state["decoder.conv_in.weight"].shape[1],
        block_out_channels=widths,
        layers_per_block=_count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        norm_num_groups=_groups(widths),
    ).to_dict()


def _clip_text(state: State) -> dict:
    vocabulary, dim = state["embeddings.token_embedding.weight"].shape
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(state, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=dim // _CLIP_HEAD or 1,
        max_position_embeddings=state["embeddings.position_embedding.weight"].shape[0],
        bos_token_id=min(vocabulary, _CLIP_WORDS) - 2,
        eos_token_id=min(vocabulary, _CLIP_WORDS) - 1,
    ).to_dict()


_INFER: dict[str, Callable[[State], dict]] = {
    "unet": _unet,
    "controlnet": _controlnet,
    "vae": _vae,
    "clip_text": _clip_text,
    "transface": infer_encoder,
    "resampler": infer_resampler,
}


def _widths(state: Mapping[str, np.ndarray | Lazy], pattern: str) -> tuple[int, ...]:
    found = []
    while pattern.format(len(found)) in state:
        found.append(state[pattern.format(len(found))].shape[0])
    return tuple(found)


def _groups(widths: tuple[int, ...]) -> int:
    """32, if every width can be parted into so many."""
    if not widths or any(width % 32 for width in widths):
        raise UserError(
            f"{widths or 'no'} channels are no multiples of 32, so the groups of their norms are "
            "not those of Stable Diffusion: give --config"
        )
    return 32


def _count(keys: Iterable[str], pattern: str) -> int:
    return len({match[1] for key in keys if (match := re.match(pattern, key))})
