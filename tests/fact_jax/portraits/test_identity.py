"""People: disjoint splits, the same person for the same number, wide variety."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_jax.portraits import SPLITS, sample_identity
from fact_jax.portraits.identity import FACIAL_HAIR, HAIR_STYLES

pytestmark = pytest.mark.heavy


def test_splits_share_nobody():
    assert set(SPLITS) == {"base", "encoder", "adapter", "judge", "test"}
    for (_, one), (_, other) in combinations(SPLITS.items(), 2):
        assert max(one.start, other.start) >= min(one.stop, other.stop)
    assert all(len(people) >= 2000 for people in SPLITS.values())


def test_a_number_is_one_person_whatever_stands_beside_it(optimized):
    alone = sample_identity(jnp.asarray([80_123]))
    among = sample_identity(jnp.asarray([4, 80_123, 5]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[1]), alone, among)


def test_parameters_spread_over_their_ranges():
    people = jax.tree.map(np.asarray, sample_identity(jnp.arange(2000)))
    assert set(people.hair_style) == set(range(len(HAIR_STYLES)))
    assert set(people.facial_hair) == set(range(len(FACIAL_HAIR)))
    for name in ("face_width", "eye_distance", "nose_length", "mouth_width", "brow_tilt"):
        values = getattr(people, name)
        low, high = values.min(), values.max()
        # Uniform: each quarter of the range holds about a quarter of the people.
        counts, _ = np.histogram(values, bins=4, range=(low, high))
        assert counts.min() > 0.2 * len(values), name
    for colour in (people.skin, people.hair, people.iris, people.lips):
        assert colour.min() >= 0.0
        assert colour.max() <= 1.0


def test_parameters_are_independent():
    """No two cues say the same thing, so a person is told by many of them."""
    people = sample_identity(jnp.arange(2000))
    names = ("face_width", "face_length", "eye_distance", "eye_size", "nose_length", "mouth_width")
    table = np.stack([np.asarray(getattr(people, name)) for name in names])
    correlation = np.corrcoef(table) - np.eye(len(names))
    assert np.abs(correlation).max() < 0.1
