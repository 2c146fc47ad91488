"""The adapter task's photos from the portrait world: drawn, encoded, some edited by the base."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

import fact_jax.portraits
from fact_convert import Pipeline, tokenize
from fact_jax.diffusion.samplers import noise_latents_for_start, sample_ddim
from fact_jax.face import resize_area
from fact_jax.fact import Guidance, guided_model
from fact_jax.portraits import Batch
from fact_jax.utils.batches import map_batches
from fact_jax.utils.cache import ArrayCache
from fact_train.data.pixels import encode_latents, encode_tokens
from fact_train.data.portraits import align_portraits, portrait_arrays
from fact_train.engine.checksums import content_hash
from fact_train.tasks.identity_loss import drawn_arrays

_VERSION = 2
"""Of what is kept: another where the same options give other arrays."""
EDIT_STEPS, EDIT_START = 10, 6
"""Of ten steps the last four are drawn: the scene follows the words, and on the miniature the judge
finds 0.72 of the likeness that the autoencoder leaves (0.60 after five steps, 0.81 after three).
"""


def photo_arrays(task: Any) -> dict[str, np.ndarray]:
    """``latents``, ``ids``, ``mask``, ``tokens``, what the losses take; sorted by person.

    ``task`` is the adapter task. In ``options.portrait_cache`` they are kept for the next run
    that takes the very same: what decides them is in the file's name, ``_VERSION`` for this code.
    """
    options = task.options
    if options.portrait_cache is None:
        return _draw(task)
    source = Path(fact_jax.portraits.__file__).parent
    code = [file.read_bytes() for file in sorted(source.glob("*.py"))]
    taken = dataclasses.asdict(options.resampler)
    about = (
        _VERSION,
        *(options.people, options.photos, options.region, options.edited, task.size),
        *(taken[name] for name in ("encoder_blocks", "embedding")),
        *(task.encoder.config, task.encoders.digest(), jax.default_backend(), jax.__version__),
        content_hash(task.base) if options.edited else None,
        task.identity and task.identity.config.img_size,
        options.point_weight > 0,
        *(hashlib.sha256(text).hexdigest() for text in code),
    )
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
    return ArrayCache(Path(options.portrait_cache)).get(key, lambda: _draw(task))


def _draw(task: Any) -> dict[str, np.ndarray]:
    options, pipeline = task.options, task.pipeline
    cells = (task.size // pipeline.vae.config.downscale,) * 2

    def described(batch: Batch) -> dict[str, np.ndarray]:
        mask = getattr(batch.portrait, f"{options.region}_mask")
        found = {
            "images": batch.images,
            "captions": np.asarray(batch.captions),
            "crops": align_portraits(batch, task.encoder.config.img_size),
            "mask": np.asarray(resize_area(mask, cells), np.float32),
        }
        if options.point_weight:
            found["points"] = batch.portrait.points
        if task.identity is not None:
            found |= drawn_arrays(batch, task.identity.config.img_size)
        return found

    people, photos = options.people, options.photos
    arrays = portrait_arrays("adapter", people, photos, described, size=task.size)
    captions = arrays.pop("captions").tolist()
    latents = encode_latents(pipeline.vae, arrays.pop("images"))
    if options.edited:
        rows = edited_rows(options.people, options.photos, options.edited)
        # Told what another photo of the person shows.
        others = np.flatnonzero(rows)
        others += np.where(others % options.photos == options.photos - 1, 1 - options.photos, 1)
        told = [captions[i] for i in others]
        latents[rows] = edit(pipeline, latents[rows], told)
        for row, caption in zip(np.flatnonzero(rows), told, strict=True):
            captions[row] = caption
    tokens = encode_tokens(task.encoder, arrays.pop("crops"), options.resampler)
    return {
        "latents": latents,
        "ids": tokenize(pipeline.tokenizer, captions)[0],
        "mask": arrays.pop("mask"),
        "tokens": tokens.astype(np.float16),
        **arrays,
    }


def edited_rows(people: int, photos: int, share: float) -> Bool[np.ndarray, " n"]:
    """Which photos are edited: about so many, the same of any person in every run."""
    return np.random.default_rng(0).random(people * photos) < share


def edit(
    pipeline: Pipeline, latents: Float[np.ndarray, "n h w c"], captions: list[str]
) -> Float[np.ndarray, "n h w c"]:
    """The photos half noised and drawn again by the base under other captions."""
    schedule = pipeline.schedule
    parts = (pipeline.unet, pipeline.text_encoder)
    graphs, states = zip(*map(nnx.split, parts), strict=True)
    ids = tokenize(pipeline.tokenizer, [*captions, ""])[0]

    @jax.jit
    def drawn(
        states: Any,
        latents: Float[np.ndarray, "b h w c"],
        ids: Int[np.ndarray, "b n"],
        empty: Int[np.ndarray, "1 n"],
        seeds: Int[np.ndarray, " b"],
    ) -> Float[np.ndarray, "b h w c"]:
        unet, encoder = map(nnx.merge, graphs, states)
        text = encoder(ids)
        keys = jax.vmap(jax.random.key)(seeds)
        noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)
        model = guided_model(
            unet,
            text=text,
            negative_text=jnp.broadcast_to(encoder(empty), text.shape),
            guidance=Guidance(text=3.0),
            steps=EDIT_STEPS,
        )
        start = noise_latents_for_start(schedule, "ddim", latents, noise, EDIT_STEPS, EDIT_START)
        return sample_ddim(model, start, schedule, steps=EDIT_STEPS, start=EDIT_START)

    return map_batches(
        lambda rows: drawn(states, latents[rows], ids[rows], ids[-1:], rows.astype(np.uint32)),
        np.arange(len(latents)),
    )
