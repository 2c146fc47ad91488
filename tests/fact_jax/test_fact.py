"""The composition: guidance branches by hand, the window of the face, noise by seed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fact_jax.fact import Guidance, combine_photos, guided_model, initial_noise
from fact_jax.regions import region_masks
from fact_jax.utils.errors import UserError
from tests.fact_jax.tiny import FACE_DIM, TEXT_DIM, normal, tiny_unet

pytestmark = pytest.mark.heavy

X, T = normal(1, 2, 4, 6, 4), jnp.asarray(321)
TEXT, NEGATIVE = normal(2, 2, 5, TEXT_DIM), normal(3, 2, 5, TEXT_DIM)
FACE, NULL = normal(4, 2, 16, FACE_DIM), normal(5, 1, 16, FACE_DIM)
STEPS = 10
GRAPH, STATE = nnx.split(tiny_unet())


@jax.jit
def _unet(state, text, face, scale):
    return nnx.merge(GRAPH, state)(X, T, text, face=face, face_scale=scale)


def unet(text, face, scale=0.8):
    """One branch alone."""
    return _unet(STATE, text, jnp.broadcast_to(face, FACE.shape), jnp.asarray(scale, jnp.float32))


def guided(guidance: Guidance, face=FACE, no_face=NULL, regions=None):
    """The guided model at a step of the trajectory."""

    @jax.jit
    def run(state, i):
        model = guided_model(
            nnx.merge(GRAPH, state),
            text=TEXT,
            negative_text=NEGATIVE,
            face=face,
            no_face=no_face,
            regions=regions,
            guidance=guidance,
            steps=STEPS,
        )
        return model(X, T, i)

    return lambda step=4: run(STATE, jnp.asarray(step))


def assert_same(ours, by_hand):
    assert by_hand.std() > 0.1
    np.testing.assert_allclose(ours, by_hand, rtol=0, atol=1e-4)


def test_away_from_the_null_face():
    negative, positive = unet(NEGATIVE, NULL), unet(TEXT, FACE)
    guidance = Guidance(text=5.0, face_scale=0.8)
    assert_same(guided(guidance)(), negative + 5 * (positive - negative))


def test_away_from_the_same_face():
    negative, positive = unet(NEGATIVE, FACE), unet(TEXT, FACE)
    guidance = Guidance(text=3.0, face_scale=0.8, negative_face="same")
    expected = negative + 3 * (positive - negative)
    assert_same(guided(guidance, no_face=None)(), expected)


def test_three_branches():
    none, text, both = unet(NEGATIVE, NULL), unet(TEXT, NULL), unet(TEXT, FACE)
    guidance = Guidance(text=4.0, face=2.0, face_scale=0.8)
    assert_same(guided(guidance)(), none + 4 * (text - none) + 2 * (both - text))


def test_no_guidance_is_one_call():
    assert_same(guided(Guidance(text=1.0, face_scale=0.8), no_face=None)(), unet(TEXT, FACE))


def test_no_face_is_the_base():
    """Also where the guidance speaks of a face."""
    negative, positive = unet(NEGATIVE, NULL, 0.0), unet(TEXT, FACE, 0.0)
    guidance = Guidance(text=5.0, face=2.0)
    expected = negative + 5 * (positive - negative)
    assert_same(guided(guidance, face=None, no_face=None)(), expected)


def test_outside_the_window_the_adapter_is_silent():
    run = guided(Guidance(text=1.0, face_scale=0.8, start=0.3, stop=0.6))
    base, adapted = unet(TEXT, FACE, 0.0), unet(TEXT, FACE)
    assert np.abs(base - adapted).max() > 0.1
    for step, expected in ((2, base), (3, adapted), (5, adapted), (6, base)):
        assert_same(run(step), expected)


@pytest.mark.parametrize(
    ("start", "stop", "steps", "inside"),
    [
        (0.0, 1.0, 5, [0, 1, 2, 3, 4]),
        (0.3, 0.7, 10, [3, 4, 5, 6]),
        (0.25, 0.5, 5, [2]),
        (0.5, 0.5, 4, []),
        (0.9, 1.0, 4, []),
        (0.29, 1.0, 100, list(range(29, 100))),
    ],
)
def test_window_by_hand(start, stop, steps, inside):
    guidance = Guidance(face_scale=0.5, start=start, stop=stop)
    scales = jax.vmap(lambda i: guidance.scale_at(i, steps))(jnp.arange(steps))
    expected = np.zeros(steps)
    expected[inside] = 0.5
    np.testing.assert_array_equal(scales, expected)


def test_schedule_by_hand():
    """Over the whole trajectory, whatever the window; a schedule as long as it is itself."""
    guidance = Guidance(face_scale=(0.2, 1.0, 0.0), start=0.2)
    scales = jax.vmap(lambda i: guidance.scale_at(i, 5))(jnp.arange(5))
    np.testing.assert_allclose(scales, [0.0, 0.6, 1.0, 0.5, 0.0], atol=1e-7)
    table = jnp.asarray([0.3, 0.1, 0.7])
    again = jax.vmap(lambda i: Guidance(face_scale=table).scale_at(i, 3))(jnp.arange(3))
    np.testing.assert_allclose(again, table, atol=1e-7)
    assert Guidance(face_scale=(0.3, 0.9)).scale_at(jnp.asarray(0), 1) == jnp.float32(0.3)


def test_blocks_have_strengths_of_their_own():
    """The first pattern that is found counts; with all blocks at 0 there is the base."""
    paths = ["down_blocks.0.x", "mid_block.x", "up_blocks.0.x", "up_blocks.1.x"]
    guidance = Guidance(block_scales=((r"up_blocks\.1", 0.5), ("^up", 2.0), ("down", 0.0)))
    assert guidance.block_factors(paths) == (0.0, 1.0, 2.0, 0.5)
    with pytest.raises(UserError, match=r"block scale 'middle': found in the path of no block"):
        Guidance(block_scales=(("middle", 0.5),)).block_factors(paths)

    plain = Guidance(text=1.0, face_scale=0.8)
    half = dataclasses.replace(plain, face_scale=1.6, block_scales=((".", 0.5),))
    heard = guided(plain)()
    assert_same(guided(half)(), heard)
    silent = guided(dataclasses.replace(plain, block_scales=((".", 0.0),)))()
    np.testing.assert_array_equal(silent, guided(plain, face=None)())
    middle = dataclasses.replace(plain, block_scales=(("mid_block", 1.0), (".", 0.0)))
    with_middle = guided(middle)()
    assert np.abs(with_middle - silent).max() > 0.01
    assert np.abs(with_middle - heard).max() > 0.01


def test_controls_reach_the_adapters():
    """In every branch: with hardly any increment allowed the picture is the base's."""
    plain = Guidance(text=3.0, face_scale=0.8)
    base, heard = guided(plain, face=None)(), guided(plain)()
    capped = guided(dataclasses.replace(plain, cap=1e-6))()
    np.testing.assert_allclose(capped, base, atol=1e-4)
    assert np.abs(heard - base).max() > 0.1
    assert np.abs(guided(dataclasses.replace(plain, adain=True))() - heard).max() > 0.01
    masks = np.zeros((1, 2, 4, 6), np.float32)
    masks[:, 0, :, :3] = masks[:, 1, 1, 4] = 1.0
    regions = region_masks(masks, (4, 6), 1)
    drawn = guided(plain, regions=regions)()
    assert np.abs(drawn - heard).max() > 0.01
    nobody = {n: np.zeros_like(mask) for n, mask in regions.items()}
    np.testing.assert_array_equal(guided(plain, regions=nobody)(), base)
    # Both samples of a batch, and both branches, have the regions of the one mask.
    both = {n: np.repeat(mask, 2, axis=0) for n, mask in regions.items()}
    np.testing.assert_array_equal(guided(plain, regions=both)(), drawn)


def test_photos_together_by_hand():
    photos = jnp.asarray([[[3.0, 0.0], [1.0, 1.0]], [[0.0, 5.0], [1.0, 1.0]]])
    np.testing.assert_array_equal(combine_photos(photos, "concat"), photos.reshape(4, 2))
    np.testing.assert_array_equal(combine_photos(photos, "average"), [[1.5, 2.5], [1.0, 1.0]])
    # Halfway between the directions, lengths 3 and 5 on average 4.
    expected = [[4 * 0.5**0.5] * 2, [1.0, 1.0]]
    np.testing.assert_allclose(combine_photos(photos, "normalized"), expected, atol=1e-6)
    one = normal(7, 2, 1, 4, 3)
    for how in ("concat", "average", "normalized"):
        np.testing.assert_allclose(combine_photos(one, how), one[:, 0], atol=1e-6)


def test_the_null_face_must_be_given():
    for guidance in (Guidance(), Guidance(face=2.0)):
        with pytest.raises(UserError, match="needs no_face"):
            guided(guidance, no_face=None)()


def test_impossible_guidance():
    for start, stop in ((-0.1, 1.0), (0.6, 0.5), (0.0, 1.1)):
        with pytest.raises(UserError, match="0 <= start <= stop <= 1"):
            Guidance(start=start, stop=stop)
    for changes, message in (
        ({"face_scale": ()}, "a schedule of face scales needs at least one"),
        ({"face": 2.0, "negative_face": "same"}, "away from the null face: .* give one of the two"),
        ({"cap": 0.0}, "cap of the face's increment must be above 0, got 0"),
        ({"cap": float("nan")}, "must be above 0, got nan"),
        ({"block_scales": (("(", 1.0),)}, r"block scale '\(': not a regular expression"),
    ):
        with pytest.raises(UserError, match=message):
            Guidance(**changes)


def test_noise_belongs_to_its_seed():
    """Whatever the batch; different seeds differ; unit variance."""
    batch = np.asarray(initial_noise(jnp.array([7, 8, 9]), 12, 20, 4))
    assert batch.shape == (3, 12, 20, 4)
    np.testing.assert_array_equal(batch[1:2], initial_noise(jnp.array([8]), 12, 20, 4))
    assert np.abs(batch[0] - batch[1]).max() > 1
    assert abs(batch.std() - 1) < 4 / (2 * batch.size) ** 0.5
    assert abs(batch.mean()) < 4 / batch.size**0.5
