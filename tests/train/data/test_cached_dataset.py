"""The cache: the same numbers as encoding in the step, and the same files however written."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_convert import load_encoder, load_pipeline
from fact_jax.utils.errors import UserError
from fact_train.cli.main import main
from fact_train.data.cached_dataset import CachedDataset, CacheWriter
from fact_train.data.frozen_encoders import FrozenEncoders
from fact_train.data.pixel_dataset import open_records
from fact_train.data.records import data_libraries
from fact_train.run.loop import run
from fact_train.tasks.adapter import AdapterTask
from tests.train.tiny import tiny_config

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def parts(miniature, records):
    pipeline, encoder = load_pipeline(miniature / "base"), load_encoder(miniature / "encoder")
    return open_records(records, pipeline, encoder), FrozenEncoders(pipeline, encoder), pipeline


def writer(parts, out) -> CacheWriter:
    records, encoders, pipeline = parts
    return CacheWriter(records, encoders, pipeline.tokenizer, out, cell=2, rows_per_shard=4)


def quiet(line: str) -> None:
    pass


def contents(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def cache(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "cache"
    assert writer(parts, out).write((0, 1), quiet)
    return out


def test_interrupted_and_resumed_is_bit_identical(parts, cache, tmp_path):
    class KilledError(Exception):
        pass

    def stop(line):
        raise KilledError

    out = tmp_path / "cache"
    for shards in (1, 2):
        with pytest.raises(KilledError):
            writer(parts, out).write((0, 1), stop)
        found = sorted(out.rglob("face_cache-*"))
        assert [path.name[-14:] for path in found] == ["00000-of-00004", "00001-of-00004"][:shards]
    before = found[0].stat().st_mtime_ns
    # What a process leaves that was killed within a shard.
    (found[0].parent / f".{found[0].name.replace('00000-of', '00002-of')}.12ab.tmp").touch()
    with pytest.raises(UserError, match="holds no whole data set"):
        CachedDataset(out, "head")
    assert writer(parts, out).write((0, 1), quiet)
    assert found[0].stat().st_mtime_ns == before
    assert contents(out) == contents(cache)


def test_several_processes_write_the_same_files(parts, cache, tmp_path):
    lines = []
    out = tmp_path / "cache"
    assert not writer(parts, out).write((1, 2), lines.append)
    assert lines[-1] == "2 of 4 shards are still to be written"
    assert writer(parts, out).write((0, 2), lines.append)
    assert contents(out) == contents(cache)


def test_it_is_a_data_set_of_its_own(cache, parts):
    source = data_libraries().tfds.data_source("face_cache", split="train", data_dir=cache)
    assert len(source) == 15
    assert {name: value.shape for name, value in source[14].items()} == {
        "mean": (8, 8, 4),
        "log_variance": (8, 8, 4),
        "text": (32, 12),
        "tokens": (4, 16),
        "face_mask": (8, 8),
        "head_mask": (8, 8),
    }


def loud(trainable):
    """Gates open and projections not zero: everything in a batch is heard."""
    return jax.tree.map(lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size).reshape(a.shape)), trainable)


def test_the_loss_of_a_step_is_the_same_from_the_cache(miniature, records, cache):
    options = {"records": str(records), "region": "face", "face_weight": 1.0}
    configs = [
        tiny_config(miniature, **options),
        tiny_config(miniature, **options, cache=str(cache)),
    ]
    losses, metrics, tasks = [], [], [AdapterTask(config) for config in configs]
    # The whitened start, too, is made of the same tokens.
    np.testing.assert_allclose(*(task.some_tokens() for task in tasks), atol=1e-5)
    trainable = loud(tasks[0].init(None)[0])
    keys = jax.random.split(jax.random.key(1), 4)
    for task in tasks:
        frozen = task.init(None)[1]
        batch = next(task.source().batches(5, np.arange(4)))
        step = jax.jit(task.loss)
        loss, more = step(trainable, frozen, batch, step=jnp.asarray(5), keys=keys)
        losses.append(float(loss))
        metrics.append({name: float(value) for name, value in more.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    assert metrics[0]["loss/fair"] > 0
    # Encoding in the step is what needs these models there.
    assert tasks[0].init(None)[1].keys() == {"unet", "text_encoder", "vae", "encoder"}
    assert tasks[1].init(None)[1].keys() == {"unet", "text_encoder"}


def test_latents_are_drawn_anew_from_the_moments(parts):
    _, encoders, _ = parts
    mean = jnp.full((2, 8, 8, 4), 3.0)
    batch = {
        "mean": mean,
        "log_variance": jnp.full(mean.shape, 2 * jnp.log(0.5)),
        "text": jnp.zeros((2, 32, 12)),
        "tokens": jnp.zeros((2, 4, 16)),
        "partner": jnp.ones((2, 4, 16)),
    }
    shuffled = jnp.asarray([False, True])
    first, second = (
        encoders.encode_batch({}, batch, shuffled, jax.random.split(jax.random.key(seed), 2))
        for seed in (0, 1)
    )
    scale = 0.18215
    assert first["latents"].mean() == pytest.approx(3 * scale, rel=0.02)
    assert first["latents"].std() == pytest.approx(0.5 * scale, rel=0.1)
    assert not np.allclose(first["latents"], second["latents"])
    np.testing.assert_array_equal(first["tokens"].mean((1, 2)), [0, 1])


def test_a_cache_of_something_else_is_refused(parts, cache, records, miniature, tmp_path):
    moved = tmp_path / "records"
    shutil.copytree(records, moved)
    path = moved / "face_records" / "1.0.0" / "identities.npy"
    np.save(path, np.load(path)[::-1])
    other = open_records(str(moved), parts[2], load_encoder(miniature / "encoder"))
    with pytest.raises(UserError, match="is a cache with other records"):
        writer((other, *parts[1:]), cache).write((0, 1), quiet)
    changed = jax.tree.map(lambda a: a + 1, parts[1].arrays["vae"])
    encoders = FrozenEncoders(parts[2], load_encoder(miniature / "encoder"))
    encoders.arrays["vae"] = changed
    with pytest.raises(UserError, match="is a cache with other weights"):
        CachedDataset(cache, "head").check(encoders, None)
    CachedDataset(cache, "head").check(parts[1], parts[0])


@pytest.mark.parametrize("name", [".", "cache"])
def test_it_does_not_lie_among_the_records(parts, records, name):
    with pytest.raises(UserError, match=r"lies within .* name a folder beside it"):
        writer(parts, records / name).write((0, 1), quiet)
    assert not (records / name / "face_cache").exists()


def test_beside_records_in_a_folder_of_another_name(parts, records, miniature, tmp_path):
    shutil.copytree(records / "face_records" / "1.0.0", tmp_path / "faces")
    opened = open_records(str(tmp_path / "faces"), parts[2], load_encoder(miniature / "encoder"))
    writer((opened, *parts[1:]), tmp_path / "cache").claim()
    with pytest.raises(UserError, match="lies within"):
        writer((opened, *parts[1:]), tmp_path / "faces" / "cache").claim()


def test_records_of_another_size_are_refused(parts, records, miniature):
    wide = dataclasses.replace(parts[2].unet.config, sample_size=16)
    pipeline = dataclasses.replace(parts[2], unet=type("UNet", (), {"config": wide}))
    with pytest.raises(UserError, match=r"write the records with --size 32 \(it is 16\)"):
        open_records(str(records), pipeline, load_encoder(miniature / "encoder"))


def test_the_program_asks_for_records(tmp_path, capsys):
    assert main(["cache", "mini", "--out", str(tmp_path / "cache")]) == 2
    assert "options.records" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["cache", "mini", "--out", "x", "--shard", "2/2"])


@pytest.mark.slow
def test_training_from_a_cache_resumes_exactly(miniature, cache, tmp_path):
    config = tiny_config(miniature, cache=str(cache))
    whole = run(config, tmp_path / "whole").state
    run(dataclasses.replace(config, steps=4), tmp_path / "parts")
    resumed = run(config, tmp_path / "parts").state
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_wrong_options_of_cache_are_one_line(records, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["cache", "mini", f"options.records={records}"]
    assert main([*command, "--out", "x", "--beam", "'"]) == 2
    assert capsys.readouterr().err == "error: --beam ': No closing quotation\n"
    with pytest.raises(SystemExit) as ended:
        main([*command, "--out", ""])
    assert ended.value.code == 2
    assert "argument --out: it is empty: name a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_processes_of_beam_write_the_same_cache(
    parts, cache, miniature, records, tmp_path, monkeypatch
):
    """On the engine of `fact-train data`, in Beam's own runner; read again it is whole."""
    pytest.importorskip("apache_beam")
    from fact_train.data import cached_dataset
    from fact_train.prepare import encode
    from fact_train.prepare.engine import Engine

    monkeypatch.setattr(encode, "CacheWriter", functools.partial(CacheWriter, rows_per_shard=4))
    out = tmp_path / "cache"
    made = tuple(map(str, (miniature / "base", miniature / "encoder", records, out)))
    writer = encode.encode_all(made, (0, 1), Engine(1, ("--direct_num_workers=1",)))
    encode.cache_writer.cache_clear()
    assert len(writer.paths) > 2
    assert writer.complete(quiet)
    assert contents(out) == contents(cache)
    assert cached_dataset.verify_cache(out) == len(parts[0])
    assert main(["data", "verify", str(out)]) == 0
    shard = writer.paths[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        cached_dataset.verify_cache(out)
