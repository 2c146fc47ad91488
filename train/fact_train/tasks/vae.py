"""Train the miniature's AutoencoderKL on portraits of the ``base`` split.

Later its decoder can be trained on by itself: the latents, and all that was trained on them, stay
valid.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from fact_convert import load_pipeline, tokenize
from fact_convert.models.pipeline import load_part, save_part
from fact_jax.diffusion.noise_schedules import add_noise, signal_and_noise, split_output
from fact_jax.models.vae import AutoencoderKL, VAEConfig
from fact_jax.portraits import Batch
from fact_jax.utils.contact_sheet import contact_sheet
from fact_jax.utils.errors import UserError
from fact_jax.utils.pixels import denormalize_pixels, normalize_pixels
from fact_jax.utils.ranges import CheckedFields, Name, NonNegative, Range
from fact_train.config import TrainConfig
from fact_train.data.array_source import ShuffledArrays
from fact_train.data.portraits import (
    Photos,
    draw_portraits,
    people_of,
    portrait_arrays,
)
from fact_train.engine.partition import merge, overlay, split_by_paths, split_module
from fact_train.engine.sample_keys import sample_normal, sample_timesteps, split_keys
from fact_train.engine.task import Task

_DISCRIMINATOR = "discriminator"
_ADVERSARIAL_WARMUP = 150
"""Steps in which the decoder's adversarial loss grows to its weight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEOptions(CheckedFields):
    """``head_weight`` is the extra weight of the head's pixels; ``kl_weight`` is a latent's.

    With ``decoder_of``, a VAE's folder, its encoder stays bit for bit and its decoder learns on.
    With ``predicted_by``, a pipeline's folder, it learns from what that base's UNet predicts (x_0
    under the caption) of latents noised to a timestep below ``noise_steps``: smooth where the base
    is unsure, as its pictures are, where the decoder is to draw an edge all the same.

    ``adversarial`` weighs the loss of a discriminator that learns beside the decoder (VQGAN, Esser
    et al. 2021, arXiv 2012.09841; hinge losses, arXiv 1705.02894), growing from 0 over the first
    150 steps: an error by pixels alone blurs what could be here or there.
    """

    people: Annotated[int, people_of("base")] = 6000
    photos: Photos = 2
    kl_weight: NonNegative = 1e-3
    head_weight: NonNegative = 2.0
    decoder_of: Name | None = None
    predicted_by: Name | None = None
    noise_steps: Annotated[int, Range(1, 1000)] = 300
    adversarial: NonNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predicted_by is not None and self.decoder_of is None:
            raise ValueError("predicted_by is of a decoder that learns on: give decoder_of too")


