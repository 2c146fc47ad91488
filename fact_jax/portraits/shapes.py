"""Signed distances (negative inside) and painting by anti-aliased coverage.

Every function works on one image: x and y are (h, w) coordinate planes, parameters are scalars.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Plane = Float[Array, "h w"]
Scalar = Float[Array, ""] | float
Colour = Float[Array, "3"] | Float[Array, "3 h w"] | tuple[float, float, float]
Coverage = Callable[[Plane], Plane]  # distance -> how much of a pixel is inside


def ellipse(x: Plane, y: Plane, rx: Scalar, ry: Scalar) -> Plane:
    """Distance to an axis-aligned ellipse at the origin, to first order near its edge."""
    ix, iy = 1.0 / rx, 1.0 / ry  # planes are multiplied, not divided: it is faster
    u, v = x * ix, y * iy
    k0 = jnp.sqrt(u**2 + v**2 + 1e-8)
    k1 = jnp.sqrt((u * ix) ** 2 + (v * iy) ** 2 + 1e-8)
    return k0 * (k0 - 1.0) / k1


def box(x: Plane, y: Plane, rx: Scalar, ry: Scalar, radius: Scalar) -> Plane:
    """Distance to a box of half sizes rx, ry with rounded corners."""
    qx = jnp.abs(x) - rx + radius
    qy = jnp.abs(y) - ry + radius
    outside = jnp.sqrt(jnp.maximum(qx, 0.0) ** 2 + jnp.maximum(qy, 0.0) ** 2 + 1e-8)
    return outside + jnp.minimum(jnp.maximum(qx, qy), 0.0) - radius


def segment(x: Plane, y: Plane, ax: Scalar, ay: Scalar, bx: Scalar, by: Scalar) -> Plane:
    """Distance to the line from a to b (subtract a radius for a capsule)."""
    dx, dy = bx - ax, by - ay
    t = jnp.clip(((x - ax) * dx + (y - ay) * dy) / (dx**2 + dy**2 + 1e-8), 0.0, 1.0)
    return jnp.sqrt((x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2 + 1e-8)


def below_parabola(x: Plane, y: Plane, top: Scalar, bend: Scalar) -> Plane:
    """Distance to the half plane y > top + bend x^2."""
    return (top + bend * x**2 - y) / jnp.sqrt(1.0 + (2.0 * bend * x) ** 2)


def blend(a: Plane, b: Plane, radius: Scalar) -> Plane:
    """Union of two shapes whose joint is filleted."""
    h = jnp.maximum(radius - jnp.abs(a - b), 0.0) / radius
    return jnp.minimum(a, b) - 0.25 * radius * h**2


def level_set(f: Callable[[Plane, Plane], Plane], x: Plane, y: Plane) -> Plane:
    """Distance to f = 0, to first order: f over the length of its gradient."""
    value, fx = jax.jvp(lambda u: f(u, y), (x,), (jnp.ones_like(x),))
    _, fy = jax.jvp(lambda v: f(x, v), (y,), (jnp.ones_like(y),))
    return value / jnp.sqrt(fx**2 + fy**2 + 1e-6)


def smoothstep(low: Scalar, high: Scalar, value: Plane) -> Plane:
    t = jnp.clip((value - low) * (1.0 / (high - low)), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


class Canvas(NamedTuple):
    """A picture in the making: its colours, and what of each pixel is face and head."""

    rgb: Float[Array, "3 h w"]  # planes, since XLA vectorises those best on a CPU
    face: Plane
    head: Plane


def as_planes(colour: Colour) -> Float[Array, "3 ..."]:
    colour = jnp.asarray(colour)
    return colour if colour.ndim == 3 else colour[:, None, None]


def mix(under: Float[Array, "3 h w"], alpha: Plane, colour: Colour) -> Float[Array, "3 h w"]:
    return under + alpha * (as_planes(colour) - under)


def tint(canvas: Canvas, alpha: Plane, colour: Colour) -> Canvas:
    """Paint a detail: what is face or head stays so."""
    return canvas._replace(rgb=mix(canvas.rgb, alpha, colour))


def cover(canvas: Canvas, alpha: Plane, colour: Colour, *, face: float, head: float) -> Canvas:
    """Paint a surface that is (1) or is not (0) face and head, over what was there."""
    return Canvas(
        rgb=mix(canvas.rgb, alpha, colour),
        face=canvas.face + alpha * (face - canvas.face),
        head=canvas.head + alpha * (head - canvas.head),
    )


def shadow(canvas: Canvas, alpha: Plane) -> Canvas:
    """Darken with a warm shadow."""
    return tint(canvas, alpha, canvas.rgb * as_planes((0.67, 0.55, 0.57)))
