"""Figures of reports: differences of pictures, curves as SVG, images inside HTML."""

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

AMPLIFY = 3
"""How much stronger differences are shown than they are."""


def difference(
    a: UInt8[np.ndarray, "*batch h w 3"], b: UInt8[np.ndarray, "*batch h w 3"]
) -> UInt8[np.ndarray, "*batch h w 3"]:
    """How far two pictures are apart in each channel, ``AMPLIFY`` times, clipped."""
    apart = AMPLIFY * np.abs(a.astype(np.int32) - b.astype(np.int32))
    return np.minimum(apart, 255).astype(np.uint8)


def enlarge(image: UInt8[np.ndarray, "h w 3"], factor: int) -> UInt8[np.ndarray, "H W 3"]:
    """Upscaled by a whole factor (Lanczos)."""
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def data_uri(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """A picture as a data URI (PNG), for an <img>."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Series(NamedTuple):
    """One line of a chart over (x, value); values that are not finite are left out."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]


_WIDTH, _HEIGHT = 520, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 28, 26
CHART_STYLE = """
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: #6b7280; }
svg .title { font-size: 13px; font-weight: 600; fill: #262a34; }
svg .rule { stroke: #e8ebf0; } svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
svg path { fill: none; } svg .raw { opacity: .3; } svg .mean { stroke-width: 2; }
"""
"""CSS of :func:`svg_curves`."""


def svg_curves(title: str, series: Sequence[Series], *, reach: int = 4, log: bool = False) -> str:
    """A chart over training steps as an <svg>: each value faint, their running mean strong.

    ``reach`` is that of :func:`running_mean`. With ``log`` the x axis is logarithmic, from the
    least x (above 0) to the largest, and has a tick at each x.
    """
    lines = [(line, [(x, y) for x, y in line.points if math.isfinite(y)]) for line in series]
    lines = [(line, points) for line, points in lines if points]
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{html.escape(title)}</title>",
        f'<text x="{_LEFT}" y="16" class="title">{html.escape(title)}</text>',
    ]
    if not lines:
        return "".join([*parts, f'<text x="{_LEFT}" y="60">no values</text></svg>'])
    xs, ys = zip(*(point for _, points in lines for point in points), strict=True)
    y_ticks = ticks(min(*ys, 0.0), max(ys))
    low_y, high_y = y_ticks[0], y_ticks[-1]
    if log:
        low_x, high_x, x_ticks = math.log(min(xs)), math.log(max(xs)), sorted(set(xs))
    else:
        low_x, high_x = 0.0, max(*xs, 1.0)
        x_ticks = [x for x in ticks(low_x, high_x) if x <= high_x]

    def place(x: float, y: float) -> tuple[float, float]:
        across = ((math.log(x) if log else x) - low_x) / ((high_x - low_x) or 1.0)
        up = (y - low_y) / (high_y - low_y)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    for y in y_ticks:
        level = place(x_ticks[-1], y)[1]
        parts.append(f'<path d="M{_LEFT} {level:.1f}H{_WIDTH - _RIGHT}" class="rule"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{level + 4:.1f}" class="end">{y:g}</text>')
    for x in x_ticks:
        at = place(x, low_y)[0]
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - 8}" class="mid">{x:g}</text>')
    for i, (line, points) in enumerate(lines):
        steps, values = zip(*points, strict=True)
        smooth = zip(steps, running_mean(values, reach), strict=True)
        for curve, style in ((points, 'class="raw"'), (smooth, 'class="mean"')):
            path = "L".join("{:.1f} {:.1f}".format(*place(x, y)) for x, y in curve)
            parts.append(f'<path d="M{path}" stroke="{line.colour}" {style}/>')
        corner = f'x="{_WIDTH - _RIGHT}" y="{_TOP + 12 + 15 * i}"'
        name = html.escape(line.name)
        parts.append(f'<text {corner} fill="{line.colour}" class="end">{name}</text>')
    return "".join([*parts, "</svg>"])


def running_mean(values: Sequence[float], reach: int = 4) -> list[float]:
    """Moving average: of each value and up to ``reach`` on both sides of it."""
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]


def ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers; the first is not above ``low``, the last not below ``high``."""
    span = max(high - low, abs(high) * 1e-6, 1e-12)
    rough = span / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]
