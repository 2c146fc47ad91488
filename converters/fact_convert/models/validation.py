"""Validation of state dicts by shapes alone: no tensor is read.

Shapes tell widths, depths and which blocks have attention; what they do not tell (heads, norm
groups) changes no shape.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from fact_convert.io.lazy_tensor import State, Tensor
from fact_convert.mapping import Shapes, key_prefix, match_state
from fact_convert.rules.key_tables import ADAPTER_INFIX
from fact_convert.rules.ldm import count_indices
from fact_convert.weights import ConstantRngs, abstract_state, flat_shapes, read_config
from fact_jax.models.adapter import FaceAdapter
from fact_jax.models.clip_text import CLIPTextConfig
from fact_jax.models.controlnet import ControlNetConfig
from fact_jax.models.unet import UNetConfig
from fact_jax.models.vae import VAEConfig
from fact_jax.utils.errors import UserError

RELEASED_SIZE = 112
"""Height and width of the crops that the public face encoders take."""


def check_fits(kind: str, state: State, config=None) -> None:
    """UserError with every missing, unexpected and misshapen key, unless all of them fit.

    No tensor is read. ``config`` is the peer's as a dict or ours; without it the tensors
    themselves say how large the model is.
    """
    if kind == "adapter":
        targets = _adapter_targets(state)
    else:
        own = read_config(kind, config or infer_shape(kind, state), state)
        targets = flat_shapes(abstract_state(kind, own)[1])
    match_state(kind, state, targets)


def check_all(
    source: Path | str, states: Mapping[str, State], configs: Mapping[str, Mapping]
) -> None:
    """:func:`check_fits` of every model of a source, in one UserError that names it."""
    problems = []
    for kind, state in states.items():
        try:
            check_fits(kind, state, configs.get(kind))
        except UserError as err:
            problems.append(str(err))
    if problems:
        raise UserError(f"{source}: {'; '.join(problems)}")


def reshape_pointwise(kind: str, state: State, config: Mapping) -> State:
    """The state with 1 x 1 convolutions and matrices reshaped to what the model has.

    Files hold some linear layers over channels either way; diffusers opens only its own.
    """
    targets = flat_shapes(abstract_state(kind, read_config(kind, config, state))[1])
    _, sources, _ = match_state(kind, state, targets)
    found = dict(state)
    for path, mappings in sources.items():
        for mapping in mappings:
            model = np.broadcast_to(np.int8(0), targets[path])
            shape = mapping.transform.to_torch(model, model.ndim).shape
            if state[mapping.torch].shape != shape:
                found[mapping.torch] = state[mapping.torch].reshape(shape)
    return found


def infer_shape(kind: str, state: State):
    """A model's configuration inferred from the shapes of its tensors.

    What they do not tell is 1. A width is what most of the tensors that have it say, so that one
    of a wrong shape is the one that does not fit.
    """
    if kind not in _SHAPES:
        raise UserError(f"tensors alone do not say how a {kind} is configured")
    try:
        return _SHAPES[kind](strip_prefix(kind, state))
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as err:
        raise UserError(f"not a whole {kind}: {err} is missing or misshapen") from err


def strip_prefix(kind: str, state: State) -> State:
    prefix = key_prefix(kind, state)
    return {key.removeprefix(prefix): array for key, array in state.items()}


def vocab_size(text_encoder: State) -> int:
    """How many tokens a text encoder has."""
    return _axis(text_encoder, r".*token_embedding\.weight", 0, 1)


def _way_down(state: State) -> dict:
    """What the tensors of a UNet's way down tell, which a ControlNet has too."""
    widths = _widths(state, r"down_blocks\.(\d+)\.resnets\.\d+\.(?:conv[12]|norm2)\.")
    ones = (1,) * len(widths)
    return {
        "in_channels": _axis(state, r"conv_in\.weight", 1, 4),
        "block_out_channels": widths,
        "down_attention": _attends(state, "down", len(widths)),
        "layers_per_block": count_indices(state, r"down_blocks\.\d+\.resnets\.(\d+)\."),
        "cross_attention_dim": _axis(state, r".*\.attn2\.to_[kv]\.weight", 1, 1),
        "heads": ones,
        "norm_num_groups": 1,
        "use_linear_projection": _most(
            (array.ndim == 2 for k, array in state.items() if re.search(r"\.proj_(in|out)\.w", k)),
            False,
        ),
    }


