"""Losses by hand-computed numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_jax.diffusion.noise_schedules import NoiseSchedule
from fact_jax.losses import (
    arcface_loss,
    denoising_error,
    fair_ratio,
    identity_distance,
    identity_info_nce,
    min_snr_weight,
    normalize,
)
from tests.fact_jax.tiny import normal

# Cells of 2 x 2 mask pixels: all face, half face, a quarter face, none.
MASK = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], jnp.float32)[None]
X = jnp.array([[10.0, 0], [2, 0], [0, 4], [1, 1]])[None]
DELTA = jnp.array([[5.0, 5], [0, 4], [0, 0], [3, 0]])[None]


def test_fair_by_hand():
    """Outside 0, 1/2, 3/4, 1: added^2 = 2^2 + 3^2, there^2 = 1 + 3^2 + 1 + 1."""
    ratio = fair_ratio(X, DELTA, (2, 2), MASK)
    np.testing.assert_allclose(ratio, [(13 / 12) ** 0.5], rtol=1e-6)


def test_fair_of_half_a_picture():
    """Face on the left: sqrt(2 * 3^2) / sqrt(2 * 4^2)."""
    mask = jnp.array([[1.0, 0], [1, 0]])[None]
    x = jnp.array([9.0, 4, 9, 4]).reshape(1, 4, 1)
    delta = jnp.array([7.0, 3, 7, -3]).reshape(1, 4, 1)
    np.testing.assert_allclose(fair_ratio(x, delta, (2, 2), mask), [0.75], rtol=1e-6)


def test_fair_of_cells_that_cut_pixels():
    """Three columns of which the first is face, on two cells: 2/3 and 0 of them are face."""
    mask = jnp.array([[1.0, 0, 0]])[None]
    x, delta = jnp.array([3.0, 2]).reshape(1, 2, 1), jnp.array([6.0, 0]).reshape(1, 2, 1)
    np.testing.assert_allclose(fair_ratio(x, delta, (1, 2), mask), [2 / 5**0.5], rtol=1e-6)


def test_fair_keeps_samples_and_rows_apart():
    """A tall map: the face is its lower row of three."""
    mask = jnp.array([[[0.0], [0], [1]], [[0], [0], [0]]])
    x = jnp.array([[1.0, 1, 50], [2, 2, 1]])[..., None]
    delta = jnp.array([[1.0, 0, 99], [0, 0, 6]])[..., None]
    np.testing.assert_allclose(fair_ratio(x, delta, (3, 1), mask), [0.5**0.5, 2], rtol=1e-6)


@pytest.mark.parametrize(("pixels", "cells"), [(64, 8), (19, 7), (96, 12), (23, 23)])
def test_fair_of_nothing_but_face_is_zero(pixels, cells):
    """Also where the mask's averages are 1 only up to rounding; gradients are zero, not NaN."""
    x, delta = normal(1, 1, cells * cells, 2), normal(2, 1, cells * cells, 2)
    mask = jnp.ones((1, pixels, pixels))
    value, gradient = jax.value_and_grad(lambda d: fair_ratio(x, d, (cells, cells), mask).sum())(
        delta
    )
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_fair_of_a_silent_adapter():
    value, gradient = jax.value_and_grad(lambda d: fair_ratio(X, d, (2, 2), MASK).sum())(0 * DELTA)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_fair_gradients_by_hand():
    """d ||delta o|| / d delta = delta o^2 / ||delta o||; none reaches x."""

    def ratio(x, delta):
        return fair_ratio(x, delta, (2, 2), MASK).sum()

    of_x, of_delta = jax.grad(ratio, argnums=(0, 1))(X, DELTA)
    squares = np.array([0, 1 / 4, 9 / 16, 1]).reshape(1, 4, 1)
    np.testing.assert_allclose(of_delta, DELTA * squares / (13 * 12) ** 0.5, rtol=1e-6)
    np.testing.assert_array_equal(of_x, np.zeros_like(of_x))


def test_fair_has_no_scale():
    ratio = fair_ratio(X, DELTA, (2, 2), MASK)
    np.testing.assert_allclose(fair_ratio(8 * X, 8 * DELTA, (2, 2), MASK), ratio, rtol=1e-6)
    np.testing.assert_allclose(fair_ratio(X, 3 * DELTA, (2, 2), MASK), 3 * ratio, rtol=1e-6)


def test_fair_is_computed_in_single_precision():
    half = fair_ratio(X.astype(jnp.bfloat16), DELTA.astype(jnp.bfloat16), (2, 2), MASK)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, [(13 / 12) ** 0.5], rtol=1e-6)


