"""Adapters of comparisons: trained, written, drawn by JAX, refused by everything else."""

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_convert import load_adapter, load_encoder, save_encoder
from fact_convert.cli import opening
from fact_convert.cli.main import main as convert
from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.request import GenerationParams
from fact_jax.fact import condition_shape, face_condition, null_face
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.utils.errors import UserError
from fact_train.engine.partition import paths, split_module
from fact_train.plan import abstract_task
from fact_train.tasks.adapter import AdapterTask
from fact_train.tasks.adapter_init import whitening
from tests.models import random_model
from tests.train.tiny import RESAMPLER, tiny_config

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[3]
BLOCKS = dataclasses.replace(RESAMPLER, encoder_blocks=(0, 1))
EMBEDDING = dataclasses.replace(RESAMPLER, embedding=True, embedding_dim=8)
LINEAR = dataclasses.replace(RESAMPLER, input_tokens=4, num_queries=6)
VARIATIONS = {
    "coupled": ({"form": "coupled"}, RESAMPLER, "cross-attention of its own"),
    "blocks": ({}, BLOCKS, "tokens of several encoder blocks"),
    "embedding": ({}, EMBEDDING, "the encoder's embedding"),
    "linear": ({}, LINEAR, "a linear projection"),
}


@pytest.fixture(scope="module")
def deep(miniature, tmp_path_factory):
    """The tiny miniature's encoder, three blocks deep."""
    folder = tmp_path_factory.mktemp("deep")
    config = dataclasses.replace(load_encoder(miniature / "encoder").config, depth=3)
    save_encoder(random_model("transface", config, seed=1), folder / "encoder")
    return folder / "encoder"


def config_of(miniature, deep, name):
    options, resampler, _ = VARIATIONS[name]
    config = tiny_config(miniature, **options)
    new = dataclasses.replace(config.options, encoder=str(deep), resampler=resampler)
    return dataclasses.replace(config, options=new)


SLOW = ("blocks", "linear")  # as the other two, but for what their resamplers take


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in VARIATIONS
    ],
)
def made(request, miniature, deep, tmp_path_factory):
    """(name, task, trainable moved off its start, frozen, exported file)."""
    task = AdapterTask(config_of(miniature, deep, request.param))
    trainable, frozen = task.init(jax.random.key(0))
    trainable = jax.tree.map(lambda leaf: leaf + 0.3, trainable)
    folder = tmp_path_factory.mktemp(request.param)
    task.export(trainable, frozen, folder, 3)
    return request.param, task, trainable, frozen, folder / "adapter.safetensors"


def test_every_part_learns(made):
    _, task, trainable, frozen, _ = made
    batch = {k: jnp.asarray(v) for k, v in next(task.source().batches(0, np.arange(4))).items()}
    keys = jax.random.split(jax.random.key(1), 4)

    def loss(trainable):
        return task.loss(trainable, frozen, batch, step=jnp.asarray(7), keys=keys)[0]

    gradients = dict(paths(jax.jit(jax.grad(loss))(trainable)))
    idle = {name for name, one in gradients.items() if not np.abs(one).max() > 0}
    # A bias of keys moves all scores alike; there is none here.
    assert not idle
    coupled = any("attn2" in name for name in gradients)
    assert coupled == (made[0] == "coupled")