def _unet(state: State) -> UNetConfig:
    found = _way_down(state)
    levels = len(found["block_out_channels"])
    return UNetConfig(
        **found,
        out_channels=_axis(state, r"conv_out\.weight", 0, 4),
        up_attention=_attends(state, "up", levels),
    )


def _controlnet(state: State) -> ControlNetConfig:
    name = "controlnet_cond_embedding"
    blocks = count_indices(state, rf"{name}\.blocks\.(\d+)\.")
    outer = (f"blocks\\.{i}" for i in range(1, blocks, 2))
    widths = [_axis(state, rf"{name}\.{part}\.weight", 0, 1) for part in ("conv_in", *outer)]
    return ControlNetConfig(
        **_way_down(state),
        conditioning_channels=_axis(state, rf"{name}\.conv_in\.weight", 1, 3),
        conditioning_embedding_out_channels=tuple(widths),
    )


def _vae(state: State) -> VAEConfig:
    layer = r"\.resnets\.\d+\.(?:conv[12]|norm2)\."
    return VAEConfig(
        in_channels=_axis(state, r"encoder\.conv_in\.weight", 1, 3),
        out_channels=_axis(state, r"decoder\.conv_out\.weight", 0, 3),
        latent_channels=_axis(state, r"decoder\.conv_in\.weight", 1, 4),
        block_out_channels=_widths(state, rf"encoder\.down_blocks\.(\d+){layer}"),
        layers_per_block=count_indices(state, r"encoder\.down_blocks\.\d+\.resnets\.(\d+)\."),
        norm_num_groups=1,
        scaling_factor=1.0,
    )


def _clip_text(state: State) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=_axis(state, r"embeddings\.token_embedding\.weight", 0, 1),
        hidden_size=_axis(state, r".*layer_norm\d?\.(?:weight|bias)", 0, 1),
        intermediate_size=_axis(state, r"encoder\.layers\.\d+\.mlp\.fc1\.(?:weight|bias)", 0, 1),
        num_hidden_layers=count_indices(state, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=1,
        max_position_embeddings=_axis(state, r"embeddings\.position_embedding\.weight", 0, 1),
    )


def encoder_shape(state: State) -> dict[str, int]:
    """A TransFace's configuration as far as it shapes tensors, from their shapes; one head."""
    try:
        _, tokens, dim = state["pos_embed"].shape
        patch = state["patch_embed.proj.weight"].shape[-1]
        classes = state["feature.2.weight"].shape[0]
        side = math.isqrt(tokens)
        # 112 is no whole number of patches of 9: tokens alone do not give the picture's size.
        released = RELEASED_SIZE // patch == side
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as err:
        raise UserError(f"not a TransFace model ({err} is missing or misshapen)") from err
    depth = {int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))}
    return {
        "img_size": RELEASED_SIZE if released else side * patch,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": len(depth),
        "num_heads": 1,
        "num_classes": classes,
    }


def resampler_shape(state: State) -> dict[str, int]:
    """A resampler's configuration as far as it shapes tensors, from their shapes; one head."""
    if "over_tokens.weight" in state:
        raise UserError("a linear projection: only a file that says so itself is read")
    layer = r"layers\.\d+"
    inner = _most(
        size
        for key, array in state.items()
        if (match := re.fullmatch(rf"{layer}\.0\.(to_q|to_out)\.weight", key)) and array.ndim == 2
        for size in [array.shape[match[1] == "to_out"]]
    )
    if not inner or "latents" not in state or state["latents"].ndim != 3:
        raise UserError("the resampler in it is not whole (latents or to_q is missing)")
    return {
        "dim": _axis(state, r"latents|proj_out\.weight", -1, 1),
        "num_queries": state["latents"].shape[1],
        "embedding_dim": _axis(state, r"proj_in\.weight", 1, 1),
        "output_dim": _axis(state, r"(?:proj_out|norm_out)\.(?:weight|bias)", 0, 1),
        "depth": count_indices(state, r"layers\.(\d+)\."),
        "dim_head": inner,
        "heads": 1,
    }


