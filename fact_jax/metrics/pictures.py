"""How pictures differ: from the base's by region, among each other, as distributions."""

import math

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.ndimage import binary_dilation

from fact_jax.metrics.intervals import Estimate


def dilate(masks: Bool[np.ndarray, "n h w"]) -> Bool[np.ndarray, "n h w"]:
    """Masks grown by one pixel to all eight sides."""
    return binary_dilation(masks, np.ones((1, 3, 3), bool))


def change(
    a: UInt8[np.ndarray, "n h w 3"],
    b: UInt8[np.ndarray, "n h w 3"],
    masks: Bool[np.ndarray, "n h w"] | Float[np.ndarray, "n h w"],
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Mean absolute difference of two pictures, as a part of full scale: (inside, outside).

    A pixel whose mask is between 0 and 1 counts on both sides, by its parts. NaN for a picture that
    has no pixel on that side.
    """
    difference = np.abs(a.astype(np.float64) - b.astype(np.float64)).mean(-1) / 255
    inside = masks.astype(np.float64)
    return _masked_mean(difference, inside), _masked_mean(difference, 1 - inside)


def latent_change(
    a: Float[np.ndarray, "n h w c"],
    b: Float[np.ndarray, "n h w c"],
    outside: Float[np.ndarray, "n h w"],
) -> Float[np.ndarray, " n"]:
    """How far the latents of two pictures are apart outside the face, over the size of ``b``'s.

    ||(a - b) w|| / ||b w|| over cells and channels, ``w`` the part of a cell that is outside: 0 for
    the base's own picture. NaN where nothing is outside.
    """
    w = outside[..., None]
    apart, size = (np.sqrt(((x * w) ** 2).sum((1, 2, 3))) for x in (a - b, b))
    return np.where(size > 0, apart / np.where(size > 0, size, 1.0), math.nan)


def _masked_mean(
    values: Float[np.ndarray, "n h w"], weights: Float[np.ndarray, "n h w"]
) -> Float[np.ndarray, " n"]:
    total = weights.sum((1, 2))
    mean = (values * weights).sum((1, 2)) / np.maximum(total, 1e-9)
    return np.where(total > 0, mean, math.nan)


def diversity(features: Float[np.ndarray, "n k"], distance: str = "cosine") -> float:
    """Mean distance between the pictures of one request over seeds; NaN for a single one.

    ``cosine``: 1 - cosine of features. ``absolute``: mean absolute difference, for pixels.
    """
    if len(features) < 2:
        return math.nan
    x = np.asarray(features, np.float64)
    first, second = np.triu_indices(len(x), 1)
    if distance == "absolute":
        pairs = zip(first, second, strict=True)
        return float(np.mean([np.abs(x[i] - x[j]).mean() for i, j in pairs]))
    u = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return float((1 - (u @ u.T)[first, second]).mean())


def kid(x: Float[np.ndarray, "n k"], y: Float[np.ndarray, "n k"]) -> Estimate:
    """Kernel Inception Distance of two equally large sets of features (arXiv 1801.01401).

    The squared MMD under the kernel (x.y / k + 1)^3, by the unbiased estimator over pairs of
    different rows (Gretton et al. 2012, equation 4): it may be negative, and row i of both sets may
    belong together, as a picture and the true photo. The interval is by jackknife over rows. NaN
    for fewer than three.
    """
    n = len(x)
    if n != len(y):
        raise ValueError(f"sets of {n} and {len(y)} rows: give as many true as generated pictures")
    if n < 3:
        return Estimate(math.nan, math.nan, math.nan, n)
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    xx, yy, xy = ((p @ q.T / a.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
    pairs = xx + yy - xy - xy.T
    np.fill_diagonal(pairs, 0.0)
    found = float(pairs.sum() / (n * (n - 1)))
    left = (pairs.sum() - 2 * pairs.sum(1)) / ((n - 1) * (n - 2))
    half = 1.96 * math.sqrt((n - 1) / n * float(((left - left.mean()) ** 2).sum()))
    return Estimate(found, found - half, found + half, n)


def fid(x: Float[np.ndarray, "n k"], y: Float[np.ndarray, "m k"]) -> float:
    """Frechet distance of two sets of features, each taken as a Gaussian (arXiv 1706.08500).

    |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)). Biased upwards by few pictures: compare
    only sets of equal size. NaN for fewer than two rows.
    """
    if min(len(x), len(y)) < 2:
        return math.nan
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    s, t = (np.atleast_2d(np.cov(z, rowvar=False)) for z in (a, b))
    # The trace of a root is the sum of the roots of the eigenvalues, which are those of a product
    # of two positive semidefinite matrices: real and not negative.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(s @ t).real, 0.0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * roots)
