"""FAIR and gates of an adapter by block, as metrics of a training step."""

import re
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from fact_jax.models.unet import UNet


def by_block(unet: UNet, ratios: Sequence[Float[Array, " b"]]) -> dict[str, Float[Array, ""]]:
    """FAIR and gates of each adapted block, and how far the gates are open on average."""
    metrics: dict[str, Float[Array, ""]] = {}
    gates: dict[str, list[Float[Array, ""]]] = {"attn": [], "dense": []}
    for (path, block), ratio in zip(unet.transformer_blocks(), ratios, strict=True):
        name = re.sub("_blocks?|[.]attentions|[.]transformer", "", path)
        metrics[f"block/fair/{name}"] = ratio.mean()
        for which, found in gates.items():
            alpha = getattr(block.face, f"alpha_{which}")[...].astype(jnp.float32)
            metrics[f"block/alpha_{which}/{name}"] = alpha
            found.append(jnp.abs(jnp.tanh(alpha)))
    opened = {f"gate/{which}": jnp.stack(found).mean() for which, found in gates.items()}
    return metrics | opened
