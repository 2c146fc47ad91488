"""What beside the person was copied from the reference photo: pose, mouth, light."""

import numpy as np
from jaxtyping import Float, UInt8


def head_pose(points: Float[np.ndarray, "n 5 2"]) -> dict[str, Float[np.ndarray, " n"]]:
    """Pose and mouth of faces from their five points (eyes, nose, corners of the mouth).

    ``roll``: angle of the line between the eyes, radians. In the frame that it gives, in distances
    of the eyes: ``yaw``, how far the nose lies to the right of the line from between the eyes to
    the mouth's middle; ``mouth``, the mouth's width. ``pitch``: where the nose lies on the way from
    the eyes (0) to the mouth (1). Pitch and mouth depend on the person too: what a true photo in
    another scene gives is the floor.
    """
    p = np.asarray(points, np.float64)
    left, right, nose = p[:, 0], p[:, 1], p[:, 2]
    eyes, mouth = (left + right) / 2, (p[:, 3] + p[:, 4]) / 2
    across = right - left
    distance = np.linalg.norm(across, axis=1)
    across = across / np.where(distance > 0, distance, 1.0)[:, None]
    down = np.stack([-across[:, 1], across[:, 0]], axis=1)

    def along(vectors: np.ndarray, axis: np.ndarray) -> np.ndarray:
        return (vectors * axis).sum(1)

    with np.errstate(invalid="ignore", divide="ignore"):
        pitch = along(nose - eyes, down) / along(mouth - eyes, down)
        middle = eyes + pitch[:, None] * (mouth - eyes)
        return {
            "roll": np.arctan2(across[:, 1], across[:, 0]),
            "yaw": along(nose - middle, across) / distance,
            "pitch": pitch,
            "mouth": np.linalg.norm(p[:, 4] - p[:, 3], axis=1) / distance,
        }


def light_side(crops: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, " n"]:
    """Where the light comes from in aligned crops: (right - left) / (right + left), -1 to 1.

    Luminance (Rec. 601) of the middle of the face, halves compared; 0 for a black crop.
    """
    side = crops.shape[1]
    face = crops[:, side // 4 : -(side // 4), side // 5 : side - side // 5].astype(np.float64)
    grey = face @ np.array([0.299, 0.587, 0.114])
    half = grey.shape[2] // 2
    left, right = grey[:, :, :half].mean((1, 2)), grey[:, :, -half:].mean((1, 2))
    total = left + right
    return np.where(total > 0, (right - left) / np.where(total > 0, total, 1.0), 0.0)


def copied_part(
    value: Float[np.ndarray, "*batch n"],
    reference: Float[np.ndarray, "*batch n"],
    base: Float[np.ndarray, "*batch n"],
    axis: int = -1,
) -> Float[np.ndarray | np.floating, "*batch"]:
    """How much of a property comes from the reference photo: 1 for copies, 0 for the base's own.

    The coefficient of ``reference`` in the least-squares regression of ``value`` on ``reference``
    and ``base`` (the property in the base's picture of the same noise) over people. A plain
    difference would count as copied whatever is redrawn by chance; here that has coefficient 0.
    Where everybody has the same base picture it explains nothing, and is left out.
    """
    v, r, b = (x - x.mean(axis, keepdims=True) for x in (value, reference, base))
    rr, bb, rb = ((x * y).sum(axis) for x, y in ((r, r), (b, b), (r, b)))
    vr, vb = ((v * x).sum(axis) for x in (r, b))
    same = bb <= 1e-20 * (base**2).sum(axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        alone = vr / rr
        return np.where(same, alone, (vr * bb - vb * rb) / (rr * bb - rb**2))


def followed_part(
    value: Float[np.ndarray, "*batch n"], reference: Float[np.ndarray, "*batch n"], axis: int = -1
) -> Float[np.ndarray | np.floating, "*batch"]:
    """The slope of ``value`` over ``reference`` alone, where there is no base to compare with."""
    v, r = (x - x.mean(axis, keepdims=True) for x in (value, reference))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (v * r).sum(axis) / (r**2).sum(axis)
