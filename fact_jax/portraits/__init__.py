"""The procedural portrait world: labelled pictures of made-up people, without limit."""

from fact_jax.portraits.captions import GENERIC_CAPTION, VOCABULARY, captions
from fact_jax.portraits.identity import SPLITS, Identity, sample_identity
from fact_jax.portraits.render import Portrait, render
from fact_jax.portraits.scene import Scene, sample_scene
from fact_jax.portraits.world import Batch, make_batch, portraits, to_uint8

__all__ = [
    "GENERIC_CAPTION", "SPLITS", "VOCABULARY", "Batch", "Identity", "Portrait", "Scene",
    "captions", "make_batch", "portraits", "render", "sample_identity",
    "sample_scene", "to_uint8",
]  # fmt: skip
