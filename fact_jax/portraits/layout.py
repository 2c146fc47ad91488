"""Geometry: head pose, and feature positions in face units."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from fact_jax.portraits.identity import Identity
from fact_jax.portraits.scene import EXPRESSIONS, Scene
from fact_jax.portraits.shapes import Plane, Scalar

PIXELS_PER_UNIT = 1.08  # at scale 1 in the 64-pixel frame
CENTRE = (31.5, 30.0)  # of the face, in the 64-pixel frame
PIVOT_Y = 15.0  # the head rolls about this point, near the top of the neck


class Layout(NamedTuple):
    """Features of one face before roll, scale and shift (each a scalar or (2,) x, y)."""

    eyes_x: tuple[Scalar, Scalar]
    eyes_y: Scalar
    eye_rx: Scalar
    eye_ry: Scalar
    brow_y: Scalar
    brow_shift: Scalar
    nose_x: Scalar
    nose_y: Scalar
    mouth_x: Scalar
    mouth_y: Scalar  # of the corners
    mouth_half: Scalar
    mouth_top: Scalar  # sag of the opening's upper and lower edge, below the corners
    mouth_bottom: Scalar
    mouth_round: Scalar  # whether the opening is an oval around the middle of the corners
    turn_x: Scalar  # how far the front of the face moved by yaw and pitch
    turn_y: Scalar


def face_layout(who: Identity, scene: Scene) -> Layout:
    """The places of the features of one person in one scene."""
    turn_x, turn_y = 1.7 * scene.yaw, 1.1 * scene.pitch
    by_expression = lambda *values: jnp.asarray(values)[scene.expression]  # noqa: E731
    eyes_y = who.eye_height + turn_y
    # The far eye comes nearer to the nose.
    eyes_x = tuple(
        turn_x + side * who.eye_distance * (1.0 - 0.06 * side * scene.yaw) for side in (-1, 1)
    )
    nose_y = who.eye_height + who.nose_length + 1.4 * turn_y
    room = who.face_length - who.eye_height - who.nose_length
    eye_ry = who.eye_size * who.eye_openness * by_expression(1.0, 0.88, 1.14)
    return Layout(
        eyes_x=eyes_x,
        eyes_y=eyes_y,
        eye_rx=who.eye_size,
        eye_ry=eye_ry,
        brow_y=eyes_y - who.eye_size * who.eye_openness - who.brow_height
        + by_expression(0.4, 0.0, -1.5),
        brow_shift=by_expression(0.0, 0.0, 0.6),
        nose_x=1.6 * turn_x,
        nose_y=nose_y,
        mouth_x=1.1 * turn_x,
        mouth_y=who.eye_height + who.nose_length + 0.43 * room + 1.1 * turn_y
        + by_expression(0.0, -0.9, 0.3),
        mouth_half=who.mouth_width * by_expression(0.92, 1.08, 0.58),
        mouth_top=by_expression(0.05, 0.7, -1.7),
        mouth_bottom=by_expression(0.55, 3.3, 2.3),
        mouth_round=scene.expression == EXPRESSIONS.index("surprised"),
        turn_x=turn_x,
        turn_y=turn_y,
    )  # fmt: skip


def frame_planes(size: int) -> tuple[Plane, Plane]:
    """Pixel centres of a size x size picture in coordinates of the 64-pixel frame."""
    line = (jnp.arange(size) + 0.5) * (64.0 / size) - 0.5
    y, x = jnp.meshgrid(line, line, indexing="ij")
    return x, y


def to_body(x: Plane, y: Plane, scene: Scene) -> tuple[Plane, Plane]:
    """Frame coordinates -> upright face units (shift and scale undone, roll not)."""
    unit = PIXELS_PER_UNIT * scene.scale
    return (x - CENTRE[0] - scene.shift_x) / unit, (y - CENTRE[1] - scene.shift_y) / unit


def to_face(bx: Plane, by: Plane, scene: Scene) -> tuple[Plane, Plane]:
    """Upright face units -> face units (roll about the neck undone)."""
    c, s = jnp.cos(scene.roll), jnp.sin(scene.roll)
    y = by - PIVOT_Y
    return c * bx + s * y, -s * bx + c * y + PIVOT_Y


def to_pixels(points: Float[Array, "n 2"], scene: Scene, size: int) -> Float[Array, "n 2"]:
    """Face units -> pixel coordinates of a size x size picture (pixel centres at integers)."""
    c, s = jnp.cos(scene.roll), jnp.sin(scene.roll)
    x, y = points[:, 0], points[:, 1] - PIVOT_Y
    upright = jnp.stack([c * x - s * y, s * x + c * y + PIVOT_Y], axis=-1)
    centre = jnp.stack([CENTRE[0] + scene.shift_x, CENTRE[1] + scene.shift_y])
    frame = centre + PIXELS_PER_UNIT * scene.scale * upright
    return (frame + 0.5) * (size / 64.0) - 0.5


def five_points(layout: Layout) -> Float[Array, "5 2"]:
    """Left eye, right eye (as seen in the picture), nose tip, left and right mouth corner."""
    places = (
        (layout.eyes_x[0], layout.eyes_y),
        (layout.eyes_x[1], layout.eyes_y),
        (layout.nose_x, layout.nose_y),
        (layout.mouth_x - layout.mouth_half, layout.mouth_y),
        (layout.mouth_x + layout.mouth_half, layout.mouth_y),
    )
    return jnp.stack([jnp.stack([jnp.asarray(x), jnp.asarray(y)]) for x, y in places])
