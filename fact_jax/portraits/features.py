"""Eyes, brows, nose, mouth, facial hair and glasses, painted in face units."""

import jax.numpy as jnp

from fact_jax.portraits.identity import FACIAL_HAIR, Identity
from fact_jax.portraits.layout import Layout
from fact_jax.portraits.scene import GLASSES, Scene
from fact_jax.portraits.shapes import (
    Canvas,
    Coverage,
    Plane,
    Scalar,
    as_planes,
    below_parabola,
    box,
    ellipse,
    segment,
    shadow,
    smoothstep,
    tint,
)

_INK = (0.16, 0.12, 0.15)
_EYE_WHITE = (0.98, 0.97, 0.95)
_MOUTH_INSIDE = (0.42, 0.13, 0.16)
_TEETH = (0.98, 0.96, 0.93)
_FRAME = (0.15, 0.15, 0.22)


def paint_cheeks(
    canvas: Canvas, who: Identity, layout: Layout, x: Plane, y: Plane, face: Plane
) -> Canvas:
    """A soft blush on both cheeks, inside the face's coverage."""
    cheek_y = layout.nose_y + 0.6
    for side in (-1, 1):
        place = layout.turn_x + side * 0.62 * who.face_width
        blush = 1.0 - smoothstep(-3.4, 1.2, ellipse(x - place, y - cheek_y, 4.4, 3.2))
        rosy = canvas.rgb * as_planes((1.0, 0.74, 0.72))
        canvas = tint(canvas, blush * face * (0.15 + 0.6 * who.blush), rosy)
    return canvas


def paint_eyes(
    canvas: Canvas, who: Identity, layout: Layout, x: Plane, y: Plane, coverage: Coverage
) -> Canvas:
    """White, iris, pupil, highlight and the dark upper lid of both eyes."""
    rx, ry = layout.eye_rx, layout.eye_ry
    iris_r = jnp.minimum(0.66 * rx, ry + 0.3)
    for side, eye_x in zip((-1, 1), layout.eyes_x, strict=True):
        ex = x - eye_x
        ey = y - layout.eyes_y - side * who.eye_slant * ex
        white = ellipse(ex, ey, rx, ry)
        # The lid is what the eye's outline, grown and moved up, leaves free.
        canvas = tint(canvas, coverage(ellipse(ex, ey + 0.55, rx + 0.75, ry + 0.75)), _INK)
        canvas = shadow(canvas, 0.25 * coverage(ellipse(ex, ey - 0.5, rx + 0.3, ry + 0.4)))
        canvas = tint(canvas, coverage(white), _EYE_WHITE)
        iris = jnp.maximum(ellipse(ex, ey, iris_r, iris_r), white)
        canvas = tint(canvas, coverage(iris), 0.62 * who.iris)
        inner = jnp.maximum(ellipse(ex, ey - 0.25, iris_r - 0.5, iris_r - 0.5), white)
        canvas = tint(canvas, coverage(inner), who.iris)
        canvas = tint(canvas, coverage(ellipse(ex, ey, 0.46 * iris_r, 0.46 * iris_r)), _INK)
        glint = ellipse(ex + 0.38 * iris_r, ey + 0.40 * iris_r, 0.85, 0.85)
        canvas = tint(canvas, coverage(glint), (1.0, 1.0, 1.0))
    return canvas


def paint_brows(
    canvas: Canvas, who: Identity, layout: Layout, x: Plane, y: Plane, coverage: Coverage
) -> Canvas:
    """Two arched bars; a little darker than the hair, so that fair brows stay visible."""
    half = 0.95 * who.eye_size + 0.5
    for side, eye_x in zip((-1, 1), layout.eyes_x, strict=True):
        bx = side * (x - eye_x)
        by = y - layout.brow_y + who.brow_tilt * bx + 0.05 * (half**2 - bx**2) - 0.3
        bar = segment(bx, by, -half, 0.0, half, 0.0)
        # Thinner towards the temple.
        thickness = who.brow_thickness * (1.0 - 0.22 * jnp.clip(bx / half, -1.0, 1.0))
        canvas = tint(canvas, coverage(bar - thickness), 0.62 * who.hair)
    return canvas


def paint_nose(
    canvas: Canvas, who: Identity, layout: Layout, scene: Scene, x: Plane, y: Plane,
    coverage: Coverage,
) -> Canvas:  # fmt: skip
    """A shaded bridge on the side away from the light, a bright tip, a shadow under it."""
    nx, ny = x - layout.nose_x, y - layout.nose_y
    dark = -jnp.sign(scene.light)
    w = who.nose_width
    bridge_top = layout.eyes_y + 0.8 - layout.nose_y
    bridge = segment(nx, ny, dark * 0.35 * w, 0.0, dark * 0.2 * w, bridge_top) - 0.36 * w - 0.3
    canvas = shadow(canvas, 0.34 * coverage(bridge))
    canvas = shadow(canvas, 0.85 * coverage(ellipse(nx, ny - 0.85, w + 0.45, 1.75)))
    tip = jnp.minimum(ellipse(nx, ny, w, 1.8), ellipse(nx, ny + 1.0, 0.6 * w, 2.4))
    flesh = who.skin * jnp.asarray([1.0, 0.93, 0.91])
    canvas = tint(canvas, coverage(tip), flesh)
    shine = ellipse(nx + dark * 0.25 * w, ny + 0.7, 0.38 * w, 0.7)
    return tint(canvas, 0.55 * coverage(shine), 1.0 - 0.55 * (1.0 - who.skin))


