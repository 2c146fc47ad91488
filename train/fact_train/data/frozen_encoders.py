"""Frozen encoders (VAE, text, face): in the training step, or once, for a cached dataset."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from fact_convert import Pipeline
from fact_jax.fact import face_condition
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.models.transface import TransFace
from fact_jax.utils.pixels import normalize_pixels
from fact_train.data.pixels import FACT
from fact_train.engine.partition import paths, split_module
from fact_train.engine.sample_keys import sample_normal


class FrozenEncoders:
    """VAE, text encoder and face encoder. ``frozen`` below is a tree with their arrays.

    They run in the precision of those arrays: float32 in a cache, the step's in the step. ``taken``
    is the resampler whose input the faces are encoded for.
    """

    def __init__(self, pipeline: Pipeline, encoder: TransFace, taken: ResamplerConfig = FACT):
        self._taken = taken
        modules = {"vae": pipeline.vae, "text_encoder": pipeline.text_encoder, "encoder": encoder}
        self._parts = {name: split_module(module) for name, module in modules.items()}
        self._scale = pipeline.vae.config.scaling_factor
        self.arrays: dict[str, dict] = {name: part.arrays for name, part in self._parts.items()}

    def digest(self) -> str:
        """Digest of the weights, of their paths, shapes and dtypes."""
        digest = hashlib.sha256()
        for path, value in paths(self.arrays):
            digest.update(f"{path} {value.shape} {value.dtype}\n".encode())
            digest.update(np.ascontiguousarray(value).data)
        return digest.hexdigest()[:32]

    def moments(
        self, frozen: PyTree, images: UInt8[Array, "b H W 3"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and log-variance of the unscaled latents, float32."""
        vae = self._parts["vae"].module(frozen["vae"])
        pixels = normalize_pixels(images).astype(_precision(frozen["vae"]))
        return tuple(part.astype(jnp.float32) for part in vae.encode(pixels))

    def text(self, frozen: PyTree, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Hidden states of token ids."""
        return self._parts["text_encoder"].module(frozen["text_encoder"])(ids)

    def tokens(self, frozen: PyTree, crops: UInt8[Array, "b s s 3"]) -> Float[Array, "b t d"]:
        """Face tokens of aligned crops."""
        encoder = self._parts["encoder"].module(frozen["encoder"])
        pixels = normalize_pixels(crops).astype(_precision(frozen["encoder"]))
        return face_condition(encoder, pixels, self._taken)

    def encode_batch(
        self,
        frozen: PyTree,
        batch: dict[str, Array],
        shuffled: Bool[Array, " b"],
        keys: Key[Array, " b"],
    ) -> dict[str, Array]:
        """``latents`` (scaled), ``text``, ``tokens`` and the rest of a batch, whatever it came as.

        The picture may come as ``images``, as the moments ``mean`` and ``log_variance``, from
        which latents are drawn here, or as ``latents``; the caption as ``ids`` or ``text``; the
        face as ``crops`` or ``tokens``, beside the partner's, which ``shuffled`` samples get.
        """
        batch = dict(batch)
        if "images" in batch:
            images = batch.pop("images")
            batch["mean"], batch["log_variance"] = self.moments(frozen, images)
        if "mean" in batch:
            mean, log_variance = batch.pop("mean"), batch.pop("log_variance")
            noise = sample_normal(keys, mean.shape[1:])
            batch["latents"] = (mean + jnp.exp(0.5 * log_variance) * noise) * self._scale
        if "text" not in batch:
            batch["text"] = self.text(frozen, batch.pop("ids"))
        if "crops" in batch:
            # Chosen first: half as many to encode.
            partner, own = batch.pop("partner_crops"), batch.pop("crops")
            crops = jnp.where(shuffled[:, None, None, None], partner, own)
            batch["tokens"] = self.tokens(frozen, crops)
        else:
            partner, own = batch.pop("partner"), batch["tokens"]
            batch["tokens"] = jnp.where(shuffled[:, None, None], partner, own)
        return batch


def _precision(arrays: PyTree) -> jnp.dtype:
    return jax.tree.leaves(arrays)[0].dtype
