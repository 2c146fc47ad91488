"""What the adapter's loss makes of its settings: captions, weights, what is told by block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_convert import tokenize
from fact_jax.curriculum import Drop, Stage
from fact_jax.losses import min_snr_weight
from fact_train.engine.state import path_name
from fact_train.tasks.adapter import AdapterTask
from tests.train.tiny import tiny_config

pytestmark = pytest.mark.heavy

NEVER = Drop(face=0.0, text=0.0, both=0.0)


@pytest.fixture(scope="module")
def parts(miniature):
    """(task, trainable with open gates, frozen, a batch)."""
    task = AdapterTask(tiny_config(miniature, drop=NEVER))
    trainable, frozen = task.init(jax.random.key(0))
    batch = {k: jnp.asarray(v) for k, v in next(task.source().batches(0, np.arange(4))).items()}
    return task, jax.tree.map(lambda leaf: leaf + 0.3, trainable), frozen, batch


def loss_of(parts, batch=None, seed=5, step=0, **options):
    """The loss and metrics with other options, all samples at one timestep."""
    task, trainable, frozen, given = parts
    batch = given if batch is None else batch
    task.options = dataclasses.replace(task.config.options, **options)
    keys = jnp.broadcast_to(jax.random.key(seed), len(batch["latents"]))
    loss, metrics = task.loss(trainable, frozen, batch, step=jnp.asarray(step), keys=keys)
    return float(loss), {name: float(value) for name, value in metrics.items()}


def test_null_condition_is_the_resampler_of_zeros(parts):
    """With every face dropped, the condition no longer depends on whose photo it was."""
    batch = parts[-1]
    other = batch | {name: batch[name][::-1] for name in ("tokens", "partner")}
    heard, dropped = (
        [
            loss_of(parts, data, drop=Drop(face=face, text=0.0, both=0.0))[0]
            for data in (batch, other)
        ]
        for face in (0.0, 1.0)
    )
    assert heard[0] != heard[1]
    assert dropped[0] == dropped[1]


def with_caption(parts, text):
    task, *_, batch = parts
    ids = tokenize(task.pipeline.tokenizer, [text])[0]
    return batch | {"ids": jnp.broadcast_to(ids, batch["ids"].shape)}


def test_a_generic_caption_takes_the_place_of_the_own_one(parts):
    caption = "a person with round glasses"
    own = loss_of(parts)[0]
    told = loss_of(parts, with_caption(parts, caption))[0]
    assert own != pytest.approx(told, rel=1e-4)
    replaced = loss_of(parts, generic_caption_probability=1.0, generic_caption=caption)[0]
    assert replaced == pytest.approx(told, rel=1e-5)


def test_a_stage_without_cross_attention_hears_no_text_at_all(parts):
    stages = (Stage(steps=2, text="no_cross_attention"), Stage(steps=2, text="empty_caption"))
    off, metrics = loss_of(parts, stages=stages, step=1)
    assert (metrics["curriculum/text"], metrics["curriculum/cross_attention"]) == (0, 0)
    empty, metrics = loss_of(parts, stages=stages, step=2)
    assert (metrics["curriculum/text"], metrics["curriculum/cross_attention"]) == (0, 1)
    assert off != pytest.approx(empty, rel=1e-4)
    # The same as on a base whose text cross-attention answers 0 to everything.
    task, trainable, frozen, batch = parts
    deaf = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * ("attn2/to_out" not in path_name(path)), frozen
    )
    assert loss_of((task, trainable, deaf, batch), stages=stages, step=2)[0] == off


def test_a_stage_with_the_empty_caption_reads_no_other(parts):
    stages = (Stage(steps=2, text="empty_caption"), Stage(steps=2))
    empty = loss_of(parts, with_caption(parts, ""), stages=stages, step=2)[0]
    silent, metrics = loss_of(parts, stages=stages, step=1, generic_caption_probability=1.0)
    assert silent == pytest.approx(empty, rel=1e-5)
    assert metrics["curriculum/text"] == 0
    read, metrics = loss_of(parts, stages=stages, step=2)
    assert read != pytest.approx(empty, rel=1e-4)
    assert metrics["curriculum/text"] == 1


def test_min_snr_weighs_a_sample_by_its_timestep(parts):
    schedule = parts[0].pipeline.schedule
    possible = min_snr_weight(schedule, jnp.arange(schedule.num_train_timesteps), 5.0)
    stages = (Stage(steps=1),)
    ratios = []
    for seed in (1, 2, 3):
        loss, metrics = loss_of(parts, seed=seed, stages=stages, min_snr=5.0)
        ratios.append(loss / metrics["loss/mse"])
        assert np.abs(possible / ratios[-1] - 1).min() < 1e-3
    assert len({round(ratio, 6) for ratio in ratios}) == 3


def test_what_is_near_the_points_weighs_more(parts):
    batch = parts[-1]
    stages = (Stage(steps=1),)
    plain = loss_of(parts, stages=stages)[0]
    face = jnp.asarray([[5.0, 6.0], [11.0, 6.0], [8.0, 9.0], [6.0, 12.0], [10.0, 12.0]])

    def with_points(points, weight):
        given = batch | {"points": jnp.broadcast_to(points, (len(batch["latents"]), 5, 2))}
        return loss_of(parts, given, stages=stages, point_weight=weight)[0]

    assert with_points(face - 1000.0, 3.0) == pytest.approx(plain, rel=1e-6)
    # Eyes so far apart that all of the photo is near one of them.
    assert with_points(face.at[1].add(1e6), 3.0) == pytest.approx(4.0 * plain, rel=1e-5)
    more = with_points(face, 3.0) - plain
    assert 0.1 * plain < more < 2.0 * plain
    assert with_points(face, 6.0) - plain == pytest.approx(2 * more, rel=1e-4)


def test_noise_offset_changes_the_noise(parts):
    plain, shifted, more = (
        np.asarray([loss_of(parts, seed=seed, noise_offset=x)[0] for seed in range(4)])
        for x in (0.0, 0.1, 10.0)
    )
    assert (plain != shifted).all()
    # The model of this test answers about nothing: its error is the target, in which there is the
    # more noise the earlier the timestep that a seed draws.
    assert more.max() > 10 * plain.max()


def test_fair_and_gates_by_block(parts):
    _, trainable, *_ = parts
    _, metrics = loss_of(parts)
    names = ["down.0.0.0", "mid.0.0"]
    for kind in ("fair", "alpha_attn", "alpha_dense"):
        found = [name for name in metrics if name.startswith(f"block/{kind}/")]
        assert found == [f"block/{kind}/{name}" for name in names]
    fair = [metrics[f"block/fair/{name}"] for name in names]
    assert metrics["loss/fair"] == pytest.approx(np.mean(fair), rel=1e-5)
    assert len(set(fair)) == 2
    face = trainable["adapter"]["mid_block"]["attentions"][0]["transformer_blocks"][0]["face"]
    assert metrics["block/alpha_attn/mid.0.0"] == pytest.approx(float(face["alpha_attn"]))
    assert metrics["gate/attn"] == pytest.approx(np.tanh(1.3), rel=1e-5)