def test_denoising_error_by_hand():
    output = jnp.array([[1.0, 2], [3, 4]]).reshape(1, 1, 2, 2)
    target = jnp.array([[1.0, 0], [0, 4]]).reshape(1, 1, 2, 2)
    assert denoising_error(output, target) == pytest.approx((4 + 9) / 4)
    weight = jnp.array([2.0, 0.5]).reshape(1, 1, 2)
    assert denoising_error(output, target, weight) == pytest.approx((2 * 4 + 0.5 * 9) / 4)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("epsilon", (5 / 9, 1.0, 1.0)), ("v_prediction", (0.5, 0.675, 0.405))],
)
def test_min_snr_by_hand(prediction, expected):
    """abar 0.9, 0.9 * 0.75, 0.9 * 0.75 * 0.6: only the first SNR, 9, is above 5; 9 + 1 = 10."""
    schedule = NoiseSchedule(
        num_train_timesteps=3, beta_start=0.1, beta_end=0.4, prediction_type=prediction
    )
    np.testing.assert_allclose(min_snr_weight(schedule, jnp.arange(3), 5.0), expected, rtol=1e-6)


def test_arcface_by_hand():
    """Half-way between two classes: the margin costs cos(45°) - cos(45° + m)."""
    embeddings, centres = jnp.array([[3.0, 3.0]]), jnp.array([[2.0, 0], [0, 0.5]])
    margin, scale = 0.4, 8.0
    own, other = np.cos(np.pi / 4 + margin), np.cos(np.pi / 4)
    loss, _ = arcface_loss(embeddings, centres, jnp.array([1]), scale=scale, margin=margin)
    assert loss == pytest.approx(np.log1p(np.exp(scale * (other - own))), rel=1e-5)


def test_arcface_past_the_turn():
    """Opposite its centre an embedding has cos(pi + m) > cos(pi): the margin is taken linearly."""
    embeddings, centres = jnp.array([[0.0, -1.0]]), jnp.array([[1.0, 0], [0, 1]])
    loss, right = arcface_loss(embeddings, centres, jnp.array([1]), scale=1.0, margin=0.5)
    own = -1 - 0.5 * np.sin(0.5)
    assert loss == pytest.approx(np.log1p(np.exp(0 - own)), rel=1e-5)
    assert right == 0


def test_arcface_accuracy_is_without_margin():
    embeddings = jnp.array([[1.0, 0.9], [0.9, 1.0], [1.0, 0.9], [0.0, -1.0]])
    centres = jnp.array([[1.0, 0], [0, 1]])
    assert arcface_loss(embeddings, centres, jnp.array([0, 0, 1, 0]))[1] == 0.5


def test_arcface_gradient_at_the_centre_is_finite():
    centres = jnp.array([[1.0, 0], [0, 1]])
    gradient = jax.grad(lambda e: arcface_loss(e, centres, jnp.array([0]))[0])
    assert np.isfinite(gradient(jnp.array([[2.0, 0.0]]))).all()
    assert np.isfinite(gradient(jnp.zeros((1, 2)))).all()


def test_identity_distance_by_hand():
    found = jnp.array([[3.0, 4], [1, 0], [2, 0]])
    own = jnp.array([[1.0, 0], [0, 5], [-1, 0]])
    np.testing.assert_allclose(identity_distance(found, own), [1 - 0.6, 1, 2], rtol=1e-6)


def test_info_nce_by_hand():
    """Cosines 1 to itself, 0 and -1 to others, by 0.5; the second of the others is the person."""
    found = own = jnp.array([[2.0, 0.0]])
    others = jnp.array([[0.0, 3.0], [1.0, 0.0], [-1.0, 0.0]])
    same = jnp.array([[False, True, False]])
    wanted = np.log(np.exp(2) + np.exp(0) + np.exp(-2)) - 2
    np.testing.assert_allclose(
        identity_info_nce(found, own, others, same, 0.5), [wanted], rtol=1e-6
    )
    nobody = identity_info_nce(found, own, others, same | True, 0.5)
    np.testing.assert_allclose(nobody, [0.0], atol=1e-6)


def test_normalize():
    np.testing.assert_allclose(normalize(jnp.array([[3.0, 4], [0, 0]])), [[0.6, 0.8], [0, 0]])
    np.testing.assert_allclose(normalize(jnp.array([[3.0], [4]]), axis=0), [[0.6], [0.8]])