_SHAPES: dict[str, Callable[[State], object]] = {
    "unet": _unet,
    "controlnet": _controlnet,
    "vae": _vae,
    "clip_text": _clip_text,
    "transface": lambda state: read_config("transface", encoder_shape(state)),
    "resampler": lambda state: read_config("resampler", resampler_shape(state)),
}


def _adapter_targets(state: State) -> Shapes:
    """Shapes of the adapters of one UNet, by our paths, for as many blocks as it must have."""
    blocks: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, array in state.items():
        block, mark, leaf = key.partition(ADAPTER_INFIX)
        if mark:
            blocks[block][leaf] = array
    part = r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.transformer_blocks\.0"
    places = [match for block in blocks if (match := re.fullmatch(part, block))]
    levels = {(match[1], match[2]) for match in places if match[1]}
    layers = max((int(m[3]) + (m[1] != "up") for m in places if m[1] and len(m[3]) < 4), default=0)
    wanted = {"mid_block.attentions.0.transformer_blocks.0"} | {
        f"{way}_blocks.{i}.attentions.{j}.transformer_blocks.0"
        for way, i in levels
        for j in range(layers + (way == "up"))
    }
    face = _axis(state, rf".*{re.escape(ADAPTER_INFIX)}linear\.weight", 1, 1)
    targets: dict[str, tuple[int, ...]] = {}
    for block in sorted(wanted | {match[0] for match in places}):
        own = blocks.get(block, {})
        width = _axis(own, r"(?:linear|norm[12]|attn\.to_out\.0|ff\.net\.2)\.(?:weight|bias)", 0, 1)
        targets |= {f"{block}.face.{p}": s for p, s in _adapter_shapes(width, face)}
        # Copies of the base's norm2, of which either may have been left out.
        for name, leaf in (("ln.weight", "scale"), ("ln.bias", "bias")):
            targets |= {f"{block}.norm2.{leaf}": (width,)} if name in own else {}
    return targets


@functools.lru_cache(maxsize=64)
def _adapter_shapes(width: int, face_dim: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    adapter = nnx.eval_shape(lambda: FaceAdapter(width, 1, face_dim, rngs=ConstantRngs()))
    found = nnx.to_flat_state(nnx.state(adapter))
    return tuple((".".join(map(str, path)), tuple(var.get_value().shape)) for path, var in found)


def _widths(state: State, pattern: str) -> tuple[int, ...]:
    """How many channels each level has, by the number that ``pattern`` finds in its keys."""
    found: dict[int, list[int]] = defaultdict(list)
    for key, array in state.items():
        if (match := re.match(pattern, key)) and len(match[1]) < 4 and array.ndim:
            found[int(match[1])].append(array.shape[0])
    levels = range(max(found, default=0) + 1)
    if absent := [level for level in levels if level not in found]:
        raise ValueError(f"level {absent[0]}")
    return tuple(_most(found[level]) for level in levels)


def _attends(state: Iterable[str], way: str, levels: int) -> tuple[bool, ...]:
    found = {
        key.split(".")[1] for key in state if re.match(rf"{way}_blocks\.\d+\.attentions\.", key)
    }
    return tuple(str(level) in found for level in range(levels))


def _axis(state: State, pattern: str, axis: int, default: int) -> int:
    """The size that most of the tensors have along an axis whose keys are of the pattern."""
    return _most(
        (
            array.shape[axis]
            for key, array in state.items()
            if array.ndim > axis and re.fullmatch(pattern, key)
        ),
        default,
    )


def _most(values: Iterable, default=0):
    return next(iter(Counter(values).most_common(1)), (default, 0))[0]
