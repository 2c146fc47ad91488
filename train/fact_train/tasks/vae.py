"""Train the miniature's AutoencoderKL on portraits of the ``base`` split.

Later its decoder can be trained on by itself: the latents, and all that was trained on them, stay
valid.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from fact_convert.models.pipeline import load_part, save_part
from fact_jax.models.vae import AutoencoderKL, VAEConfig
from fact_jax.portraits import Batch
from fact_jax.utils.contact_sheet import contact_sheet
from fact_jax.utils.errors import UserError
from fact_jax.utils.pixels import denormalize_pixels, normalize_pixels
from fact_jax.utils.ranges import CheckedFields, Name, NonNegative
from fact_train.config import TrainConfig
from fact_train.data.array_source import ShuffledArrays
from fact_train.data.portraits import (
    Photos,
    draw_portraits,
    people_of,
    portrait_arrays,
)
from fact_train.engine.partition import merge, overlay, split_by_paths, split_module
from fact_train.engine.sample_keys import sample_normal
from fact_train.engine.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEOptions(CheckedFields):
    """``head_weight`` is the extra weight of the head's pixels; ``kl_weight`` is a latent's.

    With ``decoder_of``, a VAE's folder, its encoder stays bit for bit and its decoder learns on.
    """

    people: Annotated[int, people_of("base")] = 6000
    photos: Photos = 2
    kl_weight: NonNegative = 1e-3
    head_weight: NonNegative = 2.0
    decoder_of: Name | None = None


class VAETask(Task):
    """Reconstruct portraits: absolute and squared error, the head weighted, and a little KL."""

    options: VAEOptions

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        if self.options.decoder_of is None:
            vae = AutoencoderKL(VAEConfig.mini(), rngs=nnx.Rngs(config.seed))
        else:
            vae = load_vae(self.options.decoder_of)
        self.vae, self.size = split_module(vae), vae.config.sample_size

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        if self.options.decoder_of is None:
            return self.vae.arrays, {}
        return split_by_paths(self.vae.arrays, ["^decoder/", "^post_quant_conv/"])

    def source(self) -> ShuffledArrays:
        def described(batch: Batch) -> dict[str, np.ndarray]:
            masks = np.rint(batch.portrait.head_mask * 255).astype(np.uint8)
            return {"images": batch.images, "head": masks}

        people, photos = self.options.people, self.options.photos
        arrays = portrait_arrays("base", people, photos, described, size=self.size)
        return ShuffledArrays(arrays, self.config.batch_size, self.config.seed)

    def loss(self, trainable, frozen, batch, *, step, keys):
        vae = self.vae.module(merge(frozen, trainable))
        images = normalize_pixels(batch["images"])
        mean, log_variance = vae.encode(images)
        latents = mean + jnp.exp(0.5 * log_variance) * sample_normal(keys, mean.shape[1:])
        error = vae.decode(latents) - images
        weight = 1.0 + self.options.head_weight * batch["head"][..., None] / 255.0
        absolute = (weight * jnp.abs(error)).mean()
        square = (weight * error**2).mean()
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1.0 - log_variance).mean()
        psnr = -10 * jnp.log10((error**2).mean() / 4)
        metrics = {"loss/absolute": absolute, "loss/square": square, "loss/kl": kl, "psnr": psnr}
        return absolute + square + self.options.kl_weight * kl, metrics

    def samples(self, trainable, frozen, key):
        images = draw_portraits("test", 8, 1, size=self.size).images
        decoded = jax.jit(self._round_trip)(merge(frozen, trainable), jnp.asarray(images))
        pairs = np.concatenate([images, denormalize_pixels(decoded)])
        return {"reconstruction": contact_sheet(pairs, 8)}

    def _round_trip(self, arrays, images):
        vae = self.vae.module(arrays)
        return vae.decode(vae.encode(normalize_pixels(images))[0])

    def export(self, trainable: PyTree, frozen: PyTree, directory: Path, step: int) -> None:
        """Write ``vae/`` as diffusers has it, scaled to latents of unit variance."""
        # What is frozen goes out as it was read: the step may hold it in half precision.
        vae = self.vae.module(overlay(self.vae.arrays, trainable))
        if self.options.decoder_of is None:
            images = draw_portraits("base", 256, 1, size=self.size).images
            deviation = float(jax.jit(lambda x: vae.encode(normalize_pixels(x))[0].std())(images))
            vae.config = dataclasses.replace(vae.config, scaling_factor=round(1 / deviation, 5))
        save_part(vae, directory / "vae", "diffusion_pytorch_model")


def load_vae(folder: str) -> AutoencoderKL:
    """The VAE in a folder named ``vae``, as diffusers has it; UserError if there is none."""
    if Path(folder).name != "vae":
        raise UserError(f"{folder} is no VAE's folder: give one that is named vae")
    return load_part(Path(folder))
