"""The laboratory's report: verdicts, table, differences from FACT, pictures."""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fact_jax.metrics.intervals import Estimate, two_way_interval
from fact_jax.utils.contact_sheet import contact_sheet
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write
from fact_train.lab.question import REFERENCE, Loaded, Run
from fact_train.lab.verdicts import (
    LEVEL,
    Folder,
    Scores,
    Verdict,
    read_variant,
    seeds_of,
    verdicts,
)

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
_MEASURES_TEXT = """\
Target photo: cosine similarity to a photo of the person that the adapter did not see; reference
photo: to the one it saw; right - wrong: to the reference photo, less that to another person's;
rank-1: found among all people by the target photo. Copy-paste (arXiv 2510.14975): above 0 where a
picture is nearer to the reference than to the target. Outside the head: mean change of pixels
against the base's picture of the same noise, as a part of full scale. FAIR (arXiv 2410.12312):
increment over features outside the head. Captions: attributes drawn as told. Hair, skin: mean
error of colour. More is better for likeness, rank-1 and captions, less for all others."""
_LIMITS = """
## What a miniature cannot tell

The people are drawn by a program, the base has a few million parameters, and its autoencoder loses
some of who is who. A verdict here is of the method in this world: that the code does what the
paper says, or where it does not. What needs photographs (skin, age, hair as it falls), a base that
knows many scenes, or many more steps than were trained here may come out otherwise at full size.
A claim that is open was not refuted: these seeds, steps and people do not tell.
"""


def write_report(
    questions: Sequence[Loaded],
    runs: Sequence[Run],
    folder: Folder,
    docs: Path,
    diverged: Collection[Run] = (),
) -> list[Path]:
    """Write ``docs`` and the pictures beside it; gives their paths."""
    scores = {name: read_variant(runs, name, folder, diverged) for name in _variants(runs)}
    measured = [run for run in runs if run not in diverged]
    if not measured:
        raise UserError("every training diverged: there is nothing to report")
    setup = json.loads((folder(measured[0]) / "evaluation.json").read_text())
    docs.parent.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Path] = {}
    for one in questions:
        shown = [run for run in measured if run.question in (REFERENCE, one.name)]
        if shown and (one.name != REFERENCE or len(questions) == 1):
            pictures[one.name] = docs.with_name(f"{docs.stem}-{one.name}.png")
            with atomic_write(pictures[one.name]) as path:
                Image.fromarray(_sheet(shown, folder)).save(path, format="PNG", optimize=True)
    names = {name: path.name for name, path in pictures.items()}
    text = report_text(questions, runs, scores, setup, names, diverged)
    with atomic_write(docs) as path:
        path.write_text(text, encoding="utf-8")
    return [docs, *pictures.values()]


