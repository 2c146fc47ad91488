"""Model configurations inferred from tensor shapes.

What shapes do not tell (heads, norm groups, latent scale, activation) is taken from a published
model of the same widths, with a note; other models are refused.
"""

import dataclasses
from typing import Any

from fact_convert.io.lazy_tensor import State
from fact_convert.models.adapter import infer_resampler
from fact_convert.models.face_encoder import infer_encoder
from fact_convert.models.validation import infer_shape, strip_prefix
from fact_jax.models.clip_text import CLIPTextConfig
from fact_jax.models.controlnet import ControlNetConfig
from fact_jax.models.unet import UNetConfig
from fact_jax.models.vae import VAEConfig
from fact_jax.utils.errors import UserError

_WIDTH, _HEADS = 1024, (5, 10, 20, 20)
"""Of Stable Diffusion 2.x: the width of its text tokens, and its heads by level."""
_PUBLISHED: dict[str, dict[str, Any]] = {
    "unet": {
        "Stable Diffusion 1.x": UNetConfig.sd15(),
        "Stable Diffusion 2.x": UNetConfig(cross_attention_dim=_WIDTH, heads=_HEADS),
    },
    "controlnet": {
        "Stable Diffusion 1.x": ControlNetConfig.sd15(),
        "Stable Diffusion 2.x": ControlNetConfig(cross_attention_dim=_WIDTH, heads=_HEADS),
    },
    "vae": {"Stable Diffusion 1.x": VAEConfig.sd15()},
    "clip_text": {
        "Stable Diffusion 1.x": CLIPTextConfig.sd15(),
        "Stable Diffusion 2.x": CLIPTextConfig(
            hidden_size=_WIDTH, intermediate_size=4096, num_attention_heads=16, hidden_act="gelu"
        ),
    },
}
"""Models whose settings are known, by the kind and the name of the family."""
_CHANNELS = ("in_channels", "out_channels", "conditioning_channels", "use_linear_projection")
_FREE = {*_CHANNELS, "vocab_size", "num_hidden_layers", "max_position_embeddings"}
"""What may differ from the published model without making it another one."""
UNTOLD = {
    "unet": ("heads", "norm_num_groups"),
    "controlnet": ("heads", "norm_num_groups"),
    "vae": ("scaling_factor", "norm_num_groups"),
    "clip_text": ("num_attention_heads", "hidden_act"),
}
"""What changes results and no tensor of a kind tells."""
_USUAL = {"norm_eps", "layer_norm_eps", "sample_size"} | {
    f"{token}_token_id" for token in ("bos", "eos", "pad")
}
"""What no tensor tells either, and all published models have alike."""


def infer_config(kind: str, state: State) -> tuple[dict, str]:
    """The diffusers or transformers configuration of a model, and a note on what is assumed.

    Raises UserError if they are no such model, or one whose settings nobody could tell.
    """
    if kind == "transface":
        return infer_encoder(strip_prefix(kind, state))
    if kind == "resampler":
        return infer_resampler(strip_prefix(kind, state))
    shape = infer_shape(kind, state)
    untold = {*UNTOLD[kind], *_USUAL}
    told = {
        f.name: getattr(shape, f.name) for f in dataclasses.fields(shape) if f.name not in untold
    }
    for family, published in _PUBLISHED[kind].items():
        if all(getattr(published, name) == told[name] for name in told.keys() - _FREE):
            config = dataclasses.replace(published, **told)
            said = ", ".join(f"{name} {_text(getattr(config, name))}" for name in UNTOLD[kind])
            return config.to_dict(), f"{kind}: {said} taken, as in {family} of the same widths"
    raise UserError(
        f"no configuration is there, and the tensors of this {kind} do not tell "
        f"{' and '.join(UNTOLD[kind])}, nor are its widths those of Stable Diffusion: give "
        "--config"
    )


def _text(value: object) -> str:
    return "-".join(map(str, dict.fromkeys(value))) if isinstance(value, tuple) else str(value)
