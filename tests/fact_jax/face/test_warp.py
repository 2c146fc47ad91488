"""The alignment with gradients against the one that makes crops."""

import jax
import jax.numpy as jnp
import numpy as np

from fact_jax.face import align_batch
from fact_jax.face.warp import crop_to_picture, warp_crops


def test_crops_are_those_of_the_alignment_before_rounding():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)
    points = np.array([[18, 14], [34, 15], [26, 22], [20, 30], [32, 31]], float)
    points = points + rng.normal(0, 1.5, (3, 5, 2))
    points[2] -= 15  # a part of this crop lies outside of the picture
    wanted = align_batch(images, points, size=24)
    matrices = jnp.asarray(crop_to_picture(points, 24))
    found = warp_crops(jnp.asarray(images, jnp.float32), matrices, 24, 0.0)
    # Rounded to whole levels there; coordinates are rounded otherwise by one float32 step.
    np.testing.assert_allclose(found, wanted, atol=0.51)
    assert (np.asarray(found)[2] == 0).any()


def test_gradient_is_that_of_bilinear_interpolation():
    """Halfway between four pixels each has a quarter of the gradient."""
    half = jnp.asarray([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]])
    gradient = jax.grad(lambda image: warp_crops(image, half, 1, -1.0).sum())(
        jnp.ones((1, 3, 3, 1))
    )
    np.testing.assert_allclose(gradient[0, :, :, 0], [[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]])
