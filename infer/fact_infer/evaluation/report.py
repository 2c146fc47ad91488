"""HTML report of a training, its evaluation and its pictures."""

import contextlib
import dataclasses
import html
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fact_convert.io.weight_files import read_file
from fact_convert.models.adapter import read_metadata
from fact_infer.evaluation.figures import (
    AMPLIFY,
    CHART_STYLE,
    Series,
    data_uri,
    difference,
    enlarge,
    svg_curves,
)
from fact_infer.evaluation.page import STYLE, html_table
from fact_infer.evaluation.world import summary_line
from fact_jax.face import ASTRONAUT_POINTS, draw_face, prepare_photo, read_image
from fact_jax.metrics.intervals import Estimate
from fact_jax.utils.contact_sheet import contact_sheet
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import create

GRID_PEOPLE = 6
_BEFORE, _NOW = "#a9b1c0", "#2f6fdb"
_CHARTS = {
    "loss/mse": "Denoising error (mean squared)",
    "loss/fair": "FAIR: the adapter's increment outside the head, relative",
    "curriculum/shuffle": "Curriculum: how often the photo is another one of the person",
    "curriculum/fair_weight": "Curriculum: weight of FAIR in the loss",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportSources:
    """What a report is made of; ``fact-infer report --help`` says what each is."""

    training: Path
    evaluation: Path
    before: Path | None = None
    flax: Path | None = None
    torch: Path | None = None
    stages: Path | None = None
    photo: Path | None = None
    points: Path | None = None


def write_report(sources: ReportSources, out: Path) -> list[Path]:
    """Write ``grid.png`` and ``report.html``; gives their paths. UserError names what is absent.

    Names that are taken get a number.
    """
    with _written_by("fact-infer evaluate", sources.evaluation / "pictures.npz") as path:
        grid, captions = _grid(path)
    with _written_by("fact-infer evaluate", sources.evaluation / "evaluation.json") as path:
        evaluation = _read_json(path)
        people, measured = _grid_section(grid, captions, evaluation), _table_section(evaluation)
    with _written_by("fact-train run", sources.training / "config.json") as path:
        training = _training_section(sources, _read_json(path))
    stages = ""
    if sources.stages is not None:
        with _written_by("demo.py", sources.stages) as path:
            stages = _stages_section(path)
    sections = [
        ("People whom nothing was trained on", people),
        ("Measured", measured),
        ("Training", training),
        ("The same request in JAX and in PyTorch", _backends_section(sources.flax, sources.torch)),
        ("From a photo to what the face encoder sees", _face_section(sources)),
        ("What each stage took", stages),
    ]
    picture, page = Image.fromarray(grid), _page(sections)
    return [
        create(out / "grid.png", lambda path: picture.save(path, format="PNG", optimize=True)),
        create(out / "report.html", lambda path: path.write_text(page, encoding="utf-8")),
    ]


@contextlib.contextmanager
def _written_by(program: str, path: Path) -> Iterator[Path]:
    """While what ``path`` holds is used: UserError if that is not what the program writes there."""
    try:
        yield path
    except (
        *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
        *(EOFError, OSError, zipfile.BadZipFile, zlib.error),
    ) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path}: {error.strerror}; it is written by `{program}`") from None
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: not what `{program}` writes ({why}): run it again") from error


def _page(sections: list[tuple[str, str]]) -> str:
    body = "\n".join(
        f"<section><h2>{html.escape(title)}</h2>\n{text}</section>"
        for title, text in sections
        if text
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>FACT-JAX report</title>'
        f"<style>{STYLE}{CHART_STYLE}</style></head>\n<body><main>"
        "<h1>FACT-JAX: a face adapter, from training to picture</h1>\n"
        "<p>A face adapter (FACT, arXiv 2410.12312) on the miniature base model, in a "
        "world of drawn portraits: one photo in, the same person in a new picture out.</p>\n"
        f"{body}\n</main></body></html>\n"
    )


def _grid(path: Path) -> tuple[np.ndarray, dict[int, str]]:
    """The grid of the first people, and by their numbers what the pictures were to show."""
    with np.load(path) as held:
        names = ("ids", "captions", "reference", "base", "fact")
        arrays = {name: held[name][:GRID_PEOPLE] for name in names}
    columns = {
        "reference photo": arrays["reference"],
        "base model": arrays["base"],
        "FACT": arrays["fact"],
        f"difference x {AMPLIFY}": difference(arrays["fact"], arrays["base"]),
    }
    captions = dict(zip(arrays["ids"].tolist(), arrays["captions"].tolist(), strict=True))
    tiles = [enlarge(image, 3) for row in zip(*columns.values(), strict=True) for image in row]
    labels = [f"person\n{number}" for number in captions]
    grid = contact_sheet(np.stack(tiles), len(columns), gap=6, titles=list(columns), labels=labels)
    return grid, captions


def _grid_section(grid: np.ndarray, captions: dict[int, str], evaluation: dict[str, Any]) -> str:
    lines = "".join(f"<br>{number}: {html.escape(text)}" for number, text in captions.items())
    return (
        f'{_image(grid, "grid")}<p class="quiet">The first {len(captions)} of '
        f"{evaluation['people']} people, not chosen. Base model and FACT draw the same caption "
        "from the same noise; FACT sees the reference photo too. The caption says nothing of the "
        f"person. The difference of the two is shown {AMPLIFY} times as strong as it is. "
        f"The captions:{lines}</p>"
    )


