"""Identity losses of the adapter task: whom the predicted picture shows, as a face network sees it.

The clean latents that a prediction implies are decoded, aligned by the known points of the photo
that was noised (no detector in the step), blanked by its head mask, and embedded by a network of
its own, which should be neither the condition's encoder nor the judge. The distance is that of
ArcFace losses in PortraitBooth (arXiv 2312.06354) and others.

Timesteps weigh differently: from much noise nobody can be told, whatever the condition; from little
noise everybody can, without the condition (of the miniature's people the plain adapter's
predictions are at 0.13 on average, weighted by abar_t).
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from fact_convert import Pipeline
from fact_jax.diffusion.noise_schedules import alphas_cumprod
from fact_jax.face.warp import crop_to_picture, warp_crops
from fact_jax.losses import identity_distance, identity_info_nce
from fact_jax.models.transface import TransFace
from fact_jax.portraits import Batch
from fact_jax.utils.errors import UserError
from fact_jax.utils.pixels import normalize_pixels
from fact_jax.utils.ranges import CheckedFields, Name, NonNegative, Positive, Range
from fact_train.data.pixels import map_module
from fact_train.data.portraits import align_portraits
from fact_train.engine.partition import split_module


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdentityOptions(CheckedFields):
    """``encoder`` is the network, a TransFace as ``load_encoder`` takes it; None: no such loss.

    ``weight`` is that of 1 - cosine to the photo's own embedding, ``contrastive`` that of InfoNCE
    against ``negatives`` other people, one photo each, whose embeddings are computed once: the
    network is frozen, so they never age as those in a queue would. A timestep's weight is abar_t
    ("signal"), or 4 abar_t (1 - abar_t) ("mixed"), most where there is as much signal as noise.
    With ``window`` only so many cells of the latents around the face are decoded, along each side.
    """

    encoder: Name | None = None
    weight: NonNegative = 0.1
    contrastive: NonNegative = 0.0
    timesteps: Literal["signal", "mixed"] = "mixed"
    temperature: Positive = 0.1
    negatives: Annotated[int, Range(1, 1 << 20)] = 4096
    window: Annotated[int, Range(1, 1 << 10)] | None = None

    @property
    def others(self) -> int:
        """How many negatives are kept."""
        return self.negatives if self.contrastive else 1


class IdentityLoss:
    """The loss on top of an encoder; ``arrays`` are what it keeps in the frozen tree."""

    def __init__(
        self,
        options: IdentityOptions,
        encoder: TransFace,
        pipeline: Pipeline,
    ):
        self.options, self.config, self._schedule = options, encoder.config, pipeline.schedule
        self._encoder, self._vae = split_module(encoder), split_module(pipeline.vae)
        vae = pipeline.vae.config
        self._downscale, self._scale = vae.downscale, vae.scaling_factor

    def arrays(
        self, negatives: Float[np.ndarray, "n k"], people: Int[np.ndarray, " n"]
    ) -> dict[str, PyTree]:
        """``vae``, the network, and the negatives' embeddings and people's numbers."""
        return {
            "vae": self._vae.arrays,
            "identity": {
                "encoder": self._encoder.arrays,
                "negatives": jnp.asarray(negatives),
                "people": jnp.asarray(people, jnp.int32),
            },
        }

    def embed(self, crops: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n k"]:
        """Embeddings of true photos' crops, outside of the step."""
        encoder = self._encoder.module(self._encoder.arrays)
        return map_module(encoder, lambda net, batch: net(normalize_pixels(batch))[1], crops)

    def __call__(
        self,
        frozen: PyTree,
        batch: dict[str, Array],
        clean: Float[Array, "b h w c"],
        t: Int[Array, " b"],
        given: Bool[Array, " b"],
        *,
        remat: bool,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The weighted loss of predicted ``clean`` latents (scaled), and its metrics.

        ``batch`` holds the noised photos' ``own_crops``, ``head`` masks (b, H, W) in 0..255,
        ``warp`` (:func:`fact_jax.face.warp.crop_to_picture`) and numbers of their ``person``.
        ``given``: whose face was not dropped; the others count nothing.
        """
        options = self.options
        encoder = self._encoder.module(frozen["identity"]["encoder"])
        seen = jax.checkpoint(self._embed_predicted) if remat else self._embed_predicted
        found = seen(frozen, clean, batch["head"], batch["warp"])
        dtype = found.dtype
        own = encoder(normalize_pixels(batch["own_crops"]).astype(dtype))[1]
        abar = alphas_cumprod(self._schedule)
        weights = abar if options.timesteps == "signal" else 4.0 * abar * (1.0 - abar)
        weight = weights[t] * given
        distance = identity_distance(found, own)
        loss = options.weight * (weight * distance).mean()
        # As a mean over samples, for it is averaged over devices and microbatches too.
        metrics = {"loss/identity": (weight * distance).mean() / weights.mean()}
        if options.contrastive:
            same = batch["person"][:, None] == frozen["identity"]["people"]
            nce = identity_info_nce(
                found, own, frozen["identity"]["negatives"], same, options.temperature
            )
            loss += options.contrastive * (weight * nce).mean()
            metrics["loss/contrastive"] = (weight * nce).mean() / weights.mean()
        return loss, metrics

    def _embed_predicted(
        self,
        frozen: PyTree,
        clean: Float[Array, "b h w c"],
        head: UInt8[Array, "b H W"],
        warp: Float[Array, "b 2 3"],
    ) -> Float[Array, "b k"]:
        if self.options.window is not None:
            clean, head, warp = self._cut(clean, head, warp, self.options.window)
        dtype = jax.tree.leaves(frozen["vae"])[0].dtype
        pictures = self._vae.module(frozen["vae"]).decode((clean / self._scale).astype(dtype))
        # Black where no head is, as in the crops of true photos.
        pictures = (pictures + 1.0) * (head[..., None] / 255.0).astype(dtype) - 1.0
        crops = warp_crops(pictures, warp, self.config.img_size, fill=-1.0)
        return self._encoder.module(frozen["identity"]["encoder"])(crops)[1]

    def _cut(
        self,
        clean: Float[Array, "b h w c"],
        head: UInt8[Array, "b H W"],
        warp: Float[Array, "b 2 3"],
        side: int,
    ) -> tuple[Float[Array, "b s s c"], UInt8[Array, "b S S"], Float[Array, "b 2 3"]]:
        """What lies around the middle of each aligned crop, as far as the picture goes."""
        scale, cells = self._downscale, jnp.asarray(clean.shape[1:3])
        middle = jnp.asarray([self.config.img_size / 2, self.config.img_size / 2, 1.0])
        centre = (warp @ middle)[:, ::-1] / scale  # row, column
        corner = jnp.round(centre - side / 2).astype(jnp.int32)
        corner = jnp.clip(corner, 0, jnp.maximum(cells - side, 0))
        sides = tuple(min(side, int(n)) for n in clean.shape[1:3])

        def cut(latents, mask, matrix, corner):
            row, column = corner
            latents = jax.lax.dynamic_slice(latents, (row, column, 0), (*sides, latents.shape[2]))
            mask = jax.lax.dynamic_slice(
                mask, (row * scale, column * scale), tuple(n * scale for n in sides)
            )
            return latents, mask, matrix.at[:, 2].add(-scale * corner[::-1])

        return jax.vmap(cut)(clean, head, warp, corner)


def drawn_arrays(batch: Batch, crop_size: int) -> dict[str, np.ndarray]:
    """What the loss takes of drawn portraits, for training data in memory."""
    return {
        "own_crops": align_portraits(batch, crop_size),
        "head": np.rint(batch.portrait.head_mask * 255).astype(np.uint8),
        "warp": crop_to_picture(batch.portrait.points, crop_size),
        "person": batch.ids,
    }


def check_crop_size(network: TransFace, encoder: TransFace) -> None:
    """UserError unless the loss takes the crops that records hold, which are the encoder's."""
    takes, has = network.config.img_size, encoder.config.img_size
    if takes != has:
        raise UserError(
            f"options.identity.encoder takes crops of {takes} pixels, those of the records have "
            f"{has}: give a network of that size"
        )
