"""Checkpoints of the trainer."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from fact_convert import load_adapter, load_state
from fact_convert.cli.opening import open_weights
from fact_convert.cli.saving import save_jax, save_torch
from fact_convert.io.zarr_io import checksum
from fact_convert.models.training_checkpoint import (
    find_checkpoint,
    read_checkpoint,
    to_jax,
    write_checkpoint,
)
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def adapted(golden, unet_config, resampler_config):
    """An adapted UNet and a resampler, and their state by released names."""
    adapter = golden("unet_adapter", "adapter.")[0]
    resampler = golden("resampler", "state.")[0]
    unet = load_state("unet", golden("unet_adapter", "unet.")[0] | adapter, unet_config)
    state = adapter | {f"local_fac_prj.{key}": array for key, array in resampler.items()}
    return unet, load_state("resampler", resampler, resampler_config), state


@pytest.fixture(scope="module")
def written(adapted, resampler_config, tmp_path_factory):
    """A run's folder as the trainer writes it: two steps, the running average beside."""
    folder = tmp_path_factory.mktemp("written") / "run"
    unet, resampler, _ = adapted
    faces = nnx.split(unet, nnx.PathContains("face"), ...)[1]
    params = {
        "adapter": nnx.to_pure_dict(faces),
        "resampler": nnx.to_pure_dict(nnx.state(resampler)),
    }
    with ocp.CheckpointManager(
        (folder / "checkpoints").resolve(),
        options=ocp.CheckpointManagerOptions(step_format_fixed_length=8),
    ) as manager:
        for step, factor in ((10, 1.0), (20, 2.0)):
            state = {
                "params": jax.tree.map(lambda x, f=factor: x * f, params),
                "ema": jax.tree.map(lambda x, f=factor: x * f * 4, params),
                "opt_state": [{"mu": params["resampler"]}, ()],
                "step": np.int32(step),
            }
            sums = {
                f"ema/{jax.tree_util.keystr(path, simple=True, separator='/')}": checksum(
                    np.asarray(leaf)
                )
                for path, leaf in jax.tree_util.tree_leaves_with_path(state["ema"])
            }
            meta = {
                "config": {f"options.resampler.{k}": v for k, v in resampler_config.items()}
                | {"options.people": 3},
                "checksums": sums,
            }
            items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
            manager.save(step, args=ocp.args.Composite(**items))
            manager.wait_until_finished()
    return folder


@pytest.fixture
def run(written, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "run")


def test_the_newest_step_is_found(run):
    newest = run / "checkpoints" / "00000020"
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == newest
    assert find_checkpoint(newest) == newest
    (newest / "state" / "_METADATA").unlink()
    assert find_checkpoint(run).name == "00000010"
    assert find_checkpoint(run.parent) is None


@pytest.mark.parametrize(("weights", "factor"), [("ema", 8), ("params", 2)])
def test_a_run_becomes_an_adapter(run, adapted, tmp_path, weights, factor):
    _, _, state = adapted
    opened = open_weights(run, weights=weights)
    assert opened.kind == "adapter"
    save_torch(opened, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert adapter.metadata["step"] == 20
    assert adapter.resampler.config.heads == 3
    for key, array in adapter.state().items():
        assert np.array_equal(array, state[key].astype(np.float32) * factor), key


def test_steps_before_a_warm_start_count(run, tmp_path):
    meta = run / "checkpoints" / "00000020" / "meta" / "metadata"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"steps_before": 7}))
    save_torch(open_weights(run), tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors").metadata["step"] == 27


def test_a_changed_byte_is_noticed(run):
    checkpoint = run / "checkpoints" / "00000020"
    meta = json.loads((checkpoint / "meta" / "metadata").read_text())
    meta["checksums"]["ema/resampler/latents"] += 1
    (checkpoint / "meta" / "metadata").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"damaged, not what was written: resampler\.latents"):
        np.asarray(read_checkpoint(run)[0]["resampler.latents"])
    np.asarray(read_checkpoint(run, "params")[0]["resampler.latents"])


