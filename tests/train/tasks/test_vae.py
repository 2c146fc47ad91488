"""The autoencoder's task, whole and with its decoder alone, on a tiny one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fact_convert import load_pipeline, tokenize
from fact_convert.models.pipeline import load_part, save_part
from fact_jax.diffusion.noise_schedules import signal_and_noise
from fact_jax.models.vae import VAEConfig
from fact_jax.utils.errors import UserError
from fact_train.config import TrainConfig
from fact_train.engine.partition import merge, paths
from fact_train.engine.sample_keys import sample_normal, sample_timesteps, split_keys
from fact_train.tasks.base import BaseOptions, BaseTask
from fact_train.tasks.vae import VAEOptions, VAETask, load_vae
from tests.models import random_model
from tests.train.tasks.test_base import UNET

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
    kept = {path.split("/")[0] for path, _ in paths(frozen["vae"])}
    assert learned == {"decoder", "post_quant_conv"}
    assert kept == {"encoder", "quant_conv"}


def loss_of(task, **batch):
    """The compiled loss of two random pictures, by arrays and step."""
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    batch |= {"images": jnp.asarray(images), "head": jnp.full((2, 64, 64), 255, jnp.uint8)}
    keys = jax.random.split(jax.random.key(1), 2)
    return jax.jit(lambda *arrays: task.loss(*arrays[:2], batch, step=arrays[2], keys=keys))


def test_its_loss_is_that_of_the_whole(task, folder):
    trainable, frozen = task.init(jax.random.key(0))
    alone, _ = loss_of(task)(trainable, frozen, 0)
    whole, _ = loss_of(task)(merge(frozen["vae"], trainable), {"vae": {}}, 0)
    assert float(alone) == float(whole)


def test_it_learns_from_what_the_base_predicts(folder, tmp_path):
    """x_0 = a x_t - s v, under the captions; only the decoder is trained."""
    options = BaseOptions(unet=UNET, vae=str(folder))
    base = TrainConfig(task="base", steps=1, batch_size=2, options=options)
    start = BaseTask(base)
    start.export(*start.init(jax.random.key(0)), tmp_path, 1)
    pipeline = load_pipeline(tmp_path / "base")
    options = VAEOptions(
        people=2, photos=1, decoder_of=str(folder), predicted_by=str(tmp_path / "base")
    )
    task = VAETask(TrainConfig(task="vae", steps=1, batch_size=2, options=options))
    trainable, frozen = task.init(jax.random.key(0))
    assert {path.split("/")[0] for path, _ in paths(trainable)} == {"decoder", "post_quant_conv"}
    ids = jnp.asarray(tokenize(task.base.tokenizer, ["a smiling person", "a person"])[0])
    keys = jax.random.split(jax.random.key(1), 2)
    clean = jax.random.normal(jax.random.key(2), (2, 32, 32, 4))
    found = jax.jit(functools.partial(task._predicted, task.base))(frozen, clean, ids, keys)
    noise_keys, time_keys = split_keys(keys, 2)
    t = sample_timesteps(time_keys, 300)
    assert t[0] != t[1]
    a, s = (part[:, None, None, None] for part in signal_and_noise(pipeline.schedule, t, 1))
    noisy = a * clean + s * sample_normal(noise_keys, (32, 32, 4))
    v = nnx.jit(lambda unet, text: unet(noisy, t, text(ids)))(pipeline.unet, pipeline.text_encoder)
    np.testing.assert_allclose(found, a * noisy - s * v, atol=1e-5)
    loss, _ = loss_of(task, ids=ids)(trainable, frozen, 0)
    without = dataclasses.replace(options, predicted_by=None)
    plain = VAETask(TrainConfig(task="vae", steps=1, batch_size=2, options=without))
    assert float(loss) != float(loss_of(plain)(trainable, frozen, 0)[0])


def test_decoder_and_discriminator_learn_against_each_other(task, folder, tmp_path):
    plain = task
    options = VAEOptions(people=2, photos=1, decoder_of=str(folder), adversarial=0.5)
    task = VAETask(TrainConfig(task="vae", steps=1, batch_size=2, options=options))
    trainable, frozen = task.init(jax.random.key(0))
    arrays = trainable["discriminator"]
    images, decoded = jax.random.uniform(jax.random.key(1), (2, 2, 64, 64, 3), minval=-1)

    @jax.jit
    def losses(arrays, decoded):
        return jnp.stack(task._adversarial(arrays, images, decoded))

    judge = jax.jit(lambda arrays, x: task.discriminator.module(arrays)(x))
    real, fake = judge(arrays, images), judge(arrays, decoded)
    assert real.shape == (2, 8, 8, 1)
    wanted = [-fake.mean(), jnp.maximum(1 - real, 0).mean() + jnp.maximum(1 + fake, 0).mean()]
    np.testing.assert_allclose(losses(arrays, decoded), wanted, atol=1e-5)
    by_arrays, by_decoded = jax.jit(jax.jacobian(losses, (0, 1)))(arrays, decoded)
    moved = [
        np.stack([np.abs(leaf[i]).max() for leaf in jax.tree.leaves(by_arrays)]) for i in (0, 1)
    ]
    assert moved[0].max() == 0
    assert moved[1].min() > 0
    assert np.abs(by_decoded[0]).max() > 0
    assert np.abs(by_decoded[1]).max() == 0
    # Its weight grows: at first only the discriminator learns of it.
    without, _ = loss_of(plain)(*plain.init(jax.random.key(0)), 0)
    compiled = loss_of(task)
    for step, weight in ((0, 0.0), (75, 0.25), (900, 0.5)):
        loss, metrics = compiled(trainable, frozen, step)
        added = weight * metrics["loss/adversarial"] + metrics["loss/discriminator"]
        assert float(loss) == pytest.approx(float(without + added), abs=1e-5)
    task.export(trainable, frozen, tmp_path, 1)
    load_part(tmp_path / "vae")


def test_predictions_are_of_a_decoder_that_learns_on():
    with pytest.raises(ValueError, match="give decoder_of too"):
        VAEOptions(predicted_by="miniature/base")


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
