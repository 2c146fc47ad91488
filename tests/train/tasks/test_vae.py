"""The autoencoder's task, whole and with its decoder alone, on a tiny one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_convert.models.pipeline import load_part, save_part
from fact_jax.models.vae import VAEConfig
from fact_jax.utils.errors import UserError
from fact_train.config import TrainConfig
from fact_train.engine.partition import merge, paths
from fact_train.tasks.vae import VAEOptions, VAETask, load_vae
from tests.models import random_model

pytestmark = pytest.mark.heavy

TINY = VAEConfig(sample_size=64, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae"
    vae = random_model("vae", dataclasses.replace(TINY, scaling_factor=0.7))
    save_part(vae, path, "diffusion_pytorch_model")
    return path


@pytest.fixture(scope="module")
def task(folder):
    options = VAEOptions(people=2, photos=1, decoder_of=str(folder))
    return VAETask(TrainConfig(task="vae", steps=1, batch_size=2, options=options))


@pytest.mark.parametrize("name", ["nowhere", "nowhere/vae", "miniature/base/unet"])
def test_what_is_no_vae_is_told_in_one_line(name):
    with pytest.raises(UserError, match=name):
        load_vae(name)


def test_the_decoder_alone_learns(task):
    trainable, frozen = task.init(jax.random.key(0))
    learned = {path.split("/")[0] for path, _ in paths(trainable)}
    kept = {path.split("/")[0] for path, _ in paths(frozen)}
    assert learned == {"decoder", "post_quant_conv"}
    assert kept == {"encoder", "quant_conv"}


def test_its_loss_is_that_of_the_whole(task, folder):
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    batch = {"images": jnp.asarray(images), "head": jnp.full((2, 64, 64), 255, jnp.uint8)}
    trainable, frozen = task.init(jax.random.key(0))
    arguments = {"step": 0, "keys": jax.random.split(jax.random.key(1), 2)}
    alone, _ = task.loss(trainable, frozen, batch, **arguments)
    whole, _ = task.loss(merge(frozen, trainable), {}, batch, **arguments)
    assert float(alone) == float(whole)


def test_export_keeps_encoder_and_scale(task, folder, tmp_path):
    trainable, frozen = task.init(jax.random.key(0))
    moved = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    task.export(moved, frozen, tmp_path, 1)
    before, after = load_part(folder), load_part(tmp_path / "vae")
    assert after.config == before.config
    image = jnp.linspace(-1, 1, 64 * 64 * 3).reshape(1, 64, 64, 3)
    latents = before.encode(image)[0]
    np.testing.assert_array_equal(after.encode(image)[0], latents)
    assert not np.allclose(after.decode(latents), before.decode(latents))
