"""From numbers of each picture to estimates: what both inputs of an evaluation share.

A sample is what was measured on the pictures, one number a row; ``estimates`` takes means by
person, so that several pictures of one person count as one.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from fact_jax.metrics.copying import copied_part, followed_part
from fact_jax.metrics.identity import angle, copy_paste, cosine, rank_one
from fact_jax.metrics.intervals import (
    Estimate,
    mean_interval,
    paired_interval,
    person_means,
    ratio_interval,
    share_interval,
)


class Ratio(NamedTuple):
    """A ratio of means."""

    above: Float[np.ndarray, " n"]
    below: Float[np.ndarray, " n"]


class Copied(NamedTuple):
    """A property of pictures, of their reference photos, and of the base's pictures if any."""

    value: Float[np.ndarray, " n"]
    reference: Float[np.ndarray, " n"]
    base: Float[np.ndarray, " n"] | None


Sample = Estimate | Ratio | Copied | np.ndarray
Samples = dict[str, Sample]


def estimates(samples: Mapping[str, Sample], who: Int[np.ndarray, " n"]) -> dict[str, Estimate]:
    """Estimate of each sample; ``who`` is the person of each row (a shorter sample has the first).

    Truth values are shares, other arrays means.
    """
    return {key: _estimate(sample, who) for key, sample in samples.items()}


def _estimate(sample: Sample, who: Int[np.ndarray, " n"]) -> Estimate:
    if isinstance(sample, Estimate):
        return sample
    first = sample if isinstance(sample, np.ndarray) else sample[0]
    rows = who[: len(first)]
    once = len(np.unique(rows)) == len(rows)

    def by_person(values: np.ndarray) -> np.ndarray:
        return values if once else person_means(values, rows)

    if isinstance(sample, Ratio):
        return ratio_interval(by_person(sample.above), by_person(sample.below))
    if isinstance(sample, Copied):
        value, reference = by_person(sample.value), by_person(sample.reference)
        if sample.base is None:
            return paired_interval(followed_part, value, reference)
        return paired_interval(copied_part, value, reference, by_person(sample.base))
    if sample.dtype == bool and once:
        return share_interval(sample)
    return mean_interval(by_person(sample))


def identity_samples(
    found: Float[np.ndarray, "n k"],
    reference: Float[np.ndarray, "n k"],
    wrong: Float[np.ndarray, "n k"],
    gallery: Float[np.ndarray, "m k"],
    own: Int[np.ndarray, " n"],
    column: str,
    another: Float[np.ndarray, "n k"] | None = None,
) -> Samples:
    """Who is seen in pictures: similarities, rank-1, and the copy-paste score.

    ``reference``, ``wrong`` and ``another`` are the photos that each picture is compared with: its
    person's, the next person's, and one that the model did not see. ``own`` are the rows of
    ``gallery`` with each picture's person.
    """
    right, other = cosine(found, reference), cosine(found, wrong)
    samples: Samples = {
        f"reference/{column}": right,
        f"wrong/{column}": other,
        f"over_wrong/{column}": right - other,
        f"rank_one/{column}": rank_one(found, gallery, own),
    }
    if another is not None:
        samples[f"another/{column}"] = cosine(found, another)
        scores = copy_paste(
            angle(found, another), angle(found, reference), angle(another, reference)
        )
        samples[f"copy_paste/{column}"] = scores
    return samples


def expression_copied(
    found: Int[np.ndarray, " n"], reference: Int[np.ndarray, " n"], caption: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"] | Float[np.ndarray, " n"]:
    """Where the reference's expression is not the caption's: is it the picture's? Else NaN."""
    return np.where(reference != caption, (found == reference).astype(np.float64), np.nan)


def rows_of(samples: Mapping[str, Sample], column: str, count: int) -> list[dict[str, float]]:
    """What each picture of a column scored, by measure; what has no number is left out."""
    rows: list[dict[str, float]] = [{} for _ in range(count)]
    for key, sample in samples.items():
        name, _, own = key.rpartition("/")
        if own != column or not isinstance(sample, np.ndarray) or len(sample) != count:
            continue
        for row, value in zip(rows, sample.tolist(), strict=True):
            if value == value:  # not NaN
                row[name] = float(value)
    return rows
