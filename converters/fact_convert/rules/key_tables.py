"""Rule tables from PyTorch keys to module paths: data, read in both directions by ``mapping``.

A rule names a layer on either side and its sort. ``{i}`` stands for an index and means the same
on both sides. Our modules keep the peers' names, so most rules name the same path twice
(``same``); what is written out are the real differences.
"""

import dataclasses

from fact_convert.rules.layer_transforms import (
    BATCHNORM,
    CONV,
    EMBED,
    LINEAR,
    NORM,
    POINTWISE,
    RAW,
    LayerTransform,
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One layer: its path in the PyTorch file, its path in our module, its sort.

    Where two rules name the same place in the module, the first is the name we write and the
    others are names that files may use instead. A rule that ``overrides`` is a second copy that
    may stand beside the first and wins over it, as it did in the released loading order.
    """

    torch: str
    jax: str
    layer: LayerTransform
    overrides: bool = False


@dataclasses.dataclass(frozen=True)
class Ignored:
    """A key that carries no weight: kept aside on loading and given back on writing."""

    torch: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """All rules of one model.

    ``prefixes`` are what may stand before every key of a file; we write the first.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...] = ()
    prefixes: tuple[str, ...] = ("",)


def same(layer: LayerTransform, *paths: str) -> tuple[Rule, ...]:
    """Rules for layers that have one name on both sides."""
    return tuple(Rule(path, path, layer) for path in paths)


def under(parents: str | tuple[str, ...], *rules: Rule) -> tuple[Rule, ...]:
    """The rules, under each of the parents."""
    parents = (parents,) if isinstance(parents, str) else parents
    return tuple(
        dataclasses.replace(rule, torch=f"{parent}.{rule.torch}", jax=f"{parent}.{rule.jax}")
        for parent in parents
        for rule in rules
    )


RESNET = (
    *same(NORM, "norm1", "norm2"),
    *same(CONV, "conv1", "conv2", "conv_shortcut"),
    *same(LINEAR, "time_emb_proj"),
)
FEED_FORWARD = same(LINEAR, "ff.net.0.proj", "ff.net.2")
ATTENTION = same(LINEAR, "to_q", "to_k", "to_v", "to_out.0")

FACE = tuple(
    Rule(f"attn2.processor.{rule.torch}", f"face.{rule.jax}", rule.layer)
    for rule in (
        *same(LINEAR, "linear"),
        *same(NORM, "norm1", "norm2"),
        *under("attn", *ATTENTION),
        *FEED_FORWARD,
        *same(RAW, "alpha_attn", "alpha_dense"),
    )
)
TRANSFORMER = (
    *same(NORM, "norm1", "norm2", "norm3"),
    *under(("attn1", "attn2"), *ATTENTION),
    *FEED_FORWARD,
)
ADAPTED = (
    *TRANSFORMER,
    *FACE,
    # Released checkpoints hold the base's norm2 a second time; loaded last, it wins.
    Rule("attn2.processor.ln", "norm2", NORM, overrides=True),
)


def level(*transformer: Rule) -> tuple[Rule, ...]:
    """One level of a UNet whose transformer blocks have these rules."""
    return (
        *under("resnets.{j}", *RESNET),
        *under(
            "attentions.{j}",
            *same(NORM, "norm"),
            *same(POINTWISE, "proj_in", "proj_out"),
            *under("transformer_blocks.{k}", *transformer),
        ),
        *same(CONV, "downsamplers.{j}.conv", "upsamplers.{j}.conv"),
    )


UNET = Table(
    rules=(
        *same(CONV, "conv_in", "conv_out"),
        *same(NORM, "conv_norm_out"),
        *same(LINEAR, "time_embedding.linear_1", "time_embedding.linear_2"),
        *under(("down_blocks.{i}", "mid_block", "up_blocks.{i}"), *level(*ADAPTED)),
    ),
)

CONTROLNET = Table(
    rules=(
        *same(CONV, "conv_in", "controlnet_mid_block", "controlnet_down_blocks.{i}"),
        *under("controlnet_cond_embedding", *same(CONV, "conv_in", "blocks.{i}", "conv_out")),
        *same(LINEAR, "time_embedding.linear_1", "time_embedding.linear_2"),
        *under(("down_blocks.{i}", "mid_block"), *level(*TRANSFORMER)),
    ),
)