def report_text(
    questions: Sequence[Loaded],
    runs: Sequence[Run],
    scores: Mapping[str, Scores],
    setup: Mapping[str, Any],
    pictures: Mapping[str, str],
    diverged: Collection[Run] = (),
) -> str:
    """The report as Markdown; ``pictures`` are names of files, by question."""
    seeds, config = len({run.seed for run in runs}), runs[0].config
    found = verdicts([claim for one in questions for claim in one.question.claims], scores)
    words = Counter(one.word for one in found)
    many = f"{len(found)} claim{'' if len(found) == 1 else 's'}"
    trained = len({repr(run.config) for run in runs if run.seed == 0})
    lines = [
        "# The laboratory",
        "",
        "Do the claims of papers about face adapters hold in a small world where the truth is "
        "known? Written by `fact-train lab`; questions and claims, below and in "
        "`train/fact_train/configs/lab/`, were written before the runs.",
        "",
        f"Of {many} " + ", ".join(_counted(words)) + ".",
        "",
        *_by_word(found),
        "## Set-up",
        "",
        f"- {len(scores)} configurations ({trained} trainings, the others differ in drawing only), "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'} each, {config.steps:,} steps of "
        f"{config.batch_size} portraits of {config.options.people:,} made-up people.",
        f"- Measured by `fact-infer evaluate` on {setup.get('people')} people whom nothing was "
        f"trained on: {setup.get('sampler')}, {setup.get('steps')} steps, the same captions and "
        "noise for all, by networks that no training saw.",
        "- A difference is variant minus FACT, seed by seed and person by person; its 95 % "
        "interval takes seeds and people as drawn at random (Student's t, Satterthwaite's degrees "
        "of freedom). A claim holds or is refuted where the p-value, after Holm's correction for "
        f"{many}, is at most {LEVEL:g}; else it is open.",
    ]
    if seeds == 1:
        lines.append("- **One seed only:** what another training would give is not in the numbers.")
    if diverged:
        names = ", ".join(run.key for run in diverged)
        lines.append(f"- Diverged (no finite updates any more) and left out: {names}.")
    lines += [
        "",
        "## Claims",
        "",
        "| claim | measure | expected | variant minus FACT | p, corrected | verdict |",
        "|---|---|---|---|---|---|",
        *(
            f"| {v.claim.source} | {v.claim.variant}: {MEASURES[v.claim.measure]} "
            f"| {v.claim.difference} 0 | {_cell(v.difference, sign=True)} | {_p(v.adjusted)} "
            f"| {v.word} |"
            for v in found
        ),
        *["", "## Measured", "", *_table(scores, lambda name, own: own[name], sign=False)],
        "",
        _MEASURES_TEXT,
        *["", "## Differences from FACT, the same people and noise", ""],
        *_table(
            {variant: own for variant, own in scores.items() if variant != REFERENCE},
            lambda name, own: own[name] - scores[REFERENCE][name],
            sign=True,
        ),
        *["", "## Questions", ""],
        "A row a person, the first ones, not chosen; the first seed of each configuration.",
        "",
    ]
    for one in questions:
        lines += [f"### {one.name}", "", one.text.replace("``", "`"), ""]
        lines += [
            f"- {v.claim.variant}, {MEASURES[v.claim.measure]}: **{v.word}** "
            f"({_cell(v.difference, sign=True)})"
            for v in found
            if v.claim in one.question.claims
        ]
        if one.name in pictures:
            title = f"{one.name}: reference, base, FACT, variants"
            lines += ["", f"![{title}]({pictures[one.name]})"]
        if lines[-1]:
            lines.append("")
    return "\n".join(lines).rstrip() + "\n" + _LIMITS


def _by_word(found: Sequence[Verdict]) -> list[str]:
    """Which claims came out how."""
    heads = {
        "holds": "Reproduced here",
        "refuted": "Came out the other way",
        "open": "Not told apart from nothing",
        "not measured": "Not measured",
    }
    claims = {word: [v.claim for v in found if v.word == word] for word in heads}
    return [
        f"- **{head}:** {'; '.join(f'{c.source} ({c.variant})' for c in claims[word])}."
        for word, head in heads.items()
        if claims[word]
    ] + [""]


def _counted(words: Mapping[str, int]) -> list[str]:
    kinds = ("holds", "refuted", "open", "not measured")
    verbs = {"holds": ("holds", "hold"), "not measured": ("was not measured",) * 2}
    usual = {kind: (f"is {kind}", f"are {kind}") for kind in kinds}
    return [f"{words.get(k, 0)} {(usual | verbs)[k][words.get(k, 0) != 1]}" for k in kinds[:3]] + [
        f"{words[k]} {verbs[k][0]}" for k in kinds[3:] if words.get(k)
    ]


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _table(
    scores: Mapping[str, Scores], values: Callable[[str, Scores], np.ndarray], *, sign: bool
) -> list[str]:
    names = [n for n in MEASURES if any(n in own for own in scores.values())]
    head = ["configuration", *(MEASURES[name] for name in names)]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for variant, own in scores.items():
        cells = [_cell(two_way_interval(seeds_of(values(name, own))), sign=sign) for name in names]
        rows.append(f"| {' | '.join([variant, *cells])} |")
    return rows


def _cell(estimate: Estimate, *, sign: bool) -> str:
    form = "{:+.3f} [{:+.3f}, {:+.3f}]" if sign else "{:.3f} [{:.3f}, {:.3f}]"
    return form.format(*estimate[:3]) if estimate.n else "-"


def _variants(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.variant for run in runs))


def _sheet(runs: Sequence[Run], folder: Folder) -> np.ndarray:
    """A row a person: reference photo, base, then every configuration's first seed."""
    columns: dict[str, np.ndarray] = {}
    for run in runs:
        if run.variant in columns:
            continue
        with np.load(folder(run) / "pictures.npz", allow_pickle=False) as held:
            if not columns:
                columns = {n: held[n][:SHOWN_PEOPLE] for n in ("reference", "base")}
            columns[run.variant] = held["fact"][:SHOWN_PEOPLE]
    tiles = np.stack([image for row in zip(*columns.values(), strict=True) for image in row])
    large = tiles.repeat(2, axis=1).repeat(2, axis=2) if tiles.shape[1] <= 64 else tiles
    return contact_sheet(large, len(columns), gap=4, titles=list(columns))
