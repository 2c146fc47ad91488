"""Identity and scene -> picture, masks, points: all from the same geometry."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fact_jax.portraits import features
from fact_jax.portraits.hair import SKULL_TOP, HairShape, hair_shape
from fact_jax.portraits.identity import Identity
from fact_jax.portraits.layout import (
    PIXELS_PER_UNIT,
    Layout,
    face_layout,
    five_points,
    frame_planes,
    to_body,
    to_face,
    to_pixels,
)
from fact_jax.portraits.scene import BACKGROUND_RGB, PATTERNS, SHIRT_RGB, Scene
from fact_jax.portraits.shapes import (
    Canvas,
    Coverage,
    Plane,
    as_planes,
    box,
    cover,
    ellipse,
    level_set,
    shadow,
    smoothstep,
    tint,
)

_BACKGROUND = np.asarray(list(BACKGROUND_RGB.values()), np.float32) / 255.0
_SHIRT = np.asarray(list(SHIRT_RGB.values()), np.float32) / 255.0
_STRIPE_WIDTH = 11.0  # pixels of the 64-pixel frame
_SHOULDER_Y = 23.5  # top of the clothing in upright face units


class Portrait(NamedTuple):
    """Pictures with the truth about them; pixel centres lie at integer coordinates."""

    image: Float[Array, "b h w 3"]  # in [0, 1]
    face_mask: Float[Array, "b h w"]  # visible skin of the face with eyes, mouth, glasses, ears
    head_mask: Float[Array, "b h w"]  # face and hair; at least face_mask everywhere
    points: Float[Array, "b 5 2"]  # x, y: left eye, right eye, nose tip, mouth left, mouth right
    skin: Float[Array, "b 3"]  # true colours in [0, 1]
    hair: Float[Array, "b 3"]
    expression: Int[Array, "b"]  # indices into the names in scene.py
    glasses: Int[Array, "b"]
    shirt: Int[Array, "b"]
    background: Int[Array, "b"]
    pattern: Int[Array, "b"]


def _face_distance(who: Identity, x: Plane, y: Plane) -> Plane:
    """An oval whose lower half tapers to the jaw and can be square or full-cheeked."""

    def outline(x: Plane, y: Plane) -> Plane:
        down = smoothstep(0.0, who.face_length, y)
        cheek = 0.09 * who.cheek * jnp.exp(-(((y - 6.5) / 5.0) ** 2))
        u2 = (x / (who.face_width * (1.0 - who.jaw_taper * down + cheek))) ** 2
        v2 = (y / jnp.where(y > 0.0, who.face_length, SKULL_TOP)) ** 2
        square = jnp.where(y > 0.0, who.jaw_square * down, 0.0)
        return (1.0 - square) * (u2 + v2) + square * (u2**2 + v2**2) - 1.0

    return level_set(outline, x, y)


def _background(scene: Scene, x: Plane, y: Plane) -> Float[Array, "3 h w"]:
    base = jnp.asarray(_BACKGROUND)[scene.background][:, None, None]
    light, dark = base + 0.42 * (1.0 - base), base * 0.80
    across = (x + 0.5 * y) / jnp.sqrt(1.25)
    phase = across / (2.0 * _STRIPE_WIDTH)
    to_edge = (0.25 - jnp.abs(phase - jnp.round(phase))) * 2.0 * _STRIPE_WIDTH
    stripes = jnp.clip(to_edge + 0.5, 0.0, 1.0)
    gradient = smoothstep(0.0, 63.0, y)
    amount = jnp.where(scene.pattern == PATTERNS.index("striped"), stripes, 1.0 - gradient)
    start = jnp.where(scene.pattern == PATTERNS.index("striped"), base * 0.94, dark)
    patterned = start + amount * (light - start)
    return jnp.where(scene.pattern == PATTERNS.index("plain"), base, patterned)


def _hair_colour(who: Identity, scene: Scene, x: Plane) -> Float[Array, "3 h w"]:
    """The hair's colour, darker on the side away from the light."""
    away = smoothstep(0.0, 1.2, -x * jnp.sign(scene.light) / who.face_width)
    return as_planes(who.hair) * (1.0 - 0.2 * away)


def _paint_body(
    canvas: Canvas, who: Identity, scene: Scene, bx: Plane, by: Plane, coverage: Coverage
) -> Canvas:
    """Shoulders in the shirt's colour, a neck, and the collar; none of it is face or head."""
    shirt = jnp.asarray(_SHIRT)[scene.shirt]
    neck_width = 0.40 * who.face_width
    trunk = ellipse(bx, by - _SHOULDER_Y - 14.5, 25.0, 16.5)
    trunk = jnp.minimum(trunk, box(bx, by - _SHOULDER_Y - 18.0, 9.0, 19.5, 6.0))
    canvas = cover(canvas, coverage(trunk), shirt, face=0.0, head=0.0)
    side = smoothstep(-4.0, 24.0, -bx * jnp.sign(scene.light))
    canvas = shadow(canvas, 0.45 * scene.light_strength * side * coverage(trunk))

    collar_y = by - _SHOULDER_Y
    crew = ellipse(bx, collar_y, neck_width + 1.6, 4.2)
    wedge = (collar_y + 1.45 * jnp.abs(bx) - 9.5) / jnp.sqrt(1.0 + 1.45**2)
    wedge = jnp.maximum(wedge, -collar_y - 4.0)
    opening = jnp.where(scene.v_neck == 1, wedge, crew)
    band = jnp.maximum(opening - 1.5, trunk)
    canvas = tint(canvas, coverage(band), shirt * 0.76)
    neck = box(bx, by - 14.0, neck_width, 14.0, 2.0)
    skin = jnp.minimum(jnp.maximum(neck, collar_y), jnp.maximum(opening, trunk))
    shade = who.skin * jnp.asarray([0.86, 0.78, 0.78])
    canvas = cover(canvas, coverage(skin), shade, face=0.0, head=0.0)
    # The chin's shadow.
    chin = ellipse(bx, by - 4.0, 0.9 * who.face_width, who.face_length - 1.0)
    return shadow(canvas, 0.45 * coverage(jnp.maximum(skin, chin)))