ADAPTER = Table(
    rules=under(
        (
            "down_blocks.{i}.attentions.{j}.transformer_blocks.{k}",
            "mid_block.attentions.{j}.transformer_blocks.{k}",
            "up_blocks.{i}.attentions.{j}.transformer_blocks.{k}",
        ),
        *FACE,
        Rule("attn2.processor.ln", "norm2", NORM),
    ),
)
"""The part of the UNet that is trained, alone: what checkpoints of adapters hold."""

PIXEL_ATTENTION = (
    *same(NORM, "group_norm"),
    *same(POINTWISE, "to_q", "to_k", "to_v", "to_out.0"),
    # Names from before diffusers 0.17, still in many files.
    Rule("query", "to_q", POINTWISE),
    Rule("key", "to_k", POINTWISE),
    Rule("value", "to_v", POINTWISE),
    Rule("proj_attn", "to_out.0", POINTWISE),
)
VAE = Table(
    rules=(
        *under(
            ("encoder", "decoder"),
            *same(CONV, "conv_in", "conv_out"),
            *same(NORM, "conv_norm_out"),
            *under(
                ("down_blocks.{i}", "mid_block", "up_blocks.{i}"), *under("resnets.{j}", *RESNET)
            ),
            *same(CONV, "down_blocks.{i}.downsamplers.{j}.conv"),
            *same(CONV, "up_blocks.{i}.upsamplers.{j}.conv"),
            *under("mid_block.attentions.{j}", *PIXEL_ATTENTION),
        ),
        *same(CONV, "quant_conv", "post_quant_conv"),
    ),
)

CLIP_TEXT = Table(
    rules=(
        *same(EMBED, "embeddings.token_embedding", "embeddings.position_embedding"),
        *under(
            "encoder.layers.{i}",
            *same(NORM, "layer_norm1", "layer_norm2"),
            *under("self_attn", *same(LINEAR, "q_proj", "k_proj", "v_proj", "out_proj")),
            *same(LINEAR, "mlp.fc1", "mlp.fc2"),
        ),
        *same(NORM, "final_layer_norm"),
    ),
    ignored=(
        Ignored("embeddings.position_ids", "the numbers 0 to 76; older transformers stored them"),
    ),
    # transformers 5 writes its text model without the prefix, and reads either.
    prefixes=("text_model.", ""),
)

TRANSFACE = Table(
    rules=(
        *same(RAW, "pos_embed", "mask_token"),
        *same(CONV, "patch_embed.proj"),
        *under(
            "blocks.{i}",
            *same(NORM, "norm1", "norm2"),
            *same(LINEAR, "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
        ),
        *same(NORM, "norm"),
        *same(LINEAR, "senet.0", "senet.2", "feature.0", "feature.2"),
        *same(BATCHNORM, "feature.1", "feature.3"),
    ),
    ignored=(
        Ignored(
            "feature.{i}.num_batches_tracked",
            "a counter that averages without momentum would need; ours has momentum",
        ),
    ),
)

RESAMPLER = Table(
    rules=(
        *same(RAW, "latents"),
        *same(LINEAR, "proj_in", "proj_out"),
        # Of a linear projection, of comparisons.
        *same(LINEAR, "over_tokens"),
        *same(NORM, "norm_out"),
        *under(
            "layers.{i}",
            *same(NORM, "0.norm1", "0.norm2", "1.0"),
            *same(LINEAR, "0.to_q", "0.to_kv", "0.to_out", "1.1", "1.3"),
        ),
    ),
    # The released checkpoint holds the resampler beside the adapters, under this name.
    prefixes=("", "local_fac_prj."),
)

TABLES = {
    "adapter": ADAPTER,
    "unet": UNET,
    "vae": VAE,
    "clip_text": CLIP_TEXT,
    "transface": TRANSFACE,
    "resampler": RESAMPLER,
    "controlnet": CONTROLNET,
}

RESAMPLER_PREFIX = "local_fac_prj."
ADAPTER_INFIX = ".attn2.processor."
