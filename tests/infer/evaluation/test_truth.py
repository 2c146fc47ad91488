"""Measures against the truth of the portrait world, with the judge that ships."""

from pathlib import Path

import numpy as np
import pytest

from fact_infer.evaluation.evaluate import changed_region, measure
from fact_infer.evaluation.world import MetricNetworks, render_people
from fact_jax.face import align_batch
from fact_jax.metrics.identity import cosine, verification_auc
from fact_jax.portraits import SPLITS, make_batch, sample_identity
from fact_jax.portraits.metric_networks import ATTRIBUTES, FACE_FEATURES, face_features

pytestmark = pytest.mark.heavy

COUNT = 48
PROPERTIES = ("expression", "roll", "yaw", "pitch", "mouth", "light")


@pytest.fixture(scope="module")
def networks():
    return MetricNetworks(Path(__file__).parents[3] / "miniature" / "judge")


@pytest.fixture(scope="module")
def people():
    return render_people(COUNT, 1, 48)


@pytest.fixture(scope="module")
def strangers(people):
    """Somebody else in each caption's scene: what a base without the photo draws at best."""
    return make_batch(people.scenes.ids + 1000, people.scenes.ids * 1000 + 500).images


@pytest.fixture(scope="module")
def copies(networks, people, strangers):
    """Measures of pictures that are the reference photos."""
    return measure(networks, people, {"fact": people.first_references, "base": strangers})


@pytest.fixture(scope="module")
def truth(networks, people, strangers):
    """Measures of the people themselves, drawn in the captions' scenes."""
    return measure(networks, people, {"fact": people.scenes.images, "base": strangers})


def test_a_copied_picture_scores_copying_one(copies):
    assert copies["copy_paste/fact"].mean == pytest.approx(1.0, abs=1e-5)
    for name in PROPERTIES:
        assert copies[f"copied/{name}/fact"].mean == pytest.approx(1.0, abs=1e-5), name
    assert copies["reference/fact"].mean == pytest.approx(1.0, abs=1e-5)
    assert copies["caption/all/fact"].mean < 0.6


def test_a_base_picture_leaks_and_copies_nothing(networks, people, strangers):
    same = measure(networks, people, {"fact": strangers, "base": strangers})
    for name in ("head/inside", "head/outside", "face/outside", "over_base", "copied/yaw"):
        assert same[f"{name}/fact"].mean == 0.0, name


def test_rendered_truth_scores_as_true_photos(truth):
    found, photos = truth["reference/fact"], truth["reference/true"]
    assert found.low < photos.mean < found.high
    assert truth["rank_one/fact"].mean >= 0.95
    assert truth["caption/all/fact"].mean >= 0.98
    low, high = truth["copy_paste/fact"][1:3]
    assert low < 0.0 < high
    for name in ("roll", "yaw", "light"):  # which the person does not decide
        assert truth[f"copied/{name}/fact"].low < 0.1, name


def test_facial_features_are_measured_better_than_guessed(networks, people):
    """True photos against their people's true features, and against another person's."""
    seen = networks(people.scenes.images).face_features
    truth = face_features(sample_identity(people.scenes.ids))
    right = np.abs(seen - truth).mean(0)
    ratio = right / np.abs(seen - np.roll(truth, 1, axis=0)).mean(0)
    mouth_width = ratio[6 + FACE_FEATURES[2:].index("mouth_width")]
    assert mouth_width < 0.8  # expressions change it
    assert (ratio[ratio != mouth_width] < 0.6).all(), ratio


def test_copying_is_told_from_truth(copies, truth):
    assert copies["copy_paste/fact"].low > truth["copy_paste/fact"].high


@pytest.mark.slow
def test_larger_pictures_are_seen_as_smaller_ones(networks, people):
    large = render_people(COUNT, 1, 48, size=128)
    one, other = networks(people.first_references), networks(large.first_references)
    assert large.crops.shape == people.crops.shape
    assert cosine(one.embeddings, other.embeddings).mean() > 0.95
    assert all((one.attributes[n] == other.attributes[n]).mean() > 0.97 for n in ATTRIBUTES)
    np.testing.assert_allclose(one.points, other.points, atol=1.0)
    seen = {"fact": other, "base": other}
    assert changed_region(seen, 128).shape == (COUNT, 128, 128)
    assert (changed_region(seen, 128)[:, ::2, ::2] == changed_region(seen, 64)).all()


@pytest.mark.slow
def test_the_judge_tells_unseen_people_apart_and_reads_their_attributes(networks):
    """On 400 people of the test split, two photos each: 800 pictures, 319,600 pairs."""
    ids = np.repeat(np.asarray(SPLITS["test"][-400:]), 2)
    photos = make_batch(ids, ids * 1000 + np.tile([3, 4], 400))
    seen = networks(photos.images)
    auc = verification_auc(seen.embeddings, ids)
    right = {n: (seen.attributes[n] == getattr(photos.portrait, n)).mean() for n in ATTRIBUTES}
    print(f"same or different: AUC {auc:.5f}; attributes {right}")
    assert auc >= 0.99
    assert min(right.values()) >= 0.98
    # The parser's points are as good as the true ones.
    crops = align_batch(photos.images, photos.portrait.points, photos.portrait.head_mask, 48)
    assert verification_auc(networks._recognisers[0](crops), ids) == pytest.approx(auc, abs=0.005)
