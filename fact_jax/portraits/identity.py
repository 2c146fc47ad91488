"""Who is in the portrait: parameters that depend on the identity number alone.

Lengths are in face units: about 1.08 pixels of the 64-pixel frame, origin in the middle of the
face, x to the right, y down.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Disjoint people: who trains the generator, the face encoder, the adapter, the evaluation networks,
# and who is only ever evaluated.
SPLITS: dict[str, range] = {
    "base": range(0, 20_000),
    "encoder": range(20_000, 40_000),
    "adapter": range(40_000, 60_000),
    "judge": range(60_000, 80_000),
    "test": range(80_000, 82_000),
}

HAIR_STYLES = ("buzz", "crop", "side part", "fringe", "long", "bob", "curly", "bun")
FACIAL_HAIR = ("none", "moustache", "beard")

# Anchors from light to dark; the skin tone walks along them.
_SKIN = (
    (253, 222, 200), (245, 201, 170), (229, 176, 138), (203, 146, 106),
    (174, 119, 84), (142, 92, 65), (110, 71, 53),
)  # fmt: skip
_HAIR = (
    (38, 33, 42), (72, 48, 42), (112, 72, 48), (150, 74, 46), (208, 108, 52), (222, 178, 98),
    (242, 224, 178), (164, 164, 172), (214, 92, 130), (112, 86, 176), (54, 142, 148),
    (70, 104, 190),
)  # fmt: skip
_HAIR_WEIGHTS = (3, 2, 2, 2, 2, 2, 1.5, 1.5, 0.8, 0.8, 0.8, 0.8)
_IRIS = (
    (92, 56, 34), (140, 88, 38), (112, 122, 48), (56, 138, 92), (52, 128, 190), (112, 140, 158),
    (112, 84, 168),
)  # fmt: skip
_IRIS_WEIGHTS = (2, 2, 1.5, 1.5, 2, 1.5, 0.8)
_LIPS = ((214, 108, 98), (188, 72, 80), (232, 132, 122), (160, 60, 78))
_STYLE_WEIGHTS = (1, 1.2, 1.2, 1.2, 1.4, 1.2, 1.2, 1.0)

_WORLD_KEY = 20_241_012


class Identity(NamedTuple):
    """One person a row: every field is (b,), colours are (b, 3) in [0, 1]."""

    face_width: Float[Array, "b"]  # half width at the cheekbones
    face_length: Float[Array, "b"]  # middle of the face to the chin
    jaw_taper: Float[Array, "b"]  # how much narrower the jaw is than the cheekbones
    jaw_square: Float[Array, "b"]  # 0 oval .. 1 square
    cheek: Float[Array, "b"]
    ear_size: Float[Array, "b"]
    skin: Float[Array, "b 3"]
    blush: Float[Array, "b"]
    hair: Float[Array, "b 3"]
    hair_style: Int[Array, "b"]
    hair_volume: Float[Array, "b"]
    hair_line: Float[Array, "b"]
    hair_side: Float[Array, "b"]  # +1 or -1, the side of the parting
    eye_height: Float[Array, "b"]
    eye_distance: Float[Array, "b"]  # half the distance between the pupils
    eye_size: Float[Array, "b"]
    eye_openness: Float[Array, "b"]
    eye_slant: Float[Array, "b"]
    iris: Float[Array, "b 3"]
    brow_thickness: Float[Array, "b"]
    brow_tilt: Float[Array, "b"]
    brow_height: Float[Array, "b"]
    nose_length: Float[Array, "b"]
    nose_width: Float[Array, "b"]
    mouth_width: Float[Array, "b"]
    lip_fullness: Float[Array, "b"]
    lips: Float[Array, "b 3"]
    facial_hair: Int[Array, "b"]


def _palette(anchors: tuple[tuple[int, int, int], ...]) -> Float[Array, "n 3"]:
    return jnp.asarray(anchors, jnp.float32) / 255.0


def _choose(u: Float[Array, ""], weights: tuple[float, ...]) -> Int[Array, ""]:
    edges = jnp.cumsum(jnp.asarray(weights, jnp.float32))
    return jnp.sum(u * edges[-1] >= edges[:-1]).astype(jnp.int32)


def _skin_colour(depth: Float[Array, ""], undertone: Float[Array, ""]) -> Float[Array, "3"]:
    anchors = _palette(_SKIN)
    place = depth**1.15 * (len(_SKIN) - 1)
    stops = jnp.arange(len(_SKIN), dtype=jnp.float32)
    colour = jnp.stack([jnp.interp(place, stops, anchors[:, c]) for c in range(3)])
    # Undertone -1 is rosy, +1 is olive.
    return jnp.clip(colour * (1.0 + undertone * jnp.asarray([-0.02, 0.025, -0.09])), 0.0, 1.0)


def _sample_one(number: Int[Array, ""]) -> Identity:
    key = jax.random.fold_in(jax.random.key(_WORLD_KEY), number)
    draws = iter(jax.random.uniform(key, (40,)))

    def uniform(low: float, high: float) -> Float[Array, ""]:
        return low + (high - low) * next(draws)

    def jittered(colour: Float[Array, "3"], amount: float) -> Float[Array, "3"]:
        jitter = jnp.stack([uniform(-amount, amount) for _ in range(3)])
        return jnp.clip(colour + jitter, 0.0, 1.0)

    skin = _skin_colour(uniform(0.0, 1.0), uniform(-1.0, 1.0))
    hair = jittered(_palette(_HAIR)[_choose(next(draws), _HAIR_WEIGHTS)], 0.05)
    iris = jittered(_palette(_IRIS)[_choose(next(draws), _IRIS_WEIGHTS)], 0.05)
    lip_paint = _palette(_LIPS)[_choose(next(draws), (1, 1, 1, 1))]
    # Lips keep a part of the skin's colour, so that they fit every skin.
    lips = 0.70 * lip_paint + 0.30 * skin * jnp.asarray([0.85, 0.6, 0.6])
    return Identity(
        face_width=uniform(13.2, 17.2),
        face_length=uniform(17.0, 21.0),
        jaw_taper=uniform(0.0, 0.27),
        jaw_square=uniform(0.2, 0.85),
        cheek=uniform(0.0, 1.0),
        ear_size=uniform(0.75, 1.3),
        skin=skin,
        blush=uniform(0.0, 1.0),
        hair=hair,
        hair_style=_choose(next(draws), _STYLE_WEIGHTS),
        hair_volume=uniform(0.0, 1.0),
        hair_line=uniform(-1.0, 1.0),
        hair_side=jnp.where(next(draws) < 0.5, -1.0, 1.0),
        eye_height=uniform(-1.4, 0.6),
        eye_distance=uniform(5.6, 8.2),
        eye_size=uniform(3.3, 4.7),
        eye_openness=uniform(0.58, 0.98),
        eye_slant=uniform(-0.22, 0.22),
        iris=iris,
        brow_thickness=uniform(0.65, 1.6),
        brow_tilt=uniform(-0.28, 0.28),
        brow_height=uniform(2.2, 3.8),
        nose_length=uniform(5.2, 8.6),
        nose_width=uniform(1.7, 3.9),
        mouth_width=uniform(4.2, 7.6),
        lip_fullness=uniform(0.7, 2.1),
        lips=lips,
        facial_hair=_choose(next(draws), (0.6, 0.18, 0.22)),
    )


@jax.jit
def sample_identity(ids: Int[Array, "b"]) -> Identity:
    """The people with these numbers; the same number is always the same person."""
    return jax.vmap(_sample_one)(ids)
