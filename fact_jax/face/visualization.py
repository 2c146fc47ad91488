"""Drawing of landmarks and head masks onto photos."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

_POINT_COLOURS = ("#ff4d4d", "#ffb84d", "#4dff88", "#4db8ff", "#d24dff")
_OUTLINE = np.array([255, 230, 0], np.float32)


def draw_face(
    image: UInt8[np.ndarray, "h w 3"],
    points: Float[np.ndarray, "5 2"],
    mask: Float[np.ndarray, "h w"],
) -> UInt8[np.ndarray, "h w 3"]:
    """The photo with the mask's outline, the rest of it darkened, and the five points as dots."""
    thick = max(1, round(max(image.shape[:2]) / 256))
    inside = mask >= 0.5
    darkened = image * (0.55 + 0.45 * mask[..., None])
    painted = np.where(_outline(inside, thick)[..., None], _OUTLINE, darkened)
    canvas = Image.fromarray(np.rint(painted).astype(np.uint8))
    brush = ImageDraw.Draw(canvas)
    radius = 1.5 * thick
    for (x, y), colour in zip(np.asarray(points, float), _POINT_COLOURS, strict=True):
        brush.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=colour, outline="black"
        )
    return np.asarray(canvas)


def _outline(inside: np.ndarray, thick: int) -> np.ndarray:
    """The ``thick`` outermost pixels of a boolean region; the frame of the picture is no border."""
    core = inside
    for _ in range(thick):
        padded = np.pad(core, 1, mode="edge")
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core