def _paint_head(
    canvas: Canvas, who: Identity, scene: Scene, layout: Layout, hair: HairShape, face: Plane,
    x: Plane, y: Plane, coverage: Coverage,
) -> Canvas:  # fmt: skip
    """Ears, hanging locks, and the bare face with its soft side shadow."""
    for side in (-1, 1):
        ear_x = x - side * (who.face_width - 0.2) + 0.6 * layout.turn_x
        ear_y = y - 1.6 - 0.5 * layout.turn_y
        ear = ellipse(ear_x, ear_y, 2.5 * who.ear_size, 3.6 * who.ear_size)
        canvas = cover(canvas, coverage(ear), who.skin * 0.93, face=1.0, head=1.0)
        hollow = ellipse(ear_x, ear_y, 1.3 * who.ear_size, 2.2 * who.ear_size)
        canvas = shadow(canvas, 0.4 * coverage(hollow))
    canvas = cover(canvas, coverage(hair.locks), _hair_colour(who, scene, x), face=0.0, head=1.0)
    inside = coverage(face)
    canvas = shadow(canvas, 0.35 * coverage(face - 0.9) * (1.0 - inside) * canvas.head)
    canvas = cover(canvas, inside, who.skin, face=1.0, head=1.0)
    away = -x * jnp.sign(scene.light) / who.face_width
    shade = smoothstep(0.05, 1.05, away + 0.25 * y / who.face_length)
    canvas = shadow(canvas, inside * shade * (0.15 + 0.5 * scene.light_strength))
    return features.paint_cheeks(canvas, who, layout, x, y, inside)


def _paint_front_hair(
    canvas: Canvas, who: Identity, scene: Scene, hair: HairShape, face: Plane, x: Plane, y: Plane,
    coverage: Coverage,
) -> Canvas:  # fmt: skip
    """The hair over the forehead, its shadow on the skin, and its highlight."""
    canvas = shadow(canvas, 0.4 * coverage(hair.front - 1.1) * coverage(face) * hair.opacity)
    hairy = coverage(hair.front)
    bare = canvas.rgb
    colour = bare + hair.opacity * (_hair_colour(who, scene, x) - bare)
    canvas = cover(canvas, hairy, colour, face=0.0, head=1.0)
    light = jnp.sign(scene.light)
    # A broad soft band of light over the crown.
    lx = x - 5.0 * light
    band = ellipse(lx, y - hair.crown - 4.2 - 0.018 * lx**2, 6.8, 1.7)
    glow = (1.0 - smoothstep(-1.2, 0.7, band)) * hairy * hair.opacity**3
    glow = glow * (0.25 + 0.3 * scene.light_strength)
    return tint(canvas, glow, who.hair + 0.55 * (1.0 - who.hair))


def _draw(who: Identity, scene: Scene, *, size: int) -> Portrait:
    pixels = PIXELS_PER_UNIT * scene.scale * (size / 64.0)

    def coverage(distance: Plane) -> Plane:
        return jnp.clip(0.5 - distance * pixels, 0.0, 1.0)

    frame_x, frame_y = frame_planes(size)
    bx, by = to_body(frame_x, frame_y, scene)
    x, y = to_face(bx, by, scene)
    layout = face_layout(who, scene)
    hair = hair_shape(who, x, y, layout.turn_x)
    face = _face_distance(who, x, y)

    nothing = jnp.zeros_like(x)
    canvas = Canvas(_background(scene, frame_x, frame_y), nothing, nothing)
    back = hair.back_tone * _hair_colour(who, scene, x)
    canvas = cover(canvas, coverage(hair.back), back, face=0.0, head=1.0)
    canvas = _paint_body(canvas, who, scene, bx, by, coverage)
    canvas = _paint_head(canvas, who, scene, layout, hair, face, x, y, coverage)
    canvas = features.paint_facial_hair(canvas, who, layout, x, y, coverage(face), coverage)
    canvas = features.paint_mouth(canvas, who, layout, x, y, coverage)
    canvas = features.paint_nose(canvas, who, layout, scene, x, y, coverage)
    canvas = features.paint_eyes(canvas, who, layout, x, y, coverage)
    canvas = _paint_front_hair(canvas, who, scene, hair, face, x, y, coverage)
    canvas = features.paint_brows(canvas, who, layout, x, y, coverage)
    canvas = features.paint_glasses(canvas, who, layout, scene, x, y, coverage)
    return Portrait(
        image=jnp.clip(jnp.moveaxis(canvas.rgb, 0, -1), 0.0, 1.0),
        face_mask=canvas.face,
        head_mask=canvas.head,
        points=to_pixels(five_points(layout), scene, size),
        skin=who.skin,
        hair=who.hair,
        expression=scene.expression,
        glasses=scene.glasses,
        shirt=scene.shirt,
        background=scene.background,
        pattern=scene.pattern,
    )


@partial(jax.jit, static_argnames="size")
def render(identity: Identity, scene: Scene, size: int = 64) -> Portrait:
    """Draw b people in b scenes, size x size pixels each."""
    return jax.vmap(partial(_draw, size=size))(identity, scene)
