"""Losses as pure functions: denoising, FAIR, ArcFace, identity."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fact_jax.diffusion.noise_schedules import NoiseSchedule, alphas_cumprod
from fact_jax.face import resize_area


def denoising_error(
    output: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    weight: Float[Array, "b h w"] | None = None,
) -> Float[Array, ""]:
    """Mean squared error; ``weight`` (if any) multiplies each latent pixel's square."""
    squares = (output.astype(jnp.float32) - target.astype(jnp.float32)) ** 2
    return squares.mean() if weight is None else (squares * weight[..., None]).mean()


def min_snr_weight(
    schedule: NoiseSchedule, t: Int[Array, " b"], gamma: float
) -> Float[Array, " b"]:
    """Min-SNR weight of each sample's squared error (arXiv 2303.09556, section 3.4).

    SNR = abar / (1 - abar). The error of x_0 is to weigh min(SNR, gamma): that of the noise then
    weighs min(SNR, gamma) / SNR, and that of v min(SNR, gamma) / (SNR + 1). Written without the
    division by SNR, so that a last timestep of pure noise is no exception.
    """
    abar = alphas_cumprod(schedule)[t]
    if schedule.prediction_type == "epsilon":
        # An SNR below gamma leaves the weight at 1.
        return jnp.minimum(1.0, gamma * (1 - abar) / jnp.maximum(abar, 1e-12))
    return jnp.minimum(abar, gamma * (1 - abar))


def fair_ratio(
    x: Float[Array, "b n c"],
    delta: Float[Array, "b n c"],
    size: tuple[int, int],
    mask: Float[Array, "b H W"],
) -> Float[Array, " b"]:
    """Face Adapting Increment Regularization of one block (FACT, arXiv 2410.12312).

    || delta (1 - M) || / || x (1 - M) ||, norms over the tokens and channels of a sample: how much
    the adapter adds outside the face, relative to what was there. ``mask`` (1 on the face, 0
    elsewhere, any resolution) is brought to the block's ``size`` by area averaging. Without
    pixels outside the face it is 0. No gradient flows through the denominator: inflating the base's
    features must not lower the loss.
    """
    outside = 1.0 - resize_area(mask, size).reshape(mask.shape[0], -1, 1).astype(jnp.float32)
    # The averages of an all-face mask may miss 1 by a rounding, which the ratio would blow up.
    outside = jnp.where(outside > 1e-5, outside, 0.0)
    added = _norm(delta.astype(jnp.float32) * outside)
    there = jax.lax.stop_gradient(_norm(x.astype(jnp.float32) * outside))
    return jnp.where(there > 0, added / jnp.where(there > 0, there, 1.0), 0.0)


def _norm(x: Float[Array, "b n c"]) -> Float[Array, " b"]:
    """L2 norm of each sample whose gradient at 0 is 0 (an adapter that is silent starts there)."""
    squares = (x**2).sum(axis=(1, 2))
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def arcface_loss(
    embeddings: Float[Array, "b k"],
    centres: Float[Array, "k p"],
    labels: Int[Array, " b"],
    *,
    scale: float = 32.0,
    margin: float = 0.5,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Additive angular margin loss (ArcFace, arXiv 1801.07698) and the accuracy without margin."""
    embeddings, centres = embeddings.astype(jnp.float32), centres.astype(jnp.float32)
    cosine = normalize(embeddings) @ normalize(centres, axis=0)
    own = jnp.take_along_axis(cosine, labels[:, None], axis=1)
    own = jnp.clip(own, -1 + 1e-6, 1 - 1e-6)
    shifted = own * math.cos(margin) - jnp.sqrt(1 - own**2) * math.sin(margin)
    # Past pi - margin the cosine would turn upwards again.
    shifted = jnp.where(own > math.cos(math.pi - margin), shifted, own - margin * math.sin(margin))
    chosen = labels[:, None] == jnp.arange(cosine.shape[1])
    log_probability = jax.nn.log_softmax(scale * jnp.where(chosen, shifted, cosine))
    loss = -jnp.take_along_axis(log_probability, labels[:, None], axis=1).mean()
    return loss, (cosine.argmax(axis=1) == labels).mean()


def identity_distance(found: Float[Array, "b k"], own: Float[Array, "b k"]) -> Float[Array, " b"]:
    """1 - cosine of two embeddings of each sample, 0 to 2, float32."""
    found, own = (normalize(a.astype(jnp.float32)) for a in (found, own))
    return 1.0 - (found * own).sum(axis=-1)


def identity_info_nce(
    found: Float[Array, "b k"],
    own: Float[Array, "b k"],
    others: Float[Array, "n k"],
    same: Bool[Array, "b n"],
    temperature: float,
) -> Float[Array, " b"]:
    """InfoNCE (arXiv 1807.03748) of each sample: its own person against n others, float32.

    Cosines over ``temperature``. What ``same`` marks is the sample's own person, and no negative.
    """
    found, own, others = (normalize(a.astype(jnp.float32)) for a in (found, own, others))
    positive = (found * own).sum(axis=-1, keepdims=True) / temperature
    negatives = jnp.where(same, -jnp.inf, found @ others.T / temperature)
    return jax.nn.logsumexp(jnp.concatenate([positive, negatives], 1), 1) - positive[:, 0]


def normalize(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Unit length along an axis; zero stays zero."""
    return x / jnp.sqrt(jnp.maximum((x**2).sum(axis, keepdims=True), 1e-12))
