"""Scene parameters (pose, light, clothing, background), drawn from a seed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

EXPRESSIONS = ("neutral", "smiling", "surprised")
GLASSES = ("none", "round", "square")
PATTERNS = ("plain", "striped", "gradient")

SHIRT_RGB = {
    "red": (206, 66, 62), "blue": (62, 98, 176), "green": (72, 142, 92), "yellow": (236, 190, 72),
    "white": (244, 240, 232), "black": (50, 48, 58), "purple": (124, 84, 160),
    "orange": (230, 132, 60),
}  # fmt: skip
BACKGROUND_RGB = {
    "blue": (122, 166, 214), "green": (146, 194, 138), "yellow": (244, 216, 128),
    "pink": (240, 172, 178),
 "purple": (172, 152, 212), "orange": (242, 176, 118),
    "teal": (96, 182, 178), "gray": (188, 190, 198),
}  # fmt: skip
SHIRTS = tuple(SHIRT_RGB)
BACKGROUNDS = tuple(BACKGROUND_RGB)

_WORLD_KEY = 20_260_101


class Scene(NamedTuple):
    """One variation a row: every field is (b,)."""

    roll: Float[Array, "b"]  # radians, within 8 degrees
    yaw: Float[Array, "b"]  # -1 .. 1, positive looks to the right of the picture
    pitch: Float[Array, "b"]  # -1 .. 1, positive looks down
    scale: Float[Array, "b"]  # 0.93 .. 1.07
    shift_x: Float[Array, "b"]  # pixels of the 64-pixel frame, within 2
    shift_y: Float[Array, "b"]
    light: Float[Array, "b"]  # -1 from the left .. 1 from the right
    light_strength: Float[Array, "b"]  # 0.3 .. 1
    expression: Int[Array, "b"]  # index into EXPRESSIONS
    glasses: Int[Array, "b"]  # index into GLASSES
    shirt: Int[Array, "b"]  # index into SHIRTS
    v_neck: Int[Array, "b"]  # 0 crew neck, 1 v-neck; not in the caption
    background: Int[Array, "b"]  # index into BACKGROUNDS
    pattern: Int[Array, "b"]  # index into PATTERNS
    phrasing: Int[Array, "b"]  # which of the caption's phrasings


def _sample_one(seed: Int[Array, ""]) -> Scene:
    key = jax.random.fold_in(jax.random.key(_WORLD_KEY), seed)
    draws = iter(jax.random.uniform(key, (20,)))

    def uniform(low: float, high: float) -> Float[Array, ""]:
        return low + (high - low) * next(draws)

    def index(count: int) -> Int[Array, ""]:
        return jnp.minimum((next(draws) * count).astype(jnp.int32), count - 1)

    side = jnp.where(next(draws) < 0.5, -1.0, 1.0)
    return Scene(
        roll=jnp.deg2rad(uniform(-8.0, 8.0)),
        yaw=uniform(-1.0, 1.0),
        pitch=uniform(-1.0, 1.0),
        scale=uniform(0.93, 1.07),
        shift_x=uniform(-2.0, 2.0),
        shift_y=uniform(-2.0, 2.0),
        light=side * uniform(0.4, 1.0),
        light_strength=uniform(0.3, 1.0),
        expression=index(3),
        # Half of the people wear no glasses.
        glasses=jnp.maximum(index(4) - 1, 0),
        shirt=index(len(SHIRTS)),
        v_neck=index(2),
        background=index(len(BACKGROUNDS)),
        pattern=index(3),
        phrasing=index(3),
    )


@jax.jit
def sample_scene(seeds: Int[Array, "b"]) -> Scene:
    """The variations with these seeds; the same seed is always the same scene."""
    return jax.vmap(_sample_one)(seeds)
