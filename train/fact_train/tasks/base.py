"""Train the miniature's base model: text to portrait, knowing nothing of who people are."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from fact_convert import Pipeline, Tokenizer, save_pipeline, tokenize
from fact_convert.models.pipeline import load_part
from fact_jax.diffusion.noise_schedules import NoiseSchedule, add_noise, training_target
from fact_jax.diffusion.samplers import sample_ddim
from fact_jax.face import resize_area
from fact_jax.losses import denoising_error
from fact_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from fact_jax.models.unet import UNet, UNetConfig
from fact_jax.portraits import SPLITS, Batch, captions, sample_scene
from fact_jax.portraits.vocabulary import caption_vocabulary
from fact_jax.utils.contact_sheet import contact_sheet
from fact_jax.utils.errors import UserError
from fact_jax.utils.pixels import denormalize_pixels
from fact_jax.utils.ranges import CheckedFields, Name, NonNegative, Probability
from fact_train.config import TrainConfig
from fact_train.data.array_source import ShuffledArrays
from fact_train.data.pixels import encode_latents
from fact_train.data.portraits import Photos, people_of, portrait_arrays
from fact_train.engine.partition import overlay, split_by_paths, split_module
from fact_train.engine.sample_keys import (
    sample_bernoulli,
    sample_normal,
    sample_timesteps,
    split_keys,
)
from fact_train.engine.task import Task
from fact_train.tasks.vae import load_vae

MINI_UNET = UNetConfig.mini()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseOptions(CheckedFields):
    """``vae`` is a folder as the vae task exports it; ``head_weight`` weighs the head up.

    Of the ``unet`` sample size and channels of the latents follow from the VAE. With ``weights``, a
    pipeline's folder as this task exports it, its UNet and text encoder learn on; where ``unet``
    has attention at levels at which that one has none, the new blocks start as adding nothing.
    """

    unet: UNetConfig = MINI_UNET
    vae: Name = "miniature/base/vae"
    weights: Name | None = None
    people: Annotated[int, people_of("base")] = 5000
    photos: Photos = 4
    drop_text: Probability = 0.1
    head_weight: NonNegative = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        unet = self.unet
        channels, levels = unet.block_out_channels, len(unet.block_out_channels)
        by_level = (unet.heads, unet.down_attention, unet.up_attention)
        if levels == 0 or any(len(values) != levels for values in by_level):
            raise ValueError(
                f"unet.heads, down_attention and up_attention must have {levels} values each, one "
                "for each of block_out_channels"
            )
        for width, heads in zip(channels, unet.heads, strict=True):
            if min(width, heads) < 1 or width % heads or width % unet.norm_num_groups:
                raise ValueError(
                    f"unet.block_out_channels {width} must be divided by its heads ({heads}) and "
                    f"by norm_num_groups ({unet.norm_num_groups})"
                )


class BaseTask(Task):
    """UNet and text encoder together, on latents of a frozen autoencoder."""

    options: BaseOptions

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.schedule = NoiseSchedule.mini()
        vocab, merges = caption_vocabulary()
        text = CLIPTextConfig.mini(len(vocab))
        self.tokenizer = Tokenizer(
            vocab=vocab, merges=merges, model_max_length=text.max_position_embeddings
        )
        self.vae = load_vae(self.options.vae)
        rngs = nnx.Rngs(config.seed)
        latents = self.vae.config
        unet = dataclasses.replace(
            self.options.unet,
            sample_size=latents.sample_size // latents.downscale,
            in_channels=latents.latent_channels,
            out_channels=latents.latent_channels,
        )
        self.unet = split_module(self._start("unet", UNet, unet, rngs))
        self.text_encoder = split_module(self._start("text_encoder", CLIPTextModel, text, rngs))

    def _start(self, name: str, kind: type, config: Any, rngs: nnx.Rngs) -> Any:
        """A model as it is before the first step."""
        folder = self.options.weights
        if folder is None:
            return kind(config, rngs=rngs)
        model = load_part(Path(folder, name))
        if isinstance(model, UNet) and _has_more_attention(config, model.config):
            added = len(config.block_channels()) - len(model.config.block_channels())
            self.notes.append(
                f"options.unet has {added} transformer blocks that {folder} has not: they start as "
                "adding nothing"
            )
            return _grown(model, config, rngs)
        if model.config != config:
            raise UserError(f"{folder} has a {name} of another size than options.unet or the VAE")
        return model

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        return {"unet": self.unet.arrays, "text_encoder": self.text_encoder.arrays}, {}

    def source(self) -> ShuffledArrays:
        options, size = self.options, self.vae.config.sample_size
        cells = (size // self.vae.config.downscale,) * 2

        def described(batch: Batch) -> dict[str, np.ndarray]:
            head = np.asarray(resize_area(batch.portrait.head_mask, cells), np.float32)
            ids, _ = tokenize(self.tokenizer, batch.captions)
            return {"images": batch.images, "ids": ids, "head": head}

        arrays = portrait_arrays("base", options.people, options.photos, described, size=size)
        latents = encode_latents(self.vae, arrays.pop("images"))
        arrays = {"latents": latents, **arrays}
        return ShuffledArrays(arrays, self.config.batch_size, self.config.seed)

    def loss(self, trainable, frozen, batch, *, step, keys):
        noise_keys, time_keys, drop_keys = split_keys(keys, 3)
        latents = batch["latents"]
        noise = sample_normal(noise_keys, latents.shape[1:])
        t = sample_timesteps(time_keys, self.schedule.num_train_timesteps)
        dropped = sample_bernoulli(drop_keys, self.options.drop_text)
        empty, _ = tokenize(self.tokenizer, [""])
        ids = jnp.where(dropped[:, None], empty, batch["ids"])
        text = self.text_encoder.module(trainable["text_encoder"])(ids)
        noisy = add_noise(self.schedule, latents, noise, t)
        output = self.unet.module(trainable["unet"])(noisy, t, text, remat=self.config.remat)
        target = training_target(self.schedule, latents, noise, t)
        weight = 1.0 + self.options.head_weight * batch["head"]
        metrics = {"loss/mse": denoising_error(output, target)}
        return denoising_error(output, target, weight), metrics

    def samples(self, trainable, frozen, key):
        prompts = captions(sample_scene(jnp.arange(16) + SPLITS["test"][0] * 1000))
        ids = tokenize(self.tokenizer, [*prompts, *[""] * len(prompts)])[0]
        images = jax.jit(self._sample)(trainable, jnp.asarray(ids), key)
        return {"portraits": contact_sheet(np.asarray(denormalize_pixels(images)), 8)}

    def _sample(self, trainable, ids, key, steps: int = 30, guidance: float = 3.0):
        text = self.text_encoder.module(trainable["text_encoder"])(ids)
        unet = self.unet.module(trainable["unet"])
        count = len(ids) // 2

        def model(x, t, i):
            both = unet(jnp.concatenate([x, x]), jnp.full((2 * count,), t), text)
            wanted, empty = jnp.split(both, 2)
            return empty + guidance * (wanted - empty)

        size = unet.config.sample_size
        noise = jax.random.normal(key, (count, size, size, unet.config.in_channels))
        latents = sample_ddim(model, noise, self.schedule, steps=steps)
        return self.vae.decode(latents / self.vae.config.scaling_factor)

    def export(self, trainable: PyTree, frozen: PyTree, directory: Path, step: int) -> None:
        """Write ``base/``, a diffusers pipeline folder."""
        pipeline = Pipeline(
            unet=self.unet.module(trainable["unet"]),
            vae=self.vae,
            text_encoder=self.text_encoder.module(trainable["text_encoder"]),
            tokenizer=self.tokenizer,
            schedule=self.schedule,
        )
        save_pipeline(pipeline, directory / "base")


def _has_more_attention(config: UNetConfig, before: UNetConfig) -> bool:
    """Whether ``config`` is ``before`` with attention at more levels."""
    names = ("down_attention", "up_attention")
    grown = {name: getattr(config, name) for name in names}
    return (
        before != config
        and dataclasses.replace(before, **grown) == config
        and all(
            kept or not there
            for name in names
            for kept, there in zip(grown[name], getattr(before, name), strict=True)
        )
    )


def _grown(unet: UNet, config: UNetConfig, rngs: nnx.Rngs) -> UNet:
    """``unet`` with the further transformer blocks of ``config``, their ``proj_out`` zero."""
    fresh = split_module(UNet(config, rngs=rngs))
    outputs, _ = split_by_paths(fresh.arrays, ["proj_out/"])
    silent = overlay(fresh.arrays, jax.tree.map(jnp.zeros_like, outputs))
    return fresh.module(overlay(silent, split_module(unet).arrays))
