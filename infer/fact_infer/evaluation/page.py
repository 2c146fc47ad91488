"""One HTML page of an evaluation: its table, and its pictures from worst to best."""

import base64
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fact_infer.evaluation.table import COLUMNS, table
from fact_jax.metrics.intervals import Estimate

SHOWN = 180
"""Of more pictures a third each of the worst, those in the middle, and the best."""
_SIDE = 192
STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #262a34; background: #f6f7f9; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
section { background: #fff; border: 1px solid #e3e6ec; border-radius: 12px;
  padding: 1.25rem 1.4rem; margin-top: 1.25rem; }
p { margin: .4rem 0; } .quiet { color: #6b7280; font-size: .9rem; }
img { max-width: 100%; border-radius: 6px; }
figure { margin: 0; } figcaption { color: #6b7280; font-size: .85rem; max-width: 17rem; }
.row { display: flex; flex-wrap: wrap; gap: 1.1rem; align-items: flex-start; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #eef0f4; }
th:first-child, td:first-child { text-align: left; }
tbody th { padding-top: 1rem; font-size: .9rem; color: #6b7280; font-weight: 600; }
"""
_ROWS_STYLE = """
.case { border-top: 1px solid #eef0f4; padding: .8rem 0; display: flex; gap: 1rem; }
.case .row { gap: .6rem; flex-wrap: nowrap; } .case img { display: block; max-width: none; }
.case figure { flex: none; }
.case .about { min-width: 15rem; font-size: .9rem; font-variant-numeric: tabular-nums; }
"""


class Case(NamedTuple):
    """A row of the page: pictures by what they are, read only if they are shown.

    ``score`` is what rows are sorted by (None comes first), ``about`` lines of text beside it.
    """

    pictures: Mapping[str, Callable[[], UInt8[np.ndarray, "h w 3"]]]
    score: float | None
    about: Sequence[str]


def write_page(
    title: str,
    summary: str,
    measures: Mapping[str, Estimate],
    cases: Sequence[Case],
    *,
    sorted_by: str,
    notes: Sequence[str] = (),
    columns: Mapping[str, str] = COLUMNS,
) -> str:
    """The page as HTML; everything is inside it, nothing is loaded from elsewhere."""
    ranked = sorted(cases, key=lambda case: -math.inf if case.score is None else case.score)
    chosen = _chosen(len(ranked))
    rows = "".join(_row(ranked[i], i + 1, len(ranked)) for i in chosen)
    left_out = len(ranked) - len(chosen)
    shown = f"{len(ranked)} pictures, sorted by {sorted_by}, the worst first."
    if left_out:
        shown += f" {left_out} in between are not shown."
    said = "".join(f'<p class="quiet">{html.escape(note)}</p>' for note in notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{_ROWS_STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(summary)}</p>"
        f"<section><h2>Measured</h2>{html_table(measures, columns)}{said}</section>"
        f'<section><h2>From worst to best</h2><p class="quiet">{html.escape(shown)}</p>{rows}'
        "</section></main></body></html>\n"
    )


def html_table(measures: Mapping[str, Estimate], columns: Mapping[str, str] = COLUMNS) -> str:
    """The table of ``fact_infer.evaluation.table`` as HTML."""
    lines = []
    for title, rows in table(measures, columns):
        lines.append(f'<tr><th colspan="{len(columns) + 1}">{html.escape(title)}</th></tr>')
        for label, cells in rows:
            tds = "".join(f"<td>{html.escape(text)}</td>" for text in cells)
            lines.append(f"<tr><td>{html.escape(label)}</td>{tds}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns.values()))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _chosen(count: int) -> list[int]:
    if count <= SHOWN:
        return list(range(count))
    third = SHOWN // 3
    middle = (count - third) // 2
    return [*range(third), *range(middle, middle + third), *range(count - third, count)]


def _row(case: Case, place: int, count: int) -> str:
    pictures = "".join(
        f"<figure>{_image(read(), name)}<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, read in case.pictures.items()
    )
    score = "no face found" if case.score is None else f"{case.score:.3f}"
    about = "".join(f"<p>{html.escape(line)}</p>" for line in case.about)
    return (
        f'<div class="case"><div class="row">{pictures}</div><div class="about">'
        f"<p><b>{score}</b> ({place} of {count})</p>{about}</div></div>"
    )


def _image(pixels: UInt8[np.ndarray, "h w 3"], name: str) -> str:
    picture = Image.fromarray(pixels)
    small = max(picture.size) <= _SIDE
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if small:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        picture.save(buffer, format="JPEG", quality=88)
    kind = "png" if small else "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode()
    width = max(picture.width, 128) if small else picture.width
    return f'<img src="data:image/{kind};base64,{data}" width="{width}" alt="{html.escape(name)}">'
