"""What an adapter does outside the face, inside the model: latents, and FAIR by block."""

import functools
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from fact_convert.models.tokenizer import tokenize
from fact_infer.evaluation.measures import Samples
from fact_infer.jax.pipeline import FlaxPipeline
from fact_jax.diffusion.noise_schedules import add_noise
from fact_jax.face import resize_area
from fact_jax.fact import encode_face, initial_noise
from fact_jax.losses import fair_ratio
from fact_jax.metrics.pictures import latent_change
from fact_jax.models.adapter import FaceControls
from fact_jax.utils.batches import padded_batches
from fact_jax.utils.pixels import normalize_pixels

TIMES = (1, 3, 5, 7)
"""Eighths of the noise schedule at which FAIR is taken."""


class Leakage:
    """Latents and FAIR of drawn pictures, ``batch`` at a time; compiled once."""

    def __init__(self, pipeline: FlaxPipeline, batch: int):
        self._pipeline, self._batch = pipeline, batch
        models = pipeline.modules()
        graphs, self._states = nnx.split(models)
        self._names = [block_name(path) for path, _ in models["unet"].transformer_blocks()]
        base = pipeline.base
        schedule, factor, channels = base.schedule, base.vae.scaling_factor, base.unet.in_channels
        times = [schedule.num_train_timesteps * eighth // 8 for eighth in TIMES]

        @jax.jit
        def of_batch(
            states, ids: Int[Array, "b n"], seeds: Int[Array, " b"], crops, fact, base, head
        ):
            parts = nnx.merge(graphs, states)
            latents = [parts["vae"].encode(normalize_pixels(x))[0] * factor for x in (fact, base)]
            height, width = latents[0].shape[1:3]
            noise = initial_noise(seeds, height, width, channels)
            text = parts["text_encoder"](ids)
            face = encode_face(parts["encoder"], parts["resampler"], normalize_pixels(crops))
            ratio = functools.partial(fair_ratio, mask=head)
            given = {"face": face.astype(text.dtype), "on_increment": ratio}
            given["controls"] = FaceControls(parallel=pipeline.parallel)

            def of_time(t: Int[Array, ""]) -> Float[Array, "blocks b"]:
                steps = jnp.full(len(seeds), t)
                noisy = add_noise(schedule, latents[0], noise, steps).astype(text.dtype)
                return jnp.stack(parts["unet"](noisy, steps, text, **given)[1])

            found = jax.lax.map(of_time, jnp.asarray(times))  # one UNet is compiled, not four
            outside = 1.0 - resize_area(head, (height, width))
            return found.mean(0).T, *latents, outside

        self._of_batch = of_batch

    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        crops: UInt8[np.ndarray, "n p s s 3"],
        pictures: Mapping[str, UInt8[np.ndarray, "n h w 3"]],
        heads: Bool[np.ndarray, "n h w"],
    ) -> Samples:
        """``latents/fact``, ``fair/fact`` and ``fair/BLOCK/fact`` of each ``fact`` picture.

        ``heads`` are where the adapter may work. Latents: of the two pictures, encoded:
        ``fact_jax.metrics.pictures.latent_change``. FAIR (arXiv 2410.12312): ``fair_ratio`` of
        each block on the ``fact`` picture, noised with its own seed's noise to four timesteps.
        """
        ids, _ = tokenize(self._pipeline.base.tokenizer, prompts)
        whole = (
            *(ids, np.asarray(seeds, np.int32), crops, pictures["fact"], pictures["base"]),
            heads.astype(np.float32),
        )
        pieces = []
        for rows, real in padded_batches(len(prompts), self._batch):
            made = self._of_batch(self._states, *(np.asarray(x)[rows] for x in whole))
            pieces.append([np.asarray(x)[:real] for x in made])
        ratios, fact, base, outside = (np.concatenate(x) for x in zip(*pieces, strict=True))
        return {
            "latents/fact": latent_change(fact, base, outside),
            "fair/fact": ratios.mean(1),
            **{f"fair/{name}/fact": ratios[:, i] for i, name in enumerate(self._names)},
        }


def block_name(path: str) -> str:
    """``down.0.1`` for ``down_blocks.0.attentions.1.transformer``, as in training's metrics."""
    return re.sub("_blocks?|[.]attentions|[.]transformer", "", path)
