"""The laboratory's report: verdicts, table, differences from FACT, pictures."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from fact_jax.metrics.intervals import Estimate, two_way_interval
from fact_jax.utils.contact_sheet import contact_sheet
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write
from fact_train.lab.question import REFERENCE, Claim, Loaded, Run

MEASURES = {
    "another": "target photo",
    "reference": "reference photo",
    "over_wrong": "right - wrong",
    "rank_one": "rank-1",
    "copy_paste": "copy-paste",
    "head/outside": "outside the head",
    "fair": "FAIR",
    "caption/all": "captions",
    "hair": "hair error",
    "skin": "skin error",
}
SHOWN_PEOPLE = 4
_LIMITS = """
## What a miniature cannot tell

The people are drawn by a program, the base has a few million parameters, and its autoencoder loses
some of who is who. A verdict here is of the method in this world: that the code does what the
paper says, or where it does not. What needs photographs (skin, age, hair as it falls), a base that
knows many scenes, or many more steps than were trained here may come out otherwise at full size.
A claim that is open was not refuted: these seeds, steps and people do not tell.
"""

Folder = Callable[[Run], Path]
Scores = Mapping[str, Float[np.ndarray, "s n"]]


class Verdict(NamedTuple):
    """What came of a claim."""

    claim: Claim
    difference: Estimate
    word: str


def write_report(
    questions: Sequence[Loaded], runs: Sequence[Run], folder: Folder, docs: Path
) -> list[Path]:
    """Write ``docs`` and the pictures beside it; gives their paths."""
    scores = {variant: read_variant(runs, variant, folder) for variant in _variants(runs)}
    picture = docs.with_suffix(".png")
    text = report_text(questions, runs, scores, _setup(runs[0], folder), picture.name)
    sheet = Image.fromarray(_sheet(runs, folder))
    with atomic_write(picture) as path:
        sheet.save(path, format="PNG", optimize=True)
    with atomic_write(docs) as path:
        path.write_text(text, encoding="utf-8")
    return [docs, picture]


def read_variant(runs: Sequence[Run], variant: str, folder: Folder) -> dict[str, np.ndarray]:
    """Each score of a variant by seed and person; UserError if seeds measured other people."""
    tables, people = [], None
    for run in (run for run in runs if run.variant == variant):
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
    return {
        name: np.array([[row.get(name, np.nan) for row in table] for table in tables], np.float64)
        for name in sorted(names)
    }


def verdict(claim: Claim, scores: Mapping[str, Scores]) -> Verdict:
    """Holds, refuted or open, by the interval of variant minus FACT over seeds and people."""
    difference = two_way_interval(
        scores[claim.variant][claim.measure] - scores[REFERENCE][claim.measure]
    )
    sides = {"above": difference.low > 0, "below": difference.high < 0}
    other = "below" if claim.difference == "above" else "above"
    word = "holds" if sides[claim.difference] else "refuted" if sides[other] else "open"
    return Verdict(claim, difference, word)


def report_text(
    questions: Sequence[Loaded],
    runs: Sequence[Run],
    scores: Mapping[str, Scores],
    setup: Mapping[str, Any],
    picture: str,
) -> str:
    """The report as Markdown."""
    seeds, steps = len({run.seed for run in runs}), runs[0].config.steps
    verdicts = [verdict(claim, scores) for one in questions for claim in one.question.claims]
    lines = [
        "# The laboratory",
        "",
        "Written by `fact-train lab`; questions and claims were written before the runs and stand "
        "in `train/fact_train/configs/lab/`. "
        f"{len(scores)} configurations, {seeds} seed(s) each, {steps:,} steps of "
        f"{runs[0].config.batch_size} portraits, {runs[0].config.options.people:,} people. "
        f"Measured by `fact-infer evaluate` on {setup.get('people')} people whom nothing was "
        f"trained on, {setup.get('sampler')} {setup.get('steps')} steps, all from the same noise. "
        "95 % intervals by bootstrap over seeds and people.",
        "",
        "## Claims",
        "",
        "| claim | measure | expected | variant minus FACT | verdict |",
        "|---|---|---|---|---|",
        *(
            f"| {v.claim.source} | {v.claim.variant}: {MEASURES[v.claim.measure]} "
            f"| {v.claim.difference} 0 | {_cell(v.difference, sign=True)} | {v.word} |"
            for v in verdicts
        ),
        *["", "## Measured", "", *_table(scores, lambda name, own: own[name], sign=False)],
        *["", "## Differences from FACT, the same people and noise", ""],
        *_table(
            {variant: own for variant, own in scores.items() if variant != REFERENCE},
            lambda name, own: own[name] - scores[REFERENCE][name],
            sign=True,
        ),
        *["", "## Pictures", "", f"![Reference, base and all configurations]({picture})", ""],
        "The first people, not chosen; seed 0.",
        *["", "## Questions", ""],
    ]
    for one in questions:
        lines += [f"### {one.name}", "", one.text, ""]
    return "\n".join(lines).rstrip() + "\n" + _LIMITS


def _table(
    scores: Mapping[str, Scores], values: Callable[[str, Scores], np.ndarray], *, sign: bool
) -> list[str]:
    names = [n for n in MEASURES if all(n in own for own in scores.values())]
    head = ["configuration", *(MEASURES[name] for name in names)]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for variant, own in scores.items():
        cells = [_cell(two_way_interval(values(name, own)), sign=sign) for name in names]
        rows.append(f"| {' | '.join([variant, *cells])} |")
    return rows


def _cell(estimate: Estimate, *, sign: bool) -> str:
    form = "{:+.3f} [{:+.3f}, {:+.3f}]" if sign else "{:.3f} [{:.3f}, {:.3f}]"
    return form.format(*estimate[:3]) if estimate.n else "-"


def _variants(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.variant for run in runs))


def _setup(run: Run, folder: Folder) -> dict[str, Any]:
    return json.loads((folder(run) / "evaluation.json").read_text())


def _sheet(runs: Sequence[Run], folder: Folder) -> np.ndarray:
    """A row a person: reference photo, base, then every configuration of seed 0."""
    columns: dict[str, np.ndarray] = {}
    for run in (run for run in runs if run.seed == 0):
        with np.load(folder(run) / "pictures.npz", allow_pickle=False) as held:
            if not columns:
                columns = {n: held[n][:SHOWN_PEOPLE] for n in ("reference", "base")}
            columns[run.variant] = held["fact"][:SHOWN_PEOPLE]
    tiles = np.stack([image for row in zip(*columns.values(), strict=True) for image in row])
    large = tiles.repeat(2, axis=1).repeat(2, axis=2) if tiles.shape[1] <= 64 else tiles
    return contact_sheet(large, len(columns), gap=4, titles=list(columns))
