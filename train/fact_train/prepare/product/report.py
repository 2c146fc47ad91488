"""``fact-train data report``: one page about a set, which opens offline."""

import base64
import html
import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from fact_jax.face import draw_face
from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write, recover
from fact_train.data.dataset_files import shard_name, shard_reader
from fact_train.data.records import decode
from fact_train.prepare.product.curate import open_product
from fact_train.prepare.product.dataset import FOLDER, REJECTED, SUSPECTS, about_name
from fact_train.prepare.store import Store

_MEASURES = {
    "face": "face size, px",
    "sharpness": "sharpness (variance of the Laplacian)",
    "clipped": "share of clipped pixels",
    "quality": "quality score",
    "yaw": "yaw, degrees",
    "pitch": "pitch, degrees",
    "roll": "roll, degrees",
}
_SIDE, _BINS, _MOST_SUSPECTS, _MOST_REJECTED = 160, 24, 30, 12
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #3b6ea5; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
tr { border-bottom: 1px solid var(--line) } td.n { text-align: right }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)) }
.small { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)) }
figure { margin: 0 } figure img { max-width: 100%; vertical-align: top; image-rendering: auto }
figcaption { font-size: 12px; overflow-wrap: anywhere } svg rect { fill: var(--bar) }
svg text { font: 11px system-ui, sans-serif; fill: currentColor } .alarm { color: #c22 }
"""


def write_report(folder: Path, photos: int = 24) -> Path:
    """Write ``report.html`` into a built set; gives its path. UserError if there is no set."""
    summary = open_product(folder)
    found = _Lines(folder, summary, photos)
    parts = [
        f"<h1>{html.escape(str(folder.resolve().name))}</h1>",
        _counts(summary),
        "<h2>Photos</h2><p>Each with its points, the outline of the head, and the crop that the "
        "face encoder sees.</p>",
        _grid((_figure(folder, summary, *one) for one in found.sample), ""),
        "<h2>Histograms</h2>",
        _grid((_histogram(title, values) for title, values in found.histograms()), ""),
        *_rejected(folder, summary),
        *_suspects(folder, summary, found),
    ]
    title = f"Records of {html.escape(folder.resolve().name)}"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        + "\n".join(parts)
        + "</html>\n"
    )
    path = folder / "report.html"
    recover(path)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


class _Lines:
    """What the page takes from the lines about all records, read once."""

    def __init__(self, folder: Path, summary: dict, photos: int):
        store = Store(str(folder))
        self._values: dict[str, list[float]] = defaultdict(list)
        self._people: Counter[str] = Counter()
        self.where: dict[str, tuple[str, int, int, dict]] = {}
        self.sample: list[tuple[str, int, int, dict]] = []
        wanted = {
            name
            for _, line in zip(range(_MOST_SUSPECTS), store.lines(SUSPECTS), strict=False)
            for name in line["photos"]
        }
        step = max(1, summary["records"] // max(1, photos))
        number = 0
        for split, about in summary["splits"].items():
            for shard in range(about["shards"]):
                for row, line in enumerate(store.lines(about_name(split, shard))):
                    for key in _MEASURES:
                        if key in line:
                            self._values[key].append(line[key])
                    self._people[line["identity"]] += 1
                    if number % step == 0 and len(self.sample) < photos:
                        self.sample.append((split, shard, row, line))
                    if line["name"] in wanted:
                        self.where[line["name"]] = (split, shard, row, line)
                    number += 1

    def histograms(self) -> Iterator[tuple[str, Sequence[float]]]:
        for key, title in _MEASURES.items():
            if self._values[key]:
                yield title, self._values[key]
        yield "photos a person", list(self._people.values())


def _counts(summary: dict[str, Any]) -> str:
    rows = {
        "photos in": summary["in"],
        "records": summary["records"],
        "rejected": summary["rejected"],
        "people": summary["people"],
        **{f"split {name}": about["records"] for name, about in summary["splits"].items()},
        **{f"to look at: {kind}": count for kind, count in summary["suspects"].items()},
        "alarms (one face in two splits)": summary["alarms"],
        **{f"shape: {name}": count for name, count in summary.get("shapes", {}).items()},
        **{f"licence: {name}": count for name, count in summary["licences"].items()},
        **{f"made by {name}": count for name, count in summary["made_by"].items()},
    }
    cells = (
        f'<tr><td>{html.escape(name)}</td><td class="n">{count:,}</td></tr>'
        for name, count in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def _grid(figures: Iterator[str], kind: str) -> str:
    return f'<div class="grid {kind}">{"".join(figures)}</div>'


def _pictures(folder: Path, summary: dict, split: str, shard: int, row: int) -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    shards = summary["splits"][split]["shards"]
    path = folder / FOLDER / shard_name(shard, shards, split)
    try:
        reader = shard_reader(path)
        example = tf_example_pb2.Example.FromString(reader.read([row])[0])
        reader.close()
    except (ValueError, RuntimeError, IndexError, OSError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
    return example.features.feature


def _figure(folder: Path, summary: dict, split: str, shard: int, row: int, line: dict) -> str:
    found = _pictures(folder, summary, split, shard, row)
    photo, mask, crop = (
        decode(found[name].bytes_list.value[0]) for name in ("photo", "head_mask", "crop")
    )
    points = np.asarray(found["points"].float_list.value, np.float32).reshape(5, 2)
    head = mask.reshape(mask.shape[:2]) / np.float32(255)
    marked = draw_face(photo, points, head)
    parts = [_small(one) for one in (marked, crop)]
    told = [f"{key} {line[key]:.3g}" for key in _MEASURES if key in line]
    text = html.escape(f"{line['identity']} · {line['name']} · {', '.join(told)}")
    return (
        f"<figure>{''.join(map(_image, parts))}<figcaption>{text}<br>"
        f"<em>{html.escape(found['caption'].bytes_list.value[0].decode())}</em></figcaption></figure>"
    )


def _small(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    small = ImageOps.contain(picture, (_SIDE, _SIDE), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def _image(jpeg: str) -> str:
    return f'<img alt="" src="data:image/jpeg;base64,{html.escape(jpeg)}"> '


def _histogram(title: str, values: Sequence[float]) -> str:
    numbers: Float[np.ndarray, " n"] = np.asarray(values, np.float64)
    whole = bool((numbers == np.rint(numbers)).all()) and np.ptp(numbers) < _BINS
    edges: Any = np.arange(numbers.min(), numbers.max() + 2) - 0.5 if whole else _BINS
    counts, edges = np.histogram(numbers, edges)
    width, height = 300 / len(counts), 110
    bars = "".join(
        f'<rect x="{i * width + 1:.1f}" y="{height - bar:.1f}" width="{max(width - 2, 1):.1f}" '
        f'height="{bar:.1f}"><title>{edges[i]:.4g} to {edges[i + 1]:.4g}: {count:,}</title></rect>'
        for i, count in enumerate(counts)
        for bar in (100 * count / max(counts.max(), 1),)
    )
    low, middle, high = (f"{value:.3g}" for value in np.percentile(numbers, (0, 50, 100)))
    return (
        f'<figure><svg viewBox="0 0 300 128" role="img" aria-label="{html.escape(title)}">{bars}'
        f'<text x="0" y="124">{low}</text><text x="300" y="124" text-anchor="end">{high}</text>'
        f'<text x="150" y="124" text-anchor="middle">median {middle}</text></svg>'
        f"<figcaption>{html.escape(title)}, {len(numbers):,} values</figcaption></figure>"
    )


def _rejected(folder: Path, summary: dict) -> Iterator[str]:
    if not summary["rejected"]:
        return
    shown: dict[str, list[dict]] = defaultdict(list)
    for line in Store(str(folder)).lines(REJECTED):
        some = shown[line["reason"]]
        # Those with a picture first, as far as there are any.
        if len(some) < _MOST_REJECTED or ("thumbnail" in line and "thumbnail" not in some[-1]):
            some.insert(0 if "thumbnail" in line else len(some), line)
            del some[_MOST_REJECTED:]
    yield "<h2>Rejected</h2>"
    for reason, count in summary["reasons"].items():
        yield f"<h3>{html.escape(reason)}: {count:,}</h3>"
        yield _grid(
            (
                f"<figure>{_image(line['thumbnail']) if 'thumbnail' in line else ''}"
                f"<figcaption>{html.escape(line['detail'])}</figcaption></figure>"
                for line in shown[reason]
            ),
            "small",
        )


def _suspects(folder: Path, summary: dict, found: _Lines) -> Iterator[str]:
    lines = Store(str(folder)).lines(SUSPECTS)
    some = [line for _, line in zip(range(_MOST_SUSPECTS), lines, strict=False)]
    if not some:
        return
    yield f"<h2>Copies and mixed-up people: the first {len(some)}</h2>"

    def figures() -> Iterator[str]:
        for line in some:
            pictures = [
                _image(_small(decode(features["photo"].bytes_list.value[0])))
                for name in line["photos"]
                if name in found.where
                for features in (_pictures(folder, summary, *found.where[name][:3]),)
            ]
            cosine = f", cosine {line['cosine']}" if "cosine" in line else ""
            alarm = (
                f' <b class="alarm">in {html.escape(" and ".join(line["splits"]))}</b>'
                if line["alarm"]
                else ""
            )
            text = html.escape(f"{line['kind']}{cosine}: {', '.join(line['photos'])}")
            yield f"<figure>{''.join(pictures)}<figcaption>{text}{alarm}</figcaption></figure>"

    yield _grid(figures(), "")
