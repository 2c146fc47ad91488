"""Names of the layers of Stable Diffusion 1.x in the layout of the original code (LDM).

Pairs of names, LDM's and diffusers', read in both directions.
"""

import re
from collections.abc import Iterable

from fact_convert.rules.key_tables import Ignored

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_text": "cond_stage_model.transformer.",
    "controlnet": "control_model.",
}
"""What stands before the keys of each model, by its kind."""


UNET_ENDS = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)


UNET_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)


VAE_ENDS = tuple(
    pair
    for side in ("encoder", "decoder")
    for pair in (
        (f"{side}.conv_in", f"{side}.conv_in"),
        (f"{side}.conv_out", f"{side}.conv_out"),
        (f"{side}.norm_out", f"{side}.conv_norm_out"),
    )
) + (("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv"))


VAE_RESNET = (
    *((name, name) for name in ("norm1", "conv1", "norm2", "conv2")),
    ("nin_shortcut", "conv_shortcut"),
)


VAE_ATTENTION = (
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)


_NO_PICTURES = "the half of CLIP that compares texts with pictures, which drawing does not use"


IGNORED = (
    *(
        Ignored(key, "the noise schedule, which its settings give")
        for key in (
            *("betas", "alphas_cumprod", "alphas_cumprod_prev"),
            *("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
            *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"),
            *("sqrt_recipm1_alphas_cumprod", "posterior_variance"),
            *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        )
    ),
    Ignored("v_pred", "what the UNet predicts, which its scheduler's settings say"),
    Ignored("lvlb_weights", "what the steps counted in the training loss"),
    Ignored("logvar", "what the steps counted in the training loss"),
    Ignored("model_ema.decay", "a setting of the running average"),
    Ignored("model_ema.num_updates", "a counter of the running average"),
    Ignored("first_stage_model.loss.*", "critics of the VAE's training"),
    Ignored("loss.*", "critics of the VAE's training"),
    Ignored("cond_stage_model.transformer.text_projection.weight", _NO_PICTURES),
    Ignored("cond_stage_model.text_projection.weight", _NO_PICTURES),
    Ignored("cond_stage_model.logit_scale", _NO_PICTURES),
)
"""Keys that may stand in such a file and carry no weight of our models: left out, with a line."""


EMA = "model_ema."


def unet_pairs(keys: set[str]) -> list[tuple[str, str]]:
    """The layers of a UNet in both layouts; its size is read from the keys of either."""
    levels = count_indices(keys, r"down_blocks\.(\d+)\.")
    layers = count_indices(keys, r"down_blocks\.0\.resnets\.(\d+)\.")
    if not levels:
        ends = [int(m[1]) for key in keys if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.", key))]
        total = count_indices(keys, r"input_blocks\.(\d+)\.")
        layers = min(ends, default=total) - 1
        levels = total // (layers + 1) if layers > 0 else 0
    pairs = list(UNET_ENDS)
    for i in range(levels if levels * layers < len(keys) else 0):
        for j in range(layers):
            n = 1 + i * (layers + 1) + j
            pairs += _join(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}", UNET_RESNET)
            pairs.append((f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}"))
        n = (i + 1) * (layers + 1)
        pairs.append((f"input_blocks.{n}.0.op", f"down_blocks.{i}.downsamplers.0.conv"))
        first = i * (layers + 1)
        witnesses = {
            f"output_blocks.{first}.1.norm.weight",
            f"up_blocks.{i}.attentions.0.norm.weight",
        }
        attended = not witnesses.isdisjoint(keys)
        for j in range(layers + 1):
            n = first + j
            pairs += _join(f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}", UNET_RESNET)
            if attended:
                pairs.append((f"output_blocks.{n}.1", f"up_blocks.{i}.attentions.{j}"))
        place = f"output_blocks.{first + layers}.{1 + attended}.conv"
        pairs.append((place, f"up_blocks.{i}.upsamplers.0.conv"))
    pairs += _join("middle_block.0", "mid_block.resnets.0", UNET_RESNET)
    pairs.append(("middle_block.1", "mid_block.attentions.0"))
    return pairs + _join("middle_block.2", "mid_block.resnets.1", UNET_RESNET)


def controlnet_pairs(keys: set[str]) -> list[tuple[str, str]]:
    """The layers of a ControlNet: a UNet's way down, and convolutions of its own."""
    hint, ours = "input_hint_block", "controlnet_cond_embedding"
    # Activations stand between the convolutions, so these have even numbers.
    hints = count_indices(keys, rf"{hint}\.(\d+)\.") // 2 - 1
    blocks = max(hints, count_indices(keys, rf"{ours}\.blocks\.(\d+)\."))
    skips = count_indices(keys, r"(?:zero_convs|controlnet_down_blocks)\.(\d+)\.")
    return [
        *unet_pairs(keys),
        (f"{hint}.0", f"{ours}.conv_in"),
        *((f"{hint}.{2 * i + 2}", f"{ours}.blocks.{i}") for i in range(blocks)),
        (f"{hint}.{2 * blocks + 2}", f"{ours}.conv_out"),
        *((f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}") for i in range(skips)),
        ("middle_block_out.0", "controlnet_mid_block"),
    ]


def vae_pairs(keys: set[str]) -> list[tuple[str, str]]:
    """The layers of a VAE in both layouts; the decoder's levels are counted from the other end."""
    pairs = list(VAE_ENDS)
    for side, way in (("encoder", "down"), ("decoder", "up")):
        levels = count_indices(keys, rf"{side}\.{way}(?:_blocks)?\.(\d+)\.")
        layers = count_indices(keys, rf"{side}\.{way}(?:_blocks)?\.\d+\.(?:block|resnets)\.(\d+)\.")
        for i in range(levels if levels * layers < len(keys) else 0):
            ldm = f"{side}.{way}.{i if way == 'down' else levels - 1 - i}"
            ours = f"{side}.{way}_blocks.{i}"
            for j in range(layers):
                pairs += _join(f"{ldm}.block.{j}", f"{ours}.resnets.{j}", VAE_RESNET)
            pairs.append((f"{ldm}.{way}sample.conv", f"{ours}.{way}samplers.0.conv"))
        middle = f"{side}.mid_block"
        pairs += _join(f"{side}.mid.block_1", f"{middle}.resnets.0", VAE_RESNET)
        pairs += _join(f"{side}.mid.block_2", f"{middle}.resnets.1", VAE_RESNET)
        pairs += _join(f"{side}.mid.attn_1", f"{middle}.attentions.0", VAE_ATTENTION)
    return pairs


def _join(ldm: str, ours: str, layers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"{ldm}.{a}", f"{ours}.{b}") for a, b in layers]


def count_indices(keys: Iterable[str], pattern: str) -> int:
    """One more than the largest number that stands there; sizes that no model has are 0."""
    found = [int(m[1]) for key in keys if (m := re.match(pattern, key)) and len(m[1]) < 4]
    return max(found, default=-1) + 1
