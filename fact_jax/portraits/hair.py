"""Hair: eight styles from one set of shapes, a table row each."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fact_jax.portraits.identity import HAIR_STYLES, Identity
from fact_jax.portraits.shapes import Plane, below_parabola, blend, box, ellipse

CAP_Y = -4.0  # centre of the cap of hair around the skull
SKULL_TOP = 17.0  # above the middle of the face
_ABSENT = -20.0  # as a length: above the head, so nothing hangs down


class HairShape(NamedTuple):
    """Distances to one person's hair: behind the head, beside the face, on the forehead."""

    back: Plane
    locks: Plane
    front: Plane
    opacity: Float[Array, ""]  # skin shines through the shortest hair
    back_tone: Float[Array, ""]  # hair behind the head is darker, but not curls around it
    crown: Float[Array, ""]  # height of the top of the hair


class _Style(NamedTuple):
    side: float  # how far the cap of hair stands off the head sideways ...
    side_volume: float  # ... and what full volume adds
    top: float  # the same upwards
    top_volume: float
    line: float  # hairline: its height at the parting,
    bend: float  # how it bends down towards the temples,
    part: float  # where the parting is
    temple: float  # how far down hair goes at the temples
    length: float = _ABSENT  # hanging hair: how far down,
    hang: float = 0.0  # and how far it stands off
    bun: float = 0.0  # radius
    tuft: float = 0.0  # height of a swoop to one side of the crown
    curl: float = 0.0  # depth of the curls
    opacity: float = 1.0


_STYLES = {
    "buzz": _Style(0.3, 0.3, 0.5, 0.6, -10.5, 0.030, 0.0, -0.5, opacity=0.78),
    "crop": _Style(0.9, 0.8, 2.0, 3.6, -9.8, 0.045, 0.0, 0.5, tuft=3.4),
    "side part": _Style(1.1, 1.0, 2.2, 3.0, -14.2, 0.040, 7.0, 1.0, tuft=2.6),
    "fringe": _Style(1.5, 1.2, 2.0, 2.4, -7.4, 0.008, 0.0, 5.0, length=6.0, hang=0.9),
    "long": _Style(1.8, 1.6, 2.0, 2.6, -14.5, 0.058, 2.0, 9.0, length=30.0, hang=2.2),
    "bob": _Style(2.0, 1.8, 2.0, 2.4, -8.8, 0.016, 0.0, 9.0, length=14.5, hang=2.8),
    "curly": _Style(2.8, 3.4, 4.2, 3.2, -10.4, 0.034, 0.0, 6.0, curl=0.8),
    "bun": _Style(0.6, 0.6, 1.4, 1.2, -12.5, 0.036, 0.0, 0.0, bun=5.0),
}
_TABLE = np.asarray([_STYLES[name] for name in HAIR_STYLES], np.float32)


def hair_shape(who: Identity, x: Plane, y: Plane, turn_x: Float[Array, ""]) -> HairShape:
    """Distances to the hair of one person at face coordinates x, y."""
    style = _Style(*jnp.asarray(_TABLE)[who.hair_style])
    volume = who.hair_volume
    rx = who.face_width + style.side + style.side_volume * volume
    ry = SKULL_TOP + CAP_Y + style.top + style.top_volume * volume
    # Eleven broad curls around the cap; atan2 is safe, no pixel lies exactly on the centre.
    angle = jnp.arctan2(y - CAP_Y, x + 1e-4)
    cap = ellipse(x, y - CAP_Y, rx, ry) - style.curl * jnp.cos(11.0 * angle)
    tuft_x = x + who.hair_side * 0.28 * who.face_width
    tuft_ry = style.tuft * (0.6 + 0.8 * volume) + 0.1
    tuft = ellipse(tuft_x, y - CAP_Y + ry - 1.8, 0.66 * who.face_width, tuft_ry)
    cap = jnp.where(style.tuft > 0.0, blend(cap, tuft, 3.5), cap)
    bun_radius = style.bun * (0.85 + 0.45 * volume)
    bun = ellipse(x, y - CAP_Y + ry + 0.55 * bun_radius, bun_radius + 0.01, bun_radius + 0.01)
    bun = jnp.where(style.bun > 0.0, bun, 99.0)

    hang_rx = who.face_width + style.hang * (0.6 + 0.8 * volume)
    length = style.length + jnp.where(style.length > _ABSENT, 3.0 * (volume - 0.5), 0.0)
    middle = 0.5 * (CAP_Y + length)
    hanging = box(x, y - middle, hang_rx, jnp.maximum(length - middle, 0.2), 3.5)
    hanging = jnp.where(style.length > _ABSENT, hanging, 99.0)

    # The cap ends behind the ears, except where curls go around the cheeks.
    nape = y - jnp.where(style.curl > 0.0, 9.0, 5.0)
    back = jnp.minimum(jnp.minimum(jnp.maximum(cap, nape), hanging), bun)

    locks = jnp.maximum(hanging, 0.66 * who.face_width - jnp.abs(x))
    part = who.hair_side * style.part + 0.5 * turn_x
    line = style.line + 0.9 * who.hair_line
    above_line = -below_parabola(x - part, y, line, style.bend)
    front = jnp.maximum(jnp.maximum(cap, above_line), y - style.temple)
    # A buzz cut of no volume at all is a bald head.
    bald = (who.hair_style == HAIR_STYLES.index("buzz")) & (volume < 0.35)
    return HairShape(
        back=jnp.where(bald, 99.0, back),
        locks=locks,
        front=jnp.where(bald, 99.0, jnp.minimum(front, bun)),
        opacity=style.opacity,
        back_tone=jnp.where(style.curl > 0.0, 1.0, 0.76),
        crown=CAP_Y - ry,
    )