def test_a_relative_path_is_read(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    flat, _ = read_checkpoint("run")
    assert flat.keys() == read_checkpoint(run)[0].keys()


def test_a_damaged_checkpoint_is_one_line(run):
    for file in (run / "checkpoints" / "00000020" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="damaged") as caught:
        read_checkpoint(run)
    assert "\n" not in str(caught.value)


def test_the_checksum_is_the_trainers():
    from fact_train.engine.checksums import checksums
    from fact_train.engine.state import TrainState

    rng = np.random.default_rng(0)
    leaf = jax.numpy.asarray(rng.standard_normal((5, 3)), "float32")
    zero = jax.numpy.zeros((), "int32")
    state = TrainState({"a": leaf}, None, (), zero, zero, zero)
    assert checksums(state)["params/a"] == checksum(np.asarray(leaf))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_released_to_jax_and_back(
    released_checkpoint, resampler_config, same_bits, tmp_path, dtype
):
    import torch

    held = torch.load(released_checkpoint, weights_only=True)
    torch.save({k: v.to(getattr(torch, dtype)) for k, v in held.items()}, tmp_path / "x.ckpt")
    released = open_weights(tmp_path / "x.ckpt")
    save_jax(released, tmp_path / "jax", dim_head=8)
    opened = open_weights(tmp_path / "jax")
    save_torch(opened, tmp_path / "y.ckpt")
    save_torch(opened, tmp_path / "y.safetensors")
    for name in ("y.ckpt", "y.safetensors"):
        again = open_weights(tmp_path / name)
        for part, state in released.states.items():
            same_bits(state, again.states[part])
    assert load_adapter(tmp_path / "y.safetensors").resampler.config.to_dict() == resampler_config


def test_an_encoder_to_jax_and_back(golden, same_bits, tmp_path):
    from fact_convert.io.safetensors_io import write_safetensors

    state, _ = golden("transface", "state.")
    write_safetensors(tmp_path / "x.safetensors", state, {})
    save_jax(open_weights(tmp_path / "x.safetensors"), tmp_path / "jax")
    save_torch(open_weights(tmp_path / "jax"), tmp_path / "y.pt")
    same_bits(state, open_weights(tmp_path / "y.pt").states["transface"])


def test_orbax_itself_reads_what_we_write(adapted, tmp_path):
    params, _ = to_jax(open_weights_of(adapted[2], tmp_path).states)
    params["odd"] = {
        "brain": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3).T,
        "none": np.zeros((0, 3), np.float16),
        "one": np.array(7, np.int64),
        "flags": np.array([True, False]),
    }
    write_checkpoint(tmp_path / "c", params, lambda: {"a": 1})
    handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        items = {"state": ocp.args.StandardRestore(), "meta": ocp.args.JsonRestore()}
        held = checkpointer.restore(tmp_path / "c", args=ocp.args.Composite(**items))
    assert held["meta"]["a"] == 1
    assert held["state"]["ema"] is None
    flat, _ = read_checkpoint(tmp_path / "c")
    written = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in written:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        theirs = held["state"]["params"]
        for part in name.split("."):
            theirs = theirs[part]
        for found in (np.asarray(theirs), np.asarray(flat.pop(name))):
            assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype), name
            assert found.tobytes() == np.ascontiguousarray(leaf).tobytes(), name
    assert flat == {}


@pytest.fixture(scope="module")
def plain(adapted, tmp_path_factory):
    """The adapter as a checkpoint of ours."""
    folder = tmp_path_factory.mktemp("plain")
    save_jax(open_weights_of(adapted[2], folder), folder / "c", dim_head=8)
    return folder / "c"


def open_weights_of(state, folder):
    from fact_convert.io.safetensors_io import write_safetensors

    write_safetensors(folder / "x.safetensors", state, {})
    return open_weights(folder / "x.safetensors")


def test_a_plain_leaf_is_mapped_and_compared_with_its_sum(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "c")
    file = tmp_path / "c" / "state" / "params.resampler.latents" / "0.0.0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    flat, _ = read_checkpoint(tmp_path / "c")
    with pytest.raises(UserError, match=r"not what was written: resampler\.latents"):
        np.asarray(flat["resampler.latents"])
    np.asarray(flat["resampler.proj_in.kernel"])
    file.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"params\.resampler\.latents is not a file of \d+ bytes"):
        read_checkpoint(tmp_path / "c")
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"params\.resampler\.latents is not a file"):
        read_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"shape": [2**40, 2**40], "chunks": [2**20, 2**20]}, "cannot hold the 24178"),
        ({"shape": ["3"]}, "params.resampler.latents has no shape"),
        ({"shape": [2**62, 0]}, "damaged|cannot be read"),
        ({"dtype": "<c8"}, "complex64, which is not supported"),
        ({"dtype": [["a", "<f4"]]}, "damaged"),
        ({"compressor": {"id": "bomb"}}, "damaged, params.resampler.latents cannot be read"),
    ],
)
def test_lies_about_a_leaf(plain, tmp_path, about, reason):
    shutil.copytree(plain, tmp_path / "c")
    file = tmp_path / "c" / "state" / "params.resampler.latents" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | about))
    with pytest.raises(UserError, match=reason) as caught:
        np.asarray(read_checkpoint(tmp_path / "c")[0]["resampler.latents"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["../../x", "a/b", "a\nb"])
def test_leaves_that_lie_elsewhere(plain, tmp_path, key):
    shutil.copytree(plain, tmp_path / "c")
    file = tmp_path / "c" / "state" / "_METADATA"
    file.write_text(file.read_text().replace('"key": "latents"', f'"key": {json.dumps(key)}'))
    with pytest.raises(UserError, match="has leaves that are no names"):
        read_checkpoint(tmp_path / "c")


def test_class_centres_are_training_only(golden, tmp_path):
    from fact_convert.models.training_checkpoint import to_torch

    params, kept = to_jax({"transface": golden("transface", "state.")[0]})
    assert set(params) == {"encoder"}
    assert set(kept["transface"]) == {f"feature.{i}.num_batches_tracked" for i in (1, 3)}
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    states = to_torch(flat | {"centres": np.zeros((4, 3))}, kept)
    assert set(states) == {"transface"}
    with pytest.raises(UserError, match=r"1 unexpected \(surplus\)"):
        to_torch(flat | {"encoder.surplus": np.zeros(1)}, kept)
    with pytest.raises(UserError, match=r"1 unexpected \(surplus\)"):
        to_jax({"transface": {"surplus": np.zeros(1)}})
