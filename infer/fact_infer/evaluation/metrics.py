"""Metrics with their confidence intervals, and the table that shows them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.ndimage import binary_dilation

RESAMPLINGS = 10_000
INTERVALS = (
    f"95 % intervals: means by percentile bootstrap over people ({RESAMPLINGS:,} resamplings), "
    "shares by Wilson's formula"
)


class Estimate(NamedTuple):
    """An estimate with its 95 % confidence interval, from ``n`` people."""

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """As JSON holds it: what is not finite is null."""
        numbers = {key: getattr(self, key) for key in ("mean", "low", "high")}
        return {k: v if math.isfinite(v) else None for k, v in numbers.items()} | {"n": self.n}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Estimate":
        """Back from ``to_dict``."""
        mean, low, high = (
            math.nan if values[k] is None else values[k] for k in ("mean", "low", "high")
        )
        return cls(mean, low, high, values["n"])


def mean_interval(values: Float[np.ndarray, " n"]) -> Estimate:
    """The mean; people for whom there is no value (NaN) are left out of it and of ``n``."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return ratio_interval(values, np.ones_like(values))


def ratio_interval(
    numerators: Float[np.ndarray, " n"], denominators: Float[np.ndarray, " n"]
) -> Estimate:
    """Mean of the numerators over mean of the denominators, each pair from one person."""
    from scipy import stats  # takes a second, which other commands need not wait

    pairs = np.stack([numerators, denominators]).astype(np.float64)
    pairs = pairs[:, np.isfinite(pairs).all(0)]
    count = pairs.shape[1]
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(np.divide(*pairs.mean(1)))
        if count == 1:
            return Estimate(ratio, ratio, ratio, count)
        interval = stats.bootstrap(
            pairs,
            lambda above, below, axis: above.mean(axis) / below.mean(axis),
            n_resamples=RESAMPLINGS,
            paired=True,
            method="percentile",
            rng=np.random.default_rng(0),  # the same people are drawn for every measure
        ).confidence_interval
    return Estimate(ratio, float(interval.low), float(interval.high), count)


def share_interval(hits: Bool[np.ndarray, " n"]) -> Estimate:
    """The share of hits with Wilson's interval (1927), which holds near 0 and 1 too."""
    from scipy import stats

    found = stats.binomtest(int(np.sum(hits)), len(hits))
    interval = found.proportion_ci(method="wilson")
    return Estimate(float(np.mean(hits)), float(interval.low), float(interval.high), len(hits))


def cosine(
    a: Float[np.ndarray, "*batch k"], b: Float[np.ndarray, "*batch k"]
) -> Float[np.ndarray, "*batch"]:
    """Cosine of the angle between vectors; 0 where one of them is 0."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.sum(a * b, axis=-1) / np.where(lengths > 0, lengths, 1.0)


def rank_one(
    queries: Float[np.ndarray, "n k"], gallery: Float[np.ndarray, "n k"]
) -> Bool[np.ndarray, " n"]:
    """Is row i of the gallery more similar to query i than every other row? A tie is a miss."""
    similarity = cosine(queries[:, None], gallery[None])
    own = np.diagonal(similarity).copy()
    np.fill_diagonal(similarity, -np.inf)
    return own > similarity.max(1)


def dilate(masks: Bool[np.ndarray, "n h w"]) -> Bool[np.ndarray, "n h w"]:
    """Masks grown by one pixel to all eight sides."""
    return binary_dilation(masks, np.ones((1, 3, 3), bool))


def change(
    a: UInt8[np.ndarray, "n h w 3"],
    b: UInt8[np.ndarray, "n h w 3"],
    masks: Bool[np.ndarray, "n h w"],
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Mean absolute difference of two pictures, as a part of full scale: (inside, outside).

    NaN for a picture that has no pixel on that side.
    """
    difference = np.abs(a.astype(np.float64) - b.astype(np.float64)).mean(-1) / 255

    def mean(where: Bool[np.ndarray, "n h w"]) -> Float[np.ndarray, " n"]:
        count = where.sum((1, 2))
        return np.where(
            count > 0, (difference * where).sum((1, 2)) / np.maximum(count, 1), math.nan
        )

    return mean(masks), mean(~masks)


class Row(NamedTuple):
    """A line of the table; its cells are the measures ``<key>/fact``, ``/base`` and ``/true``."""

    key: str
    label: str
    share: bool = False


COLUMNS = {"fact": "FACT", "base": "base model", "true": "true photo"}
SECTIONS: dict[str, tuple[Row, ...]] = {
    "Identity (cosine of the independent recogniser's embeddings)": (
        Row("reference", "similarity to the reference photo"),
        Row("another", "similarity to another photo of the person"),
        Row("wrong", "similarity to the next person's reference photo"),
        Row("over_base", "FACT minus base model, to the reference"),
        Row("over_wrong", "right minus wrong person"),
        Row("rank_one", "rank-1: nearest of all people's other photos", share=True),
    ),
    "Change of pixels, FACT against base model (mean absolute, 1 = full scale)": (
        Row("head/inside", "inside the head"),
        Row("head/outside", "outside the head"),
        Row("head/ratio", "outside / inside the head"),
        Row("face/inside", "inside the face"),
        Row("face/outside", "outside the face"),
        Row("face/ratio", "outside / inside the face"),
    ),
    "Colours (mean absolute error over RGB, 1 = full scale)": (
        Row("hair", "hair"),
        Row("skin", "skin"),
    ),
    "Captions followed, by the parser": (
        Row("caption/expression", "expression", share=True),
        Row("caption/glasses", "glasses", share=True),
        Row("caption/shirt", "shirt", share=True),
        Row("caption/background", "background", share=True),
        Row("caption/pattern", "pattern", share=True),
        Row("caption/all", "mean of the five", share=True),
    ),
}


def cell(estimate: Estimate, share: bool) -> str:
    """``0.512 [0.480, 0.544]``, a share in percent."""
    if not estimate.n:
        return "-"
    if share:
        return "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * x for x in estimate[:3]))
    return "{:.3f} [{:.3f}, {:.3f}]".format(*estimate[:3])


def table(measures: Mapping[str, Estimate]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Section by section: its title, and its lines as label and one text a column."""
    sections = []
    for title, rows in SECTIONS.items():
        lines = []
        for row in rows:
            found = [measures.get(f"{row.key}/{column}") for column in COLUMNS]
            texts = ["" if one is None else cell(one, row.share) for one in found]
            lines.append((row.label, texts))
        sections.append((title, lines))
    return sections


def plain_table(measures: Mapping[str, Estimate], notes: Sequence[str]) -> str:
    """The table as text, with lines of explanation under it."""
    text = [f"{'':50s}" + "".join(f"{name:>23s}" for name in COLUMNS.values())]
    for title, lines in table(measures):
        text += ["", title]
        text += [f"  {label:48s}" + "".join(f"{c:>23s}" for c in cells) for label, cells in lines]
    return "\n".join([*text, "", *notes]).rstrip() + "\n"
