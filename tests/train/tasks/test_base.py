"""The base's task on a tiny autoencoder: exported, and trained on from there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_convert import load_pipeline
from fact_convert.models.pipeline import save_part
from fact_jax.models.unet import UNetConfig
from fact_jax.models.vae import VAEConfig
from fact_jax.utils.errors import UserError
from fact_train.config import TrainConfig
from fact_train.engine.partition import paths
from fact_train.tasks.base import BaseOptions, BaseTask
from tests.models import random_model

pytestmark = pytest.mark.heavy

UNET = UNetConfig(
    block_out_channels=(8, 16),
    down_attention=(False, True),
    up_attention=(True, False),
    layers_per_block=1,
    cross_attention_dim=64,
    heads=(1, 2),
    norm_num_groups=2,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "vae"
    vae = VAEConfig(
        sample_size=64, block_out_channels=(4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    save_part(random_model("vae", vae), folder, "diffusion_pytorch_model")
    options = BaseOptions(unet=UNET, vae=str(folder), people=2, photos=1)
    return TrainConfig(task="base", steps=1, batch_size=2, options=options)


def with_options(config, **options):
    return dataclasses.replace(config, options=dataclasses.replace(config.options, **options))


def test_it_learns_on_from_what_it_exported(config, tmp_path):
    task = BaseTask(config)
    trainable, frozen = task.init(jax.random.key(0))
    moved = jax.tree.map(lambda leaf: leaf + 0.125, trainable)
    task.export(moved, frozen, tmp_path, 1)
    assert load_pipeline(tmp_path / "base").unet.config.sample_size == 16
    again, _ = BaseTask(with_options(config, weights=str(tmp_path / "base"))).init(
        jax.random.key(1)
    )
    jax.tree.map(np.testing.assert_array_equal, again, moved)
    latents = np.random.default_rng(0).standard_normal((2, 16, 16, 4), np.float32)
    batch = {
        "latents": latents,
        "ids": np.ones((2, 32), np.int32),
        "head": np.ones((2, 16, 16), np.float32),
    }
    keys = jax.random.split(jax.random.key(2), 2)
    loss, _ = jax.jit(lambda one, some: task.loss(one, frozen, some, step=0, keys=keys))(
        again, batch
    )
    assert np.isfinite(loss)

    wider = dataclasses.replace(UNET, block_out_channels=(8, 32))
    with pytest.raises(UserError, match="has a unet of another size"):
        BaseTask(with_options(config, weights=str(tmp_path / "base"), unet=wider))
    with pytest.raises(UserError, match="nowhere"):
        BaseTask(with_options(config, weights="nowhere"))


def test_blocks_are_added_that_change_nothing_until_they_learn(config, tmp_path):
    task = BaseTask(config)
    task.export(*task.init(jax.random.key(0)), tmp_path, 1)
    weights = str(tmp_path / "base")
    more = dataclasses.replace(UNET, up_attention=(True, True))
    grown = BaseTask(with_options(config, weights=weights, unet=more))
    assert [note.split(" that ")[0] for note in grown.notes] == [
        "options.unet has 2 transformer blocks"
    ]
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 16, 16, 4), np.float32)
    text = rng.standard_normal((2, 5, 64), np.float32)
    before, after = (
        one.unet.module(one.unet.arrays)(*map(jnp.asarray, (latents, [3, 700], text)))
        for one in (task, grown)
    )
    np.testing.assert_array_equal(before, after)
    added = dict(paths(grown.unet.arrays)).keys() - dict(paths(task.unet.arrays)).keys()
    assert {name.split("/attentions/")[0] for name in added} == {"up_blocks/1"}

    batch = {
        "latents": latents,
        "ids": np.ones((2, 32), np.int32),
        "head": np.ones((2, 16, 16), np.float32),
    }
    keys = jax.random.split(jax.random.key(2), 2)
    trainable, frozen = grown.init(jax.random.key(1))
    slopes = jax.jit(
        jax.grad(lambda one, some: grown.loss(one, frozen, some, step=0, keys=keys)[0])
    )(trainable, batch)
    moved = {name for name, slope in paths(slopes["unet"]) if name in added and np.any(slope)}
    assert {name.rsplit("/", 2)[1] for name in moved} == {"proj_out"}

    grown.export(trainable, frozen, tmp_path / "grown", 1)
    with pytest.raises(UserError, match="has a unet of another size"):
        BaseTask(with_options(config, weights=str(tmp_path / "grown" / "base")))
