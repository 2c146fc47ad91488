"""The resampler alone, before the adapter: face tokens tell the encoder's embedding."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from fact_jax.models.resampler import Resampler, ResamplerConfig
from fact_train.plan.abstract_task import build
from fact_train.tasks.adapter import AdapterTask
from fact_train.tasks.adapter_init import _whitened, pretrain_resampler
from tests.train.tiny import tiny_config

COUNT = 2400
CONFIG = ResamplerConfig(
    dim=32, depth=1, dim_head=8, heads=2, num_queries=4, embedding_dim=16, output_dim=8
)


@pytest.fixture(scope="module")
def faces():
    """Tokens of 2,400 photos, and embeddings: four numbers that the tokens hold faintly."""
    draw = np.random.default_rng(0)
    scenes, facts = draw.normal(size=(COUNT, 6)), draw.normal(size=(COUNT, 4))
    tokens = draw.normal(size=(6, 16)) + 0.3 * np.einsum(
        "nf,ftd->ntd", facts, draw.normal(size=(4, 6, 16))
    )
    tokens += np.einsum("nf,ftd->ntd", scenes, draw.normal(size=(6, 6, 16)))
    embeddings = facts @ draw.normal(size=(4, 12)) + 5.0
    return tokens.astype(np.float32), embeddings.astype(np.float32)


def fresh():
    return Resampler(CONFIG, rngs=nnx.Rngs(0))


def face_tokens(resampler, tokens):
    return np.asarray(resampler(jax.numpy.asarray(tokens)))


def linear_r2(face, embeddings, seen=2100):
    """By least squares, of photos that neither it nor the resampler saw."""
    inputs = np.c_[face.reshape(len(face), -1), np.ones(len(face))]
    targets = embeddings - embeddings.mean(0)
    weights, *_ = np.linalg.lstsq(inputs[:seen], targets[:seen], rcond=None)
    missed = ((inputs[seen:] @ weights - targets[seen:]) ** 2).sum()
    return 1 - missed / (targets[seen:] ** 2).sum()


def test_a_linear_map_finds_more_afterwards(faces):
    tokens, embeddings = faces
    before = linear_r2(face_tokens(fresh(), tokens), embeddings)
    trained, told = pretrain_resampler(fresh(), tokens, embeddings, 400, jax.random.key(0))
    after = linear_r2(face_tokens(trained, tokens), embeddings)
    assert after > before + 0.2
    assert after > 0.8
    assert told == pytest.approx(after, abs=0.15)


def test_what_adapters_know_moves_less_where_it_is_kept(faces):
    tokens, embeddings = faces
    start = face_tokens(fresh(), tokens)
    free, kept = (
        pretrain_resampler(fresh(), tokens, embeddings, 100, jax.random.key(0), keep=keep)[0]
        for keep in (0.0, 10.0)
    )
    moved = [((face_tokens(one, tokens) - start) ** 2).mean() for one in (free, kept)]
    assert moved[1] < 0.3 * moved[0]
    assert moved[1] > 0


def test_the_same_key_gives_the_same_bits_and_another_gives_others(faces):
    first, again, other = (
        face_tokens(pretrain_resampler(fresh(), *faces, 5, jax.random.key(key))[0], faces[0])
        for key in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_whitened_are_the_directions_that_vary(faces):
    white = _whitened(faces[1])
    assert white.shape == (COUNT, 4)
    np.testing.assert_allclose(white.T @ white / COUNT, np.eye(4), atol=1e-4)
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-5)


@pytest.mark.heavy
def test_a_task_starts_from_it(miniature, monkeypatch):
    from fact_train.tasks import adapter

    monkeypatch.setattr(adapter, "PRETRAINED_ON", 40)
    plain = AdapterTask(tiny_config(miniature))
    trainable, frozen = plain.init(jax.random.key(0))
    config = tiny_config(miniature, pretrain_resampler=3)
    task = AdapterTask(config)
    more, same = task.init(jax.random.key(0))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), trainable, more)
    assert all(jax.tree.leaves(changed["resampler"]["proj_in"]))
    assert not any(jax.tree.leaves(changed["adapter"]))
    jax.tree.map(np.testing.assert_array_equal, frozen, same)
    assert "after 3 steps of its own on 40 photos" in task.notes[-1]
    shapes = build(config).state.params["resampler"]
    assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(
        lambda a: a.shape, more["resampler"]
    )
    with pytest.raises(ValueError, match="pretrain_resampler takes the photos of records"):
        dataclasses.replace(config.options, cache="data/cache")
