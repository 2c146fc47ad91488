"""Contact sheets."""

import numpy as np
from jaxtyping import UInt8


def contact_sheet(
    images: UInt8[np.ndarray, "n h w 3"], columns: int, gap: int = 2
) -> UInt8[np.ndarray, "H W 3"]:
    """Lay pictures out row by row on white; the last row may stay incomplete."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet
