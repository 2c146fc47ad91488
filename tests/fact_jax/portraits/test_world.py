"""The portrait world: what is drawn, and that the labels are true of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_jax.portraits import make_batch, portraits, render, sample_identity, sample_scene
from fact_jax.portraits.scene import EXPRESSIONS, GLASSES

pytestmark = pytest.mark.heavy

COUNT = 512
# Mean colour and nose tip of three portraits: weights in this repository depend on them.
GOLDEN_MEANS = [[0.6939, 0.656, 0.6253], [0.5417, 0.5693, 0.623], [0.8023, 0.6937, 0.4251]]
GOLDEN_NOSES = [[31.004, 39.22], [32.323, 35.821], [29.636, 40.731]]


@pytest.fixture(scope="module")
def many():
    return make_batch(range(COUNT), range(1000, 1000 + COUNT))


def sample_at(planes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The value of each picture's nearest pixel at each of its points."""
    column, row = np.rint(points).astype(int).transpose(2, 0, 1)
    return planes[np.arange(len(planes))[:, None], row, column]


def test_everything_is_finite_and_in_range(many):
    portrait = many.portrait
    for name, values in portrait._asdict().items():
        assert np.isfinite(values).all(), name
    for values in (portrait.image, portrait.face_mask, portrait.head_mask, portrait.skin):
        assert values.min() >= 0.0
        assert values.max() <= 1.0 + 1e-6
    assert portrait.image.shape == (COUNT, 64, 64, 3)
    assert portrait.points.shape == (COUNT, 5, 2)
    assert many.images.dtype == np.uint8


def test_same_numbers_give_the_same_pictures_in_any_batch(many):
    again = make_batch([7, 300, 7], [1007, 1300, 1007])
    rows = [7, 300, 7]
    np.testing.assert_array_equal(again.portrait.image, many.portrait.image[rows])
    np.testing.assert_array_equal(again.portrait.points, many.portrait.points[rows])
    assert again.captions == [many.captions[i] for i in rows]


def test_pictures_are_those_the_shipped_weights_were_trained_on():
    portrait = make_batch([0, 1, 80_000], [0, 1, 2]).portrait
    np.testing.assert_allclose(portrait.image.mean((1, 2)), GOLDEN_MEANS, atol=1e-3)
    np.testing.assert_allclose(portrait.points[:, 2], GOLDEN_NOSES, atol=1e-3)


def test_masks_nest_and_leave_room(many):
    face, head = many.portrait.face_mask, many.portrait.head_mask
    assert (face <= head + 1e-6).all()
    assert (face.sum((1, 2)) > 250).all()
    heights = [np.ptp(np.flatnonzero((mask > 0.5).any(1))) + 1 for mask in head]
    assert 40 < np.mean(heights) < 50
    # The shoulders are neither.
    assert head[:, -1, 32].max() < 1e-6


def test_points_lie_on_the_face_in_order(many):
    points = many.portrait.points
    assert (sample_at(many.portrait.face_mask, points) > 0.9).all()
    left, right, nose, mouth_left, mouth_right = points.transpose(1, 0, 2)
    assert (right[:, 0] - left[:, 0] > 10).all()
    assert (mouth_right[:, 0] - mouth_left[:, 0] > 3).all()
    assert (nose[:, 1] > np.minimum(left[:, 1], right[:, 1])).all()
    assert (np.maximum(mouth_left[:, 1], mouth_right[:, 1]) > nose[:, 1]).all()


def test_pupils_are_drawn_at_the_eye_points(many):
    """The darkest spot of the bright eye is its point: dark at it, bright white beside it."""
    bare = many.portrait.glasses == GLASSES.index("none")
    brightness = many.portrait.image[bare].mean(-1)
    for eye in (0, 1):
        point = many.portrait.points[bare][:, eye : eye + 1]
        at_pupil = sample_at(brightness, point)[:, 0]
        assert np.median(at_pupil) < 0.35
        beside = [sample_at(brightness, point + [[[dx, 0.0]]])[:, 0] for dx in (-3.0, 3.0)]
        assert np.median(np.maximum(*beside) - at_pupil) > 0.3


def test_true_colours_are_the_painted_ones(many):
    """Between the eyes a bare face shows its skin, up to light and shade."""
    bare = many.portrait.glasses == GLASSES.index("none")
    between = many.portrait.points[bare][:, :2].mean(1, keepdims=True)
    painted = sample_at(many.portrait.image[bare], between)[:, 0]
    error = np.abs(painted - many.portrait.skin[bare]).mean(-1)
    assert np.median(error) < 0.12
    wrong = np.abs(painted - np.roll(many.portrait.skin[bare], 1, axis=0)).mean(-1)
    assert np.median(error) < 0.6 * np.median(wrong)


def test_one_person_in_two_scenes_and_two_people_in_one():
    portrait = make_batch([5, 5, 6], [1, 2, 1]).portrait
    np.testing.assert_array_equal(portrait.skin[0], portrait.skin[1])
    np.testing.assert_array_equal(portrait.hair[0], portrait.hair[1])
    assert np.abs(portrait.skin[0] - portrait.skin[2]).max() > 0.01
    for name in ("expression", "glasses", "shirt", "background", "pattern"):
        labels = getattr(portrait, name)
        assert labels[0] == labels[2], name
    outside = (portrait.head_mask[0] == 0) & (portrait.head_mask[2] == 0)
    corner = outside[:12]  # above the shoulders only the background remains, which is the scene's
    np.testing.assert_allclose(
        portrait.image[0, :12][corner], portrait.image[2, :12][corner], atol=1e-6
    )


def test_larger_pictures_show_the_same_thing():
    small = make_batch([3, 9], [4, 8]).portrait
    large = jax.tree.map(np.asarray, portraits(jnp.asarray([3, 9]), jnp.asarray([4, 8]), size=128))
    halved = large.image.reshape(2, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(halved - small.image).mean() < 0.02
    np.testing.assert_allclose(large.points, (small.points + 0.5) * 2 - 0.5, atol=1e-3)


def test_surprise_opens_the_mouth():
    """The mouth's middle is dark when surprised: the label says what is drawn."""
    who = sample_identity(jnp.arange(32))
    scene = sample_scene(jnp.arange(32))
    darkness = {}
    for name in ("neutral", "surprised"):
        index = jnp.full_like(scene.expression, EXPRESSIONS.index(name))
        portrait = jax.tree.map(np.asarray, render(who, scene._replace(expression=index)))
        middle = portrait.points[:, 3:].mean(1, keepdims=True)
        darkness[name] = sample_at(portrait.image.mean(-1), middle)[:, 0]
    assert (darkness["surprised"] < 0.45).all()
    assert darkness["surprised"].mean() < darkness["neutral"].mean()


def test_unequal_lists_are_refused():
    with pytest.raises(ValueError, match="equally long"):
        make_batch([1, 2], [3])
