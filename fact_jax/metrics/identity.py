"""Who is in a picture: similarities, the copy-paste score, rank-1, matching, verification.

Embeddings are rows; a row of NaN stands for a face that was not found.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

Numbers = Any
"""An array, or the scalar that NumPy gives where no axis is left."""


def cosine(a: Float[np.ndarray, "*#batch k"], b: Float[np.ndarray, "*#batch k"]) -> Numbers:
    """Cosine of the angle between vectors; 0 where one of them is 0."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.sum(a * b, axis=-1) / np.where(lengths > 0, lengths, 1.0)


def angle(a: Float[np.ndarray, "*#batch k"], b: Float[np.ndarray, "*#batch k"]) -> Numbers:
    """Angle between vectors in radians, 0 to pi; exact near 0, where an arc cosine is not.

    2 atan2(|u - v|, |u + v|) of the unit vectors (Kahan, "How futile are mindless assessments of
    roundoff", 2006, section 12).
    """
    u, v = (unit(np.asarray(x, np.float64)) for x in (a, b))
    return 2 * np.arctan2(np.linalg.norm(u - v, axis=-1), np.linalg.norm(u + v, axis=-1))


def unit(x: Float[np.ndarray, "*batch k"]) -> Float[np.ndarray, "*batch k"]:
    """Vectors of length 1; 0 stays 0."""
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(lengths > 0, lengths, 1.0)


def average_recognisers(
    embeddings: Sequence[Float[np.ndarray, "*batch _"]],
) -> Float[np.ndarray, "*batch k"]:
    """One embedding from those of several recognisers, whose cosine is the mean of their cosines.

    Unit vectors side by side over the root of their number: products of such rows are the mean.
    """
    return np.concatenate([unit(e) for e in embeddings], axis=-1) / np.sqrt(len(embeddings))


def copy_paste(
    to_target: Numbers,
    to_reference: Numbers,
    between: Numbers,
    eps: float = 1e-6,
) -> Numbers:
    """Copy-paste score of MultiID-Bench (WithAnyone, arXiv 2510.14975), from angles in radians.

    (angle(picture, target) - angle(picture, reference)) / max(angle(target, reference), eps): 1
    for a copy of the reference photo, -1 for the target photo itself, 0 as near to both.
    """
    return (to_target - to_reference) / np.maximum(between, eps)


def rank_one(
    queries: Float[np.ndarray, "n k"],
    gallery: Float[np.ndarray, "m k"],
    own: Int[np.ndarray, " n"] | None = None,
) -> Bool[np.ndarray, " n"]:
    """Is a query's own row of the gallery more similar to it than every other? A tie is a miss.

    ``own`` are the numbers of these rows (row i for query i). A query of NaN is a miss.
    """
    own = np.arange(len(queries)) if own is None else own
    similarity = cosine(queries[:, None], gallery[None])
    rows = np.arange(len(queries))
    right = similarity[rows, own].copy()
    similarity[rows, own] = -np.inf
    return right > np.where(np.isnan(similarity), -np.inf, similarity).max(1)


def assign_faces(similarity: Float[np.ndarray, "people faces"]) -> Int[np.ndarray, " people"]:
    """Which face of a picture is whose: the assignment of the greatest sum of similarities.

    -1 for people for whom no face is left. scipy's ``linear_sum_assignment`` (Crouse, 2016).
    """
    from scipy.optimize import linear_sum_assignment

    found = np.full(len(similarity), -1)
    people, faces = linear_sum_assignment(similarity, maximize=True)
    found[people] = faces
    return found


def verification_auc(embeddings: Float[np.ndarray, "n k"], people: Int[np.ndarray, " n"]) -> float:
    """Area under the ROC curve of "the same person?" by cosine, over all pairs of photos.

    The probability that a pair of one person is more similar than a pair of two, ties half: the
    Mann-Whitney statistic over its maximum (Hanley and McNeil, 1982). NaN without both kinds.
    """
    from scipy.stats import rankdata

    u = unit(np.asarray(embeddings, np.float64))
    first, second = np.triu_indices(len(u), 1)
    same = people[first] == people[second]
    right, wrong = int(same.sum()), int((~same).sum())
    ranks = rankdata((u @ u.T)[first, second])
    with np.errstate(invalid="ignore", divide="ignore"):
        above = ranks[same].sum() - right * (right + 1) / 2
        return float(np.float64(above) / np.float64(right * wrong))