def paint_mouth(
    canvas: Canvas, who: Identity, layout: Layout, x: Plane, y: Plane, coverage: Coverage
) -> Canvas:
    """Lips around an opening between two parabolas that meet in the corners."""
    mx, my = x - layout.mouth_x, y - layout.mouth_y
    half, top, bottom = layout.mouth_half, layout.mouth_top, layout.mouth_bottom

    def between(top: Scalar, bottom: Scalar, half: Scalar) -> Plane:
        upper = below_parabola(mx, my, top, -top / half**2)
        lower = -below_parabola(mx, my, bottom, -bottom / half**2)
        return jnp.maximum(upper, lower)

    full = who.lip_fullness
    lips = between(top - 0.30 - 0.75 * full, bottom + 0.35 + 0.95 * full, half + 0.7)
    ring = ellipse(mx, my, half + 0.4 + 0.6 * full, bottom + 0.4 + 0.6 * full)
    lips = jnp.where(layout.mouth_round, ring, lips)
    canvas = tint(canvas, coverage(lips), who.lips)
    opening = jnp.where(
        layout.mouth_round, ellipse(mx, my, half, bottom), between(top, bottom, half)
    )
    canvas = tint(canvas, coverage(opening), _MOUTH_INSIDE)
    teeth = jnp.maximum(opening, my - top - 1.35)
    # A closed mouth shows none.
    return tint(canvas, coverage(teeth) * (bottom - top > 1.5) * (top > 0.0), _TEETH)


def paint_facial_hair(
    canvas: Canvas, who: Identity, layout: Layout, x: Plane, y: Plane, face: Plane,
    coverage: Coverage,
) -> Canvas:  # fmt: skip
    """Moustache or full beard in the tone of the hair, inside the face's coverage."""
    tone = 0.88 * who.hair
    mx, my = x - layout.mouth_x, y - layout.mouth_y
    has_beard = who.facial_hair == FACIAL_HAIR.index("beard")
    has_moustache = who.facial_hair != FACIAL_HAIR.index("none")
    beard_line = below_parabola(x - layout.turn_x, y, layout.mouth_y - 1.0, -0.055)
    lips = ellipse(mx, my - 0.5, layout.mouth_half + 0.9, 0.9 + 0.8 * who.lip_fullness)
    beard = coverage(jnp.maximum(beard_line, -lips)) * face
    canvas = tint(canvas, beard * has_beard, tone)
    edge = layout.mouth_y + layout.mouth_top - 0.6 - 0.6 * who.lip_fullness
    above = jnp.maximum(
        -below_parabola(mx, y, edge, 0.02),
        below_parabola(mx, y, jnp.minimum(layout.nose_y + 1.7, edge - 1.9), 0.055),
    )
    moustache = jnp.maximum(above, jnp.abs(mx) - who.mouth_width - 0.4)
    return tint(canvas, coverage(moustache) * has_moustache, tone)


def paint_glasses(
    canvas: Canvas, who: Identity, layout: Layout, scene: Scene, x: Plane, y: Plane,
    coverage: Coverage,
) -> Canvas:  # fmt: skip
    """Round or square frames with a faint reflection, a bridge and arms to the ears."""
    is_round = scene.glasses == GLASSES.index("round")
    worn = (scene.glasses != GLASSES.index("none")).astype(jnp.float32)
    gy = y - layout.eyes_y - 0.3
    frames = jnp.full_like(x, 99.0)
    for side, eye_x in zip((-1, 1), layout.eyes_x, strict=True):
        gx = x - eye_x - side * 0.35
        lens = jnp.where(is_round, ellipse(gx, gy, 5.3, 5.3), box(gx, gy, 5.5, 4.3, 1.0))
        canvas = tint(canvas, 0.14 * worn * coverage(lens), (1.0, 1.0, 1.0))
        frames = jnp.minimum(frames, jnp.abs(lens) - 0.62)
        temple = layout.turn_x * -0.6 + side * (who.face_width - 0.4)
        arm = segment(x, gy, eye_x + side * 5.6, -0.8, temple, -1.4) - 0.5
        frames = jnp.minimum(frames, arm)
    gap = 0.5 * (layout.eyes_x[1] - layout.eyes_x[0]) - 4.9
    middle = 0.5 * (layout.eyes_x[1] + layout.eyes_x[0])
    bridge = segment(x - middle, gy, -gap, -0.9, gap, -0.9) - 0.6
    return tint(canvas, worn * coverage(jnp.minimum(frames, bridge)), _FRAME)