class PatchDiscriminator(nnx.Module):
    """Whether pictures are real, by patches (PatchGAN, Isola et al. 2017, arXiv 1611.07004)."""

    def __init__(self, widths: Sequence[int] = (32, 64, 96), *, rngs: nnx.Rngs):
        ends = zip((3, *widths[:-1]), widths, strict=True)
        self.down = nnx.List([nnx.Conv(i, o, (4, 4), strides=(2, 2), rngs=rngs) for i, o in ends])
        self.norms = nnx.List([nnx.GroupNorm(c, num_groups=8, rngs=rngs) for c in widths[1:]])
        self.out = nnx.Conv(widths[-1], 1, (3, 3), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h//8 w//8 1"]:
        """Logits of patches of pictures in [-1, 1]."""
        x = jax.nn.leaky_relu(self.down[0](x), 0.2)
        for down, norm in zip(self.down[1:], self.norms, strict=True):
            x = jax.nn.leaky_relu(norm(down(x)), 0.2)
        return self.out(x)


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
        self.discriminator = split_module(PatchDiscriminator(rngs=nnx.Rngs(config.seed)))
        self.base = None
        if self.options.predicted_by is not None:
            self.base = load_pipeline(self.options.predicted_by)
            parts = {"unet": self.base.unet, "text_encoder": self.base.text_encoder}
            self.predictor = {name: split_module(module) for name, module in parts.items()}

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        learned = [""] if self.options.decoder_of is None else ["^decoder/", "^post_quant_conv/"]
        trainable, encoder = split_by_paths(self.vae.arrays, learned)
        if self.options.adversarial:
            trainable = {**trainable, _DISCRIMINATOR: self.discriminator.arrays}
        predictor = {} if self.base is None else self.predictor
        arrays = {name: module.arrays for name, module in predictor.items()}
        return trainable, {"vae": encoder, **arrays}

    def source(self) -> ShuffledArrays:
        def described(batch: Batch) -> dict[str, np.ndarray]:
            masks = np.rint(batch.portrait.head_mask * 255).astype(np.uint8)
            found = {"images": batch.images, "head": masks}
            if self.base is not None:
                found["ids"], _ = tokenize(self.base.tokenizer, batch.captions)
            return found

        people, photos = self.options.people, self.options.photos
        arrays = portrait_arrays("base", people, photos, described, size=self.size)
        return ShuffledArrays(arrays, self.config.batch_size, self.config.seed)

    def loss(self, trainable, frozen, batch, *, step, keys):
        vae = self.vae.module(merge(frozen["vae"], _vae_part(trainable)))
        images = normalize_pixels(batch["images"])
        mean, log_variance = vae.encode(images)
        if self.base is None:
            latents = mean + jnp.exp(0.5 * log_variance) * sample_normal(keys, mean.shape[1:])
        else:
            scale = vae.config.scaling_factor
            latents = self._predicted(self.base, frozen, mean * scale, batch["ids"], keys) / scale
        decoded = vae.decode(latents)
        error = decoded - images
        weight = 1.0 + self.options.head_weight * batch["head"][..., None] / 255.0
        absolute = (weight * jnp.abs(error)).mean()
        square = (weight * error**2).mean()
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1.0 - log_variance).mean()
        psnr = -10 * jnp.log10((error**2).mean() / 4)
        metrics = {"loss/absolute": absolute, "loss/square": square, "loss/kl": kl, "psnr": psnr}
        loss = absolute + square + self.options.kl_weight * kl
        if self.options.adversarial:
            fooled, told = self._adversarial(trainable[_DISCRIMINATOR], images, decoded)
            grown = jnp.minimum(step / _ADVERSARIAL_WARMUP, 1.0)
            loss += self.options.adversarial * grown * fooled + told
            metrics |= {"loss/adversarial": fooled, "loss/discriminator": told}
        return loss, metrics

    def _adversarial(self, arrays, images, decoded):
        """The decoder's hinge loss and the discriminator's; by neither does the other learn."""
        constant = self.discriminator.module(jax.lax.stop_gradient(arrays))
        both = jnp.concatenate([images, jax.lax.stop_gradient(decoded)])
        real, fake = jnp.split(self.discriminator.module(arrays)(both), 2)
        told = jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()
        return -constant(decoded).mean(), told

    def _predicted(self, base, frozen, latents, ids, keys):
        """The base's x_0 of scaled latents, each noised to a timestep of its own."""
        noise_keys, time_keys = split_keys(keys, 2)
        schedule = base.schedule
        t = sample_timesteps(time_keys, self.options.noise_steps)
        text = self.predictor["text_encoder"].module(frozen["text_encoder"])(ids)
        noisy = add_noise(schedule, latents, sample_normal(noise_keys, latents.shape[1:]), t)
        output = self.predictor["unet"].module(frozen["unet"])(noisy, t, text)
        return split_output(schedule, output, noisy, *signal_and_noise(schedule, t, noisy.ndim))[0]

    def samples(self, trainable, frozen, key):
        images = draw_portraits("test", 8, 1, size=self.size).images
        arrays = merge(frozen["vae"], _vae_part(trainable))
        decoded = jax.jit(self._round_trip)(arrays, jnp.asarray(images))
        pairs = np.concatenate([images, denormalize_pixels(decoded)])
        return {"reconstruction": contact_sheet(pairs, 8)}

    def _round_trip(self, arrays, images):
        vae = self.vae.module(arrays)
        return vae.decode(vae.encode(normalize_pixels(images))[0])

    def export(self, trainable: PyTree, frozen: PyTree, directory: Path, step: int) -> None:
        """Write ``vae/`` as diffusers has it, scaled to latents of unit variance."""
        # What is frozen goes out as it was read: the step may hold it in half precision.
        vae = self.vae.module(overlay(self.vae.arrays, _vae_part(trainable)))
        if self.options.decoder_of is None:
            images = draw_portraits("base", 256, 1, size=self.size).images
            deviation = float(jax.jit(lambda x: vae.encode(normalize_pixels(x))[0].std())(images))
            vae.config = dataclasses.replace(vae.config, scaling_factor=round(1 / deviation, 5))
        save_part(vae, directory / "vae", "diffusion_pytorch_model")


def _vae_part(trainable: PyTree) -> PyTree:
    """The VAE's part of what is trained, without the discriminator."""
    return {name: part for name, part in trainable.items() if name != _DISCRIMINATOR}


def load_vae(folder: str) -> AutoencoderKL:
    """The VAE in a folder named ``vae``, as diffusers has it; UserError if there is none."""
    if Path(folder).name != "vae":
        raise UserError(f"{folder} is no VAE's folder: give one that is named vae")
    return load_part(Path(folder))
