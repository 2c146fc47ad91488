"""Scores of all runs, and what they say of each claim.

A claim is about the mean over seeds and people of a paired difference: variant minus FACT, the same
seed, person, caption and noise. It holds, or is refuted, where its p-value, corrected by Holm's
procedure for as many claims as are put to the test, is at most 0.05 and the difference lies on the
side that was expected, or on the other; else it is open. The interval told beside it is of the
difference alone, uncorrected: ``fact_jax.metrics.intervals.two_way_interval``.

In simulations of 3 seeds, 96 people and 24 claims, differences varying by 0.01 over seeds and by
0.12 over people, any false alarm comes in at most 5 % of experiments; a true difference of 0.05 is
found in half of them, one of 0.08 in 83 %, of 0.1 in 92 %.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fact_jax.metrics.intervals import Estimate, holm, two_way_interval, two_way_p
from fact_jax.utils.errors import UserError
from fact_train.lab.question import REFERENCE, Claim, Run

LEVEL = 0.05
Folder = Callable[[Run], Path]
Scores = Mapping[str, Float[np.ndarray, "s n"]]


class Verdict(NamedTuple):
    """What came of a claim; ``adjusted`` is its p-value after Holm's correction."""

    claim: Claim
    difference: Estimate
    adjusted: float
    word: str


def read_variant(
    runs: Sequence[Run], variant: str, folder: Folder, diverged: Collection[Run] = ()
) -> dict[str, np.ndarray]:
    """Each score of a variant by seed and person, NaN for a seed whose training diverged.

    UserError if seeds measured other people.
    """
    tables: list[list[dict]] = []
    people = None
    for run in (run for run in runs if run.variant == variant):
        if run in diverged:
            tables.append([])
            continue
        path = folder(run) / "pictures.jsonl"
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            here = [row["person"] for row in rows]
            tables.append([row["scores"] for row in rows])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: {error}; `fact-infer evaluate` writes it") from None
        if here != (people or here):
            raise UserError(f"{path}: other people than in the seed before")
        people = here
    names = {name for table in tables for row in table for name in row}
    count = len(people or ())
    tables = [table or [{}] * count for table in tables]
    return {
        name: np.array([[_number(row, name) for row in table] for table in tables], np.float64)
        for name in sorted(names)
    }


def _number(row: Mapping[str, float | None], name: str) -> float:
    value = row.get(name)
    return float("nan") if value is None else value


def seeds_of(values: Float[np.ndarray, "s n"]) -> Float[np.ndarray, "t n"]:
    """The seeds that came to something."""
    return values[~np.isnan(values).all(1)]


def difference(
    scores: Mapping[str, Scores], variant: str, measure: str
) -> Float[np.ndarray, "s n"]:
    """Variant minus FACT by seed and person; no rows where one of them has no such score."""
    own, reference = (scores[name].get(measure) for name in (variant, REFERENCE))
    if own is None or reference is None:
        return np.empty((0, 0))
    return seeds_of(own - reference)


def verdicts(claims: Sequence[Claim], scores: Mapping[str, Scores]) -> list[Verdict]:
    """One for each claim, corrected for their number."""
    differences = [difference(scores, claim.variant, claim.measure) for claim in claims]
    adjusted = holm([two_way_p(values) for values in differences])
    found = []
    for claim, values, p in zip(claims, differences, adjusted, strict=True):
        estimate = two_way_interval(values)
        word = "open"
        if not estimate.n:
            word = "not measured"
        elif p <= LEVEL:
            above = estimate.mean > 0
            word = "holds" if above == (claim.difference == "above") else "refuted"
        found.append(Verdict(claim, estimate, p, word))
    return found
