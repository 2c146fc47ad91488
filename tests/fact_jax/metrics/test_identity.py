"""Identity metrics on vectors whose angles are known."""

import math

import numpy as np
import pytest

from fact_jax.metrics.identity import (
    angle,
    assign_faces,
    average_recognisers,
    copy_paste,
    cosine,
    rank_one,
    verification_auc,
)
from fact_jax.metrics.intervals import mean_interval

_S = math.sqrt


def test_cosine_of_known_angles():
    a = np.array([[1.0, 0.0], [3.0, 4.0], [1.0, 1.0], [0.0, 0.0]])
    b = np.array([[0.0, 2.0], [6.0, 8.0], [-5.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(cosine(a, b), [0, 1, -math.sqrt(0.5), 0], atol=1e-12)


def test_rank_one_needs_the_own_row_to_be_strictly_nearest():
    gallery = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    queries = np.array([[2.0, 0.1], [1.0, 0.0], [1.0, 1.0]])
    assert rank_one(queries, gallery).tolist() == [True, False, True]
    tied = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert rank_one(tied, tied).tolist() == [False, False, True]


def test_a_gallery_of_fewer_people_than_queries():
    gallery = np.array([[1.0, 0.0], [0.0, 1.0]])
    queries = np.array([[1.0, 0.2], [0.9, 0.1], [0.3, 1.0], [math.nan, math.nan]])
    assert rank_one(queries, gallery, np.array([0, 1, 1, 0])).tolist() == [True, False, True, False]


def test_angles_are_exact_near_zero():
    a = np.array([1.0, 0.0])
    for degrees in (0.0, 1e-7, 60.0, 180.0):
        b = 3 * np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
        assert math.degrees(angle(a, b)) == pytest.approx(degrees, rel=1e-9, abs=1e-12)


def _plane(degrees: float) -> np.ndarray:
    return np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), 0.0])


# Target, reference and picture, and the score worked out by hand:
# (picture to target - picture to reference) / (target to reference).
TRIPLES = [
    *((_plane(0), _plane(60), _plane(g), score) for g, score in (
        (0, -1), (60, 1), (30, 0), (45, 1 / 2), (15, -1 / 2), (90, 1), (-30, -1), (40, 1 / 3),
    )),
    *((_plane(0), _plane(90), _plane(g), score) for g, score in (
        (45, 0), (60, 1 / 3), (100, 1), (-45, -1), (72, 3 / 5), (9, -4 / 5),
    )),
    # Out of the plane of target (x) and reference (y): 60, 60; 30, 90; 60, 90; 90, 30; 60, 45.
    *((_plane(0), _plane(90), np.array(g), score) for g, score in (
        ((1 / 2, 1 / 2, _S(1 / 2)), 0),
        ((_S(3) / 2, 0, 1 / 2), -2 / 3),
        ((1 / 2, 0, _S(3) / 2), -1 / 3),
        ((0, _S(3) / 2, 1 / 2), 2 / 3),
        ((1 / 2, _S(1 / 2), 1 / 2), 1 / 6),
    )),
    (_plane(20), _plane(20), _plane(50), 0),  # one photo twice: nothing to be nearer to
]  # fmt: skip


def test_copy_paste_score_of_twenty_triples():
    target, reference, picture = (np.stack([np.asarray(t[i]) for t in TRIPLES]) for i in range(3))
    lengths = np.linspace(0.1, 7, len(TRIPLES))[:, None]  # which do not matter
    found = copy_paste(
        angle(picture * lengths, target), angle(picture, reference), angle(target, reference)
    )
    assert len(TRIPLES) == 20
    np.testing.assert_allclose(found, [t[3] for t in TRIPLES], atol=1e-6)


def test_faces_are_matched_for_the_greatest_sum():
    # Greedy, the first person would take face 0 and leave the second with 0.1.
    assert assign_faces(np.array([[0.9, 0.8], [0.85, 0.1]])).tolist() == [1, 0]
    assert assign_faces(np.array([[0.2], [0.7], [0.1]])).tolist() == [-1, 0, -1]
    assert assign_faces(np.array([[0.2, 0.9, 0.3]])).tolist() == [1]


def test_the_cosine_of_several_recognisers_is_their_mean():
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=(2, 5, 7)), 9 * draw.normal(size=(2, 5, 3))
    a, b = (average_recognisers([one[i], other[i]]) for i in (0, 1))
    wanted = (cosine(one[0], one[1]) + cosine(other[0], other[1])) / 2
    np.testing.assert_allclose(cosine(a, b), wanted, atol=1e-12)


def test_area_under_the_curve_of_four_photos():
    # Same: 0-1 (cos 0.8), 2-3 (cos 0.6). Others: 0.6, 0, 1, 0.8 -> of 8 pairs of pairs, above:
    # 0.8 over 0.6, 0 and half 0.8 = 2.5; 0.6 over 0 and half 0.6 = 1.5: 4 / 8.
    u = np.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    photos = np.stack([u[0], u[1], u[1], u[3]])
    cosines = {(0, 2): 0.8, (0, 3): 0.0, (1, 2): 1.0, (1, 3): 0.6}
    for (i, j), value in cosines.items():
        assert cosine(photos[i], photos[j]) == pytest.approx(value)
    assert verification_auc(photos, np.array([0, 0, 1, 1])) == pytest.approx(0.5)
    apart = verification_auc(np.stack([u[0], u[0], u[3], u[3]]), np.array([0, 0, 1, 1]))
    assert apart == 1.0


def _photos(draw: np.random.Generator, people: np.ndarray, spread: float) -> np.ndarray:
    return people + spread * draw.normal(size=people.shape)


@pytest.mark.parametrize(("copied", "least", "most"), [(0.2, 0.99, 1.0), (0.0, 0.0, 0.05)])
def test_planted_copying_is_found_among_96_people(copied, least, most, monkeypatch):
    """One picture in five is the reference photo itself; true photos of one person are alike by
    0.46, as in MultiID-Bench. Found: the interval of the mean score lies above 0."""
    monkeypatch.setattr("fact_jax.metrics.intervals.RESAMPLINGS", 1000)
    draw, found, runs = np.random.default_rng(7), 0, 400 if least else 200
    for _ in range(runs):
        people = draw.normal(size=(96, 128))
        reference, target, picture = (_photos(draw, people, 1.083) for _ in range(3))
        copies = draw.random(96) < copied
        picture = np.where(copies[:, None], reference, picture)
        scores = copy_paste(
            angle(picture, target), angle(picture, reference), angle(target, reference)
        )
        found += mean_interval(scores).low > 0
    assert cosine(reference, target).mean() == pytest.approx(0.46, abs=0.03)
    assert least <= found / runs <= most
