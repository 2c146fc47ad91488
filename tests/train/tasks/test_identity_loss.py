"""Whom a predicted picture shows, on the shipped autoencoder and face encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_convert import load_encoder, load_pipeline
from fact_jax.diffusion.noise_schedules import alphas_cumprod_numpy
from fact_train.data.pixels import encode_latents
from fact_train.data.portraits import draw_portraits, portrait_examples
from fact_train.data.record_writer import write_records
from fact_train.tasks.adapter import AdapterTask
from fact_train.tasks.identity_loss import IdentityLoss, IdentityOptions, drawn_arrays
from tests.train.tiny import tiny_config

pytestmark = pytest.mark.heavy

PEOPLE = 4
OPTIONS = IdentityOptions(
    encoder="miniature/encoder", weight=1.0, contrastive=1.0, timesteps="signal"
)


@pytest.fixture(scope="module")
def shown():
    """(pipeline, encoder, batch, true latents) of one photo each of some people."""
    pipeline, encoder = load_pipeline("miniature/base"), load_encoder("miniature/encoder")
    size = pipeline.unet.config.sample_size * pipeline.vae.config.downscale
    batch = draw_portraits("test", PEOPLE, 1, size=size)
    arrays = drawn_arrays(batch, encoder.config.img_size)
    latents = jnp.asarray(encode_latents(pipeline.vae, batch.images))
    return pipeline, encoder, {k: jnp.asarray(v) for k, v in arrays.items()}, latents


def told(shown, latents=None, t=0, given=True, remat=False, **options):
    """Loss and metrics of predicted latents, all at one timestep."""
    pipeline, encoder, batch, true = shown
    loss = IdentityLoss(dataclasses.replace(OPTIONS, **options), encoder, pipeline)
    frozen = loss.arrays(loss.embed(np.asarray(batch["own_crops"])), np.asarray(batch["person"]))
    value, metrics = jax.jit(lambda frozen, *rest: loss(frozen, *rest, remat=remat))(
        frozen,
        batch,
        true if latents is None else latents,
        jnp.full(PEOPLE, t),
        jnp.full(PEOPLE, given),
    )
    return float(value), {name: float(number) for name, number in metrics.items()}


def test_true_latents_show_their_people_and_others_do_not(shown):
    right, wrong = told(shown)[1], told(shown, shown[-1][::-1])[1]
    assert right["loss/identity"] < 0.5 < 0.8 < wrong["loss/identity"]
    assert right["loss/contrastive"] < 0.2 < 2.0 < wrong["loss/contrastive"]


def test_what_counts(shown):
    """Both terms by their weights; much noise and dropped faces count less, and nothing."""
    both, metrics = told(shown)
    ratio = told(shown, weight=0.0)[0] / both
    share = metrics["loss/contrastive"] / (metrics["loss/identity"] + metrics["loss/contrastive"])
    assert ratio == pytest.approx(share, rel=1e-4)
    assert told(shown, t=900)[0] < 0.1 * both
    assert told(shown, timesteps="mixed")[0] < 0.1 * both
    abar = alphas_cumprod_numpy(shown[0].schedule)
    middle = int(np.abs(abar - 0.5).argmin())
    equal = [told(shown, t=middle, timesteps=name)[0] for name in ("signal", "mixed")]
    assert equal[1] / equal[0] == pytest.approx(4 * (1 - abar[middle]), rel=1e-4)
    assert told(shown, given=False)[0] == 0.0


def test_a_window_around_the_face_shows_the_same_person(shown):
    """Of all cells it is the same picture; of most of them the edges alone differ."""
    whole = told(shown)[1]
    cells = shown[-1].shape[1]
    assert told(shown, window=cells, remat=True)[1] == pytest.approx(whole, rel=1e-4)
    cut = told(shown, window=cells - 2)[1]["loss/identity"]
    assert cut != whole["loss/identity"]
    assert cut < 0.5


@pytest.mark.parametrize("source", [pytest.param("portraits", marks=pytest.mark.slow), "records"])
def test_training(miniature, tmp_path, source):
    options = {}
    if source == "records":
        photos = portrait_examples("adapter", 3, 2, size=16, crop_size=16)
        write_records(photos, tmp_path / "records", size=16, crop_size=16)
        options["records"] = str(tmp_path / "records")
    identity = IdentityOptions(encoder=str(miniature / "encoder"), contrastive=0.1, negatives=5)
    task = AdapterTask(tiny_config(miniature, identity=identity, **options))
    trainable, frozen = task.init(jax.random.key(0))
    batch = next(task.source().batches(0, np.arange(4)))
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    keys = jax.random.split(jax.random.key(0), 4)

    def loss(trainable):
        return task.loss(trainable, frozen, batch, step=jnp.asarray(1), keys=keys)

    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(trainable)
    assert metrics["loss/identity"] > 0
    people = frozen["identity"]["people"]
    assert len(people) == (3 if source == "records" else 5)
    assert np.isin(batch["person"], people).all()  # so that nobody is their own negative
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
