"""The adapter task: it starts as the base, leaves the base alone, and resumes exactly."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from fact_convert import load_adapter, load_pipeline
from fact_convert.models.adapter import write_adapter
from fact_jax.sharding import make_mesh
from fact_jax.utils.errors import UserError
from fact_train.data.array_source import PairedArrays
from fact_train.engine.partition import paths, split_by_paths
from fact_train.engine.state import make_optimizer, make_state
from fact_train.engine.step import TrainStep
from fact_train.run.loop import run
from fact_train.tasks.adapter import AdapterTask
from tests.train.tiny import RESAMPLER, tiny_config
from tests.train.toy import assert_same

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def finished(miniature, tmp_path_factory):
    """(folder, outcome) of the eight steps run through."""
    folder = tmp_path_factory.mktemp("adapter") / "run"
    return folder, run(tiny_config(miniature), folder)


@pytest.mark.parametrize("start", ["zero_gates", "zero_projections"])
def test_the_start_is_the_base_bit_for_bit(miniature, start):
    task = AdapterTask(tiny_config(miniature, start=start))
    trainable, frozen = task.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
    text = jax.random.normal(jax.random.key(2), (2, 32, 12))
    face = jax.random.normal(jax.random.key(3), (2, 4, 12))
    t = jnp.asarray([7, 900])
    adapted = task.unet(trainable["adapter"], frozen["unet"])
    base = load_pipeline(miniature / "base").unet
    call = nnx.jit(lambda unet, *given: unet(*given))
    np.testing.assert_array_equal(call(adapted, x, t, text, face), call(base, x, t, text))


@pytest.mark.parametrize(
    "start", [pytest.param("zero_gates", marks=pytest.mark.slow), "zero_projections"]
)
def test_fifty_steps_move_the_adapter_and_nothing_else(miniature, start):
    config = tiny_config(miniature, start=start)
    task = AdapterTask(config)
    trainable, frozen = task.init(jax.random.key(0))
    before = jax.tree.map(np.array, frozen)
    optimizer = make_optimizer(config.optimizer)
    state = make_state(trainable, optimizer, config.ema)
    step = TrainStep(task, optimizer, config, make_mesh(config.mesh))
    rows = np.arange(config.batch_size)
    first = None
    for batch in itertools.islice(task.source().batches(0, rows), 50):
        state, metrics = step(state, frozen, batch)
        first = first or metrics
        assert np.isfinite(metrics["loss"])
    assert float(metrics["skipped"]) == 0
    assert_same(before, jax.tree.map(np.array, frozen))
    still = [
        path
        for (path, new), (_, old) in zip(paths(state.params), paths(trainable), strict=True)
        # The dense gate's own layers learn only once that gate has opened, which it has by now.
        if np.array_equal(new, old)
    ]
    assert still == []
    # Silent at the start, and FAIR sees it when it speaks.
    assert float(first["loss/fair"]) == 0.0 < float(metrics["loss/fair"])


def test_stopped_and_resumed_is_uninterrupted(miniature, finished, tmp_path, monkeypatch):
    config = tiny_config(miniature)
    with monkeypatch.context() as patched:
        # Asked to stop after the fourth step: another number of steps would be another program.
        asked = itertools.count(1)
        patched.setattr("fact_train.run.loop.SignalHandler.decide", lambda *_: next(asked) == 4)
        assert run(config, tmp_path / "parts").state.step == 4
    assert_same(finished[1].state, run(config, tmp_path / "parts").state)


def test_the_export_opens_as_an_adapter_for_the_base(finished):
    state = finished[1].state
    path = finished[0] / "export" / "adapter.safetensors"
    assert load_adapter(path).metadata["step"] in (8, "8")
    saved = load_file(path)[
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.alpha_attn"
    ]
    adapter = state.ema["adapter"]["mid_block"]["attentions"][0]["transformer_blocks"][0]
    assert saved == adapter["face"]["alpha_attn"]


def test_going_on_from_an_adapter_file(miniature, finished, tmp_path):
    weights = finished[0] / "export" / "adapter.safetensors"
    task = AdapterTask(tiny_config(miniature, weights=str(weights)))
    trainable, frozen = task.init(jax.random.key(0))
    gate = trainable["adapter"]["mid_block"]["attentions"][0]["transformer_blocks"][0]["face"]
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.processor.alpha_attn"
    assert gate["alpha_attn"] == load_file(weights)[key] != 1.0
    task.export(trainable, frozen, tmp_path, 3)
    said = load_adapter(tmp_path / "adapter.safetensors").metadata
    assert (said["step"], said["run_step"]) == (8 + 3, "3")
    assert json.loads(said["started_from"]) == {"file": str(weights), "step": 8}


def test_blocks_that_the_file_has_no_adapter_for_start_fresh(miniature, finished, tmp_path):
    """As where the base has got attention at more levels since."""
    whole = finished[0] / "export" / "adapter.safetensors"
    less = {key: value for key, value in load_file(whole).items() if "down_blocks" not in key}
    texts = load_adapter(whole).metadata
    write_adapter(tmp_path / "less.safetensors", less, texts["config"], {"step": 8})
    task = AdapterTask(tiny_config(miniature, weights=str(tmp_path / "less.safetensors")))
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    (note,) = task.notes
    assert note.endswith(f"has no adapter for 1 of the base's blocks, which start fresh: {block}")
    trainable, frozen = task.init(jax.random.key(0))
    task.export(trainable, frozen, tmp_path, 3)
    said = load_adapter(tmp_path / "adapter.safetensors").metadata
    assert json.loads(said["started_from"])["without"] == [block]
    some = task.adapters
    all_of_it, fresh = (
        AdapterTask(tiny_config(miniature, **given)).adapters
        for given in ({"weights": str(whole)}, {})
    )
    for wanted, patterns in ((fresh, ["^down_blocks/"]), (all_of_it, ["^mid_block/"])):
        jax.tree.map(
            np.testing.assert_array_equal,
            *(split_by_paths(tree, patterns)[0] for tree in (some, wanted)),
        )
    strange = {
        key.replace("down_blocks.0.", "up_blocks.7."): value
        for key, value in load_file(whole).items()
    }
    write_adapter(tmp_path / "strange.safetensors", strange, texts["config"])
    with pytest.raises(UserError, match=r"made for 2 transformer blocks .* this UNet has 2 tr"):
        AdapterTask(tiny_config(miniature, weights=str(tmp_path / "strange.safetensors")))


def test_a_resampler_of_the_wrong_width_is_refused(miniature):
    config = tiny_config(miniature)
    wrong = dataclasses.replace(RESAMPLER, output_dim=13)
    options = dataclasses.replace(config.options, resampler=wrong)
    with pytest.raises(UserError, match=r"to 13, but .* takes 12"):
        AdapterTask(dataclasses.replace(config, options=options))


def test_partners_are_other_photos_of_the_same_person():
    photos, people = 3, 7
    tokens = np.arange(photos * people, dtype=np.float32)[:, None]
    source = PairedArrays({"tokens": tokens}, batch_size=5, seed=3, photos=photos)
    seen = set()
    for step in range(60):
        batch = source.batch(step, np.arange(5))
        own, partner = batch["tokens"][:, 0], batch["partner"][:, 0]
        assert (own // photos == partner // photos).all()
        assert (own != partner).all()
        seen |= set(((partner - own) % photos).astype(int))
        some = np.asarray([1, 4])
        assert_same({name: array[some] for name, array in batch.items()}, source.batch(step, some))
    assert seen == {1, 2}


def test_an_only_photo_is_its_own_partner():
    tokens = np.arange(4, dtype=np.float32)[:, None]
    source = PairedArrays({"tokens": tokens}, batch_size=4, seed=3, photos=1)
    batch = source.batch(0, np.arange(4))
    np.testing.assert_array_equal(batch["partner"], batch["tokens"])


def test_every_epoch_visits_every_row_once():
    source = PairedArrays({"tokens": np.arange(12)[:, None]}, batch_size=4, seed=0, photos=3)
    first, second = (
        np.concatenate([source.rows(step) for step in range(3 * epoch, 3 * epoch + 3)])
        for epoch in (0, 1)
    )
    assert sorted(first) == sorted(second) == list(range(12))
    assert not np.array_equal(first, second)