def test_jax_draws_what_its_file_holds_and_the_base_stays_the_base(made, miniature, deep):
    _, task, trainable, frozen, file = made
    pipeline = FlaxPipeline.load(miniature / "base", file, deep)
    crops = np.random.default_rng(1).integers(0, 256, (1, 1, 16, 16, 3), np.uint8)
    params = GenerationParams(sampler="ddim", steps=2)
    drawn = pipeline.generate(["a person"], [0], crops, params)
    plain = pipeline.generate(["a person"], [0], None, params)
    alone = FlaxPipeline.load(miniature / "base").generate(["a person"], [0], None, params)
    np.testing.assert_array_equal(plain, alone)
    assert (drawn != plain).any()
    found = pipeline.modules()["unet"]
    wanted = task.unet(trainable["adapter"], frozen["unet"])
    for (name, ours), (_, theirs) in zip(
        paths(split_module(wanted).arrays), paths(split_module(found).arrays), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_everything_else_refuses_it_in_one_line(made, tmp_path, capsys):
    name, *_, file = made
    words = VARIATIONS[name][2]
    with pytest.raises(UserError, match=f"{words}, of a comparison: only fact-infer's JAX"):
        load_adapter(file)
    assert convert(["to-torch", str(file), str(tmp_path / "other.ckpt")]) == 2
    assert words in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    comfyui = runpy.run_path(str(ROOT / "infer/comfyui/models.py"))  # ComfyUI itself is not here
    with pytest.raises(ValueError, match="only fact-infer draws with it"):
        comfyui["read_adapter"](str(file))


def test_watched_base_pictures_are_of_the_untouched_base(made):
    task = made[1]
    there = {name for name, _ in paths(task.tuned_base)}
    assert bool(there) == (made[0] == "coupled")
    start, _ = task.init(jax.random.key(0))
    for name, leaf in paths(task.tuned_base):
        np.testing.assert_array_equal(leaf, dict(paths(start["adapter"]))[name])


def test_what_the_resampler_takes(deep):
    encoder = load_encoder(deep)
    crops = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
    plain = face_condition(encoder, crops, RESAMPLER)
    np.testing.assert_array_equal(plain, encoder.tokens(crops))
    several = face_condition(encoder, crops, BLOCKS)
    np.testing.assert_array_equal(several[:, -4:], plain)
    hidden = encoder.patch_embed(crops) + encoder.pos_embed[...]
    first = encoder.norm(encoder.blocks[0](hidden))
    np.testing.assert_allclose(several[:, :4], first, atol=1e-5)
    vector = face_condition(encoder, crops, EMBEDDING)
    np.testing.assert_allclose(jnp.square(vector).mean(-1), 1.0, rtol=1e-5)
    for config in (RESAMPLER, BLOCKS, EMBEDDING, LINEAR):
        shape = condition_shape(encoder.config, config)
        assert face_condition(encoder, crops, config).shape == (2, *shape)
        resampler = random_model("resampler", config)
        assert null_face(resampler, shape[0]).shape == (1, config.num_queries, 12)
    for config, words in (
        (dataclasses.replace(BLOCKS, encoder_blocks=(2,)), "block 2: it has blocks 0 to 2"),
        (dataclasses.replace(LINEAR, input_tokens=5), "a linear map of 5 tokens"),
    ):
        with pytest.raises(UserError, match=words):
            condition_shape(encoder.config, config)


def test_a_linear_projection_is_one():
    resampler = random_model("resampler", LINEAR)
    draw = np.random.default_rng(0)
    a, b = (jnp.asarray(draw.normal(size=(1, 4, 16)), jnp.float32) for _ in range(2))
    zero = resampler(jnp.zeros_like(a))
    np.testing.assert_allclose(
        resampler(a + b) - zero, resampler(a) + resampler(b) - 2 * zero, atol=1e-5
    )


def test_whitening_of_one_vector_leaves_no_direction_out():
    vectors = np.random.default_rng(0).normal(size=(512, 1, 8)) * np.arange(1, 9)
    matrix, bias = whitening(vectors)
    white = vectors[:, 0] @ matrix + bias
    np.testing.assert_allclose(white.T @ white / 512, np.eye(8), atol=1e-4)


def test_a_cache_holds_the_last_blocks_tokens_only():
    with pytest.raises(ValueError, match="a cache holds the tokens of the encoder's last block"):
        dataclasses.replace(tiny_config(Path("m")).options, cache="cache", resampler=EMBEDDING)
    with pytest.raises(ValueError, match="embedding is one vector"):
        ResamplerConfig(embedding=True, encoder_blocks=(1,))


@pytest.mark.parametrize("name", VARIATIONS)
def test_plans_know_it(miniature, deep, name):
    built = abstract_task.build(config_of(miniature, deep, name))
    shape = built.task.face_shape
    assert built.batch["tokens"].shape[1:] == shape
    learns = {path for path, _ in paths(built.state.params["adapter"])}
    assert any("attn2" in path for path in learns) == (name == "coupled")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options.form": "parallel"}, "a parallel adapter"),
        ({"options.form": "coupled"}, "cross-attention of its own"),
        ({"options.resampler.embedding": True}, "the encoder's embedding"),
        ({"options.resampler.encoder_blocks": [0]}, "tokens of several encoder blocks"),
    ],
)
def test_a_checkpoint_of_one_is_refused_too(settings, words):
    with pytest.raises(UserError, match=words):
        opening._refuse_comparisons(Path("run"), {"config": settings})
    opening._refuse_comparisons(Path("run"), {"config": {"options.form": "sequential"}})
    opening._refuse_comparisons(Path("run"), {})
