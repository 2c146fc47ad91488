"""`fact-train plan` from end to end: the real step, compiled for TPUs that are not here."""

import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_convert import load_pipeline
from fact_jax.plan.jaxpr_costs import count_flops, trace
from fact_train.cli.main import main
from fact_train.config import load_config
from fact_train.data.portraits import portrait_examples
from fact_train.data.record_writer import write_records
from fact_train.overrides import override
from fact_train.plan.abstract_task import build, watched_flops
from fact_train.tasks.adapter import AdapterTask
from fact_train.tasks.identity_loss import IdentityOptions
from tests.train.tiny import tiny_config

pytestmark = pytest.mark.heavy

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'jax[tpu]'",
)
SMALLER = {
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def small_base(tmp_path_factory):
    """The shipped base's small files (no weights) with a UNet of one level."""
    folder = tmp_path_factory.mktemp("plan") / "base"
    shutil.copytree("miniature/base", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SMALLER))
    return folder


def run(capsys, *arguments) -> tuple[int, dict]:
    status = main(["plan", *arguments, "--json"])
    out, err = capsys.readouterr()
    assert status < 2, err
    return status, json.loads(out)


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check(report: dict, config, chips: int) -> None:
    """Memory by kind is the exact sum of shapes; only what is trained is ever sent."""
    built = build(config)
    params = jax.tree.leaves(built.state.params)
    parts, trainable = report["memory"]["parts"], bytes_of(params)
    matrices = bytes_of([leaf for leaf in params if leaf.ndim > 1])
    assert report["parameters"] == {
        "frozen": sum(leaf.size for leaf in jax.tree.leaves(built.frozen)),
        "trainable": trainable // 4,
    }
    assert parts["frozen"] == bytes_of(built.frozen)
    assert parts["trainable"] == trainable
    assert parts["batch"] == bytes_of(built.batch) // chips
    # What only the update touches is split over the chips, matrix by matrix.
    assert parts["ema"] == trainable - matrices + matrices // chips
    assert parts["optimizer"] == 2 * parts["ema"] + 4  # and Adam's counter
    assert parts["temporary"] > 0
    assert report["memory"]["used"] == sum(parts.values())

    sent = {"all-reduce": 0, "reduce-scatter": 0, "all-gather": 0}
    for found in report["collectives"]:
        sent[found["kind"]] += found["bytes"] * found["times"]
        assert found["group"] == chips
    # Gradients are summed, in one way or the other, with two scalars of each array (its norm, and
    # whether it is finite) and a few more (losses, FAIR and gates by block). What is gathered are
    # the matrices whose update was split. No frozen byte.
    scalars = sent["all-reduce"] + sent["reduce-scatter"] - trainable
    assert 0 < scalars < 4 * (2 * len(params) + 100)
    assert sent["all-gather"] == matrices


@pytest.mark.parametrize("given", ["portraits", "records"])
@pytest.mark.parametrize("losses", [(), ("points",), ("points", "identity")])
def test_a_batch_is_shaped_as_the_source_gives_it(miniature, tmp_path, given, losses):
    options = {"point_weight": 1.0} if "points" in losses else {}
    if "identity" in losses:
        options["identity"] = IdentityOptions(encoder=str(miniature / "encoder"))
    if given == "records":
        photos = portrait_examples("adapter", 3, 2, size=16, crop_size=16)
        write_records(photos, tmp_path / "records", size=16, crop_size=16)
        options["records"] = str(tmp_path / "records")
    config = tiny_config(miniature, **options)
    batch = next(AdapterTask(config).source().batches(0, np.arange(config.batch_size)))
    assert build(config).batch == {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()
    }


def test_pictures_to_watch_cost_their_unet_calls_and_their_decoding(miniature):
    """Two strengths, 25 steps from noise and 15 from a template, two branches of guidance each.

    The adapter comes on top of the base, and of the rest the encoding, which is of one picture.
    """
    config = tiny_config(miniature)
    pipeline = load_pipeline(str(miniature / "base"))
    latents, text = jnp.zeros((2, 8, 8, 4)), jnp.zeros((2, 32, 12))
    unet = count_flops(trace(lambda x: pipeline.unet(x, jnp.zeros(2), text), latents))
    decoder = count_flops(trace(lambda x: pipeline.vae.decode(x), latents[:1]))
    drawn = 2 * (25 + 15) * unet + 2 * 2 * decoder
    assert drawn < watched_flops(config, 8) < 1.5 * drawn
    assert watched_flops(config, 3) == 3 * watched_flops(config, 100)


def test_slices_of_gpus(capsys):
    assert main(["plan", "mini", "--gpu", "h100:16", "--slices", "2"]) == 2
    assert "--slices 2 is of TPUs" in capsys.readouterr().err


@needs_compiler
def test_unknown_topology(capsys):
    assert main(["plan", "mini", "--topology", "v5e:3x5"]) == 2
    assert capsys.readouterr().err.startswith("error: cannot compile for v5e:3x5: ")


def test_without_the_compiler(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for chips, extra in (("--topology=v5e:2x2", "jax[tpu]"), ("--gpu=h100:4", "jax[cuda13]")):
        assert main(["plan", "mini", chips]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"pip install '{extra}'" in error


@needs_compiler
def test_plan_of_a_small_step(small_base, capsys):
    settings = [f"options.base={small_base}", "batch_size=8"]
    status, report = run(capsys, "mini", *settings, "--topology", "v5e:2x2")
    assert status == 0
    assert report["memory"]["fits"]
    check(report, override(load_config("mini")[1], settings), chips=4)


@needs_compiler
@pytest.mark.slow
def test_plan_of_the_mini_step(capsys):
    status, report = run(capsys, "mini", "--topology", "v5e:2x2", "--global-batch", "32")
    assert status == 0
    check(report, override(load_config("mini")[1], ["batch_size=32"]), chips=4)


@needs_compiler
@pytest.mark.slow
def test_step_that_does_not_fit(small_base, capsys):
    """The compiler's refusal becomes a verdict, with the numbers that it names."""
    settings = [f"options.base={small_base}", f"batch_size={2**22}"]
    status, report = run(capsys, "mini", *settings, "--topology", "v5e:2x2")
    assert status == 1
    memory = report["memory"]
    assert memory["usable"] == 15.75 * 2**30
    assert memory["used"] > memory["usable"]
    assert memory["used"] == sum(memory["parts"].values())
    assert memory["try"][0].startswith("remat=block")
