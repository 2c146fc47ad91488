"""Contact sheets."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_CAPTION, _TITLE, _LABEL = 18, 30, 76
"""Pixels for a caption under a picture, a title over a column, a label beside a row."""
_WIDEST = 65_000
"""Pixels that a JPEG can be wide."""
_INK, _FAINT = (38, 42, 52), (120, 126, 138)


def contact_sheet(
    images: UInt8[np.ndarray, "n h w 3"],
    columns: int,
    gap: int = 2,
    *,
    border: int = 0,
    captions: Sequence[str] = (),
    titles: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> UInt8[np.ndarray, "H W 3"]:
    """Lay pictures out row by row on white; the last row may stay incomplete.

    ``captions`` stand under the pictures, ``titles`` over the columns, ``labels`` (of one or more
    lines) left of the rows. There are fewer columns where a JPEG could not be as wide.
    """
    count, height, width, _ = images.shape
    across, down = width + gap, height + gap + _CAPTION * bool(captions)
    columns = max(1, min(columns, _WIDEST // across))
    left, top = border + _LABEL * bool(labels), border + _TITLE * bool(titles)
    rows = -(-count // columns)
    size = (left + columns * across - gap + border, top + rows * down - gap + border)
    sheet = Image.new("RGB", size, "white")
    brush = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(12), ImageFont.load_default(15)
    for i, image in enumerate(images):
        at = (left + i % columns * across, top + i // columns * down)
        sheet.paste(Image.fromarray(image), at)
        if captions:
            brush.text((at[0], at[1] + height + 2), captions[i], fill=_INK, font=small)
    for i, title in enumerate(titles):
        at = (left + i * across + width // 2, border + _TITLE // 2)
        brush.text(at, title, fill=_INK, font=large, anchor="mm")
    for i, label in enumerate(labels):
        at = (border + _LABEL // 2, top + i * down + height // 2)
        brush.text(at, label, fill=_FAINT, font=small, anchor="mm", align="center")
    return np.asarray(sheet)