def _table_section(evaluation: dict[str, Any]) -> str:
    measures = {k: Estimate.from_dict(v) for k, v in evaluation["measures"].items()}
    notes = "".join(f"<p class='quiet'>{html.escape(note)}</p>" for note in evaluation["notes"])
    return f"<p>{html.escape(summary_line(evaluation))}</p>{html_table(measures)}{notes}"


def _training_section(sources: ReportSources, config: dict[str, Any]) -> str:
    rows = read_metrics(sources.training / "metrics.jsonl")
    last = rows[-1]["step"] if rows else 0
    weights = config.get("options.weights")
    origin = f"It went on from {weights}{_step_of(weights)}." if weights else "It began at nothing."
    text = (
        f"<p>{last:,} steps of {config['batch_size']} portraits, {config.get('options.people')} "
        f"people. {html.escape(origin)}</p>"
    )
    before = read_metrics(sources.before) if weights and sources.before else []
    shift = before[-1]["step"] if before else 0
    charts = []
    for name, title in _CHARTS.items():
        series = [
            _series("the run it went on from", _BEFORE, before, name, 0),
            _series("this run" if before else "", _NOW, rows, name, shift),
        ]
        charts.append(svg_curves(title, series))
    return f'{text}<div class="charts">{"".join(charts)}</div>'


def _step_of(adapter: str) -> str:
    path = Path(adapter)
    if not path.is_file():
        return ""
    _, said = read_file(path)
    step = read_metadata(said, path).get("step")
    return f", trained for {step:,} steps before" if isinstance(step, int) else ""


def _series(label: str, colour: str, rows: list[dict], name: str, shift: int) -> Series:
    numbers = (row for row in rows if isinstance(row.get(name), int | float))
    return Series(label, colour, [(row["step"] + shift, row[name]) for row in numbers])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; what is none, as a half-written last line, is left out."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it is written by `fact-train run`") from None
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def _backends_section(flax: Path | None, torch: Path | None) -> str:
    if flax is None or torch is None:
        return ""
    shown, largest, total, count = [], 0, 0.0, 0
    for name, one, other in _pairs(flax, torch):
        apart = np.abs(one.astype(np.int32) - other.astype(np.int32))
        largest, total, count = max(largest, int(apart.max())), total + apart.mean(), count + 1
        both = np.concatenate([one, other], axis=1)
        shown.append(_figure(enlarge(both, 2), f"{name}: JAX left, PyTorch right"))
    return (
        f"<p>Pictures drawn by both backends from the same noise ({count}): they differ by at "
        f"most {largest} of 255 levels, by {total / count:.4f} on average.</p>"
        f'<div class="row">{"".join(shown)}</div>'
    )


def _pairs(flax: Path, torch: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The pictures of two folders that have the same names."""
    names = sorted(path.relative_to(flax) for path in flax.rglob("*.png"))
    if not names:
        raise UserError(f"{flax}: no pictures in it; `fact-infer generate` writes them")
    for name in names:
        one, other = read_image(flax / name), read_image(torch / name)
        if one.shape != other.shape:
            raise UserError(f"{flax / name} and {torch / name} are not of one size")
        yield str(name.with_suffix("")), one, other


def _face_section(sources: ReportSources) -> str:
    if sources.photo is None:
        what = "scikit-image's astronaut photo"
        with tempfile.TemporaryDirectory() as folder:
            found = prepare_photo(_astronaut(Path(folder)), points_file=ASTRONAUT_POINTS)
            text = "; ".join(found.notes).replace(f"{folder}{os.sep}", "")
    else:
        what = "The photo"
        found = prepare_photo(sources.photo, points_file=sources.points)
        text = "; ".join(found.notes)
    marked = draw_face(found.image, found.points, found.mask)
    return (
        f'<div class="row">{_figure(marked, f"{what} with five points and head mask", 300)}'
        f"{_figure(enlarge(found.crop, 2), 'The aligned crop, 112 x 112, background blanked')}"
        f'</div><p class="quiet">{html.escape(text)}</p>'
    )


def _astronaut(folder: Path) -> Path:
    try:
        from skimage.data import astronaut
    except ImportError:
        raise UserError(
            "the report's example photo comes with scikit-image: pip install scikit-image, "
            "or give --photo and --points"
        ) from None
    Image.fromarray(astronaut()).save(folder / "astronaut.png")
    return folder / "astronaut.png"


def _stages_section(path: Path) -> str:
    seconds = {name: stage["seconds"] for name, stage in _read_json(path).items()}
    seconds["together, without this report"] = sum(seconds.values())
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{value:.0f} s</td></tr>"
        for name, value in seconds.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _read_json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def _image(pixels: np.ndarray, name: str, width: int | None = None) -> str:
    size = f' width="{width}"' if width else ""
    return f'<img src="{data_uri(pixels)}" alt="{html.escape(name)}"{size}>'


def _figure(pixels: np.ndarray, caption: str, width: int | None = None) -> str:
    text = html.escape(caption)
    return f"<figure>{_image(pixels, caption, width)}<figcaption>{text}</figcaption></figure>"
