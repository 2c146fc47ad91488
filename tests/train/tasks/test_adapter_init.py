"""The whitened start of the resampler's projection."""

import numpy as np

from fact_train.tasks.adapter_init import whitening


def faces(people=400, positions=6, dim=24, rank=10):
    """Tokens as an encoder's: a large constant for each position, a small part for each photo."""
    draw = np.random.default_rng(0)
    constant = draw.normal(size=(positions, dim)) + 3.0
    small = draw.normal(size=(people, positions, rank)) @ draw.normal(size=(rank, dim)) * 0.02
    return (constant + small).astype(np.float32)


def test_photos_speak_as_loudly_as_positions():
    tokens = faces()
    assert tokens.std(axis=0).mean() < 0.1 * tokens.mean(axis=0).std()
    matrix, bias = whitening(tokens)
    white = tokens @ matrix + bias
    by_photo, by_position = white - white.mean(axis=0), white.mean(axis=0)
    assert 0.5 < by_photo.std() / by_position.std() < 2.0


def test_the_mean_is_removed_and_the_varying_directions_have_unit_variance():
    tokens = faces()
    matrix, bias = whitening(tokens)
    white = (tokens @ matrix + bias).astype(np.float64)
    np.testing.assert_allclose(white.mean(axis=(0, 1)), 0, atol=1e-3)
    rows = (white - white.mean(axis=0)).reshape(-1, white.shape[-1])
    variances = np.linalg.eigvalsh(rows.T @ rows / len(rows))[::-1]
    # 10 directions vary between photos; the positions' 5 are told apart by the constants only.
    np.testing.assert_allclose(variances[:5], 1.0, atol=0.05)
    assert variances[10:].max() < 0.05


def test_equal_photos_give_no_noise():
    """Nothing varies but the positions: rounding must not be blown up to unit variance."""
    tokens = np.repeat(faces(people=1), 8, axis=0)
    matrix, bias = whitening(tokens)
    white = tokens @ matrix + bias
    np.testing.assert_allclose(white, np.broadcast_to(white[:1], white.shape), atol=1e-4)
    assert np.isfinite(white).all()
