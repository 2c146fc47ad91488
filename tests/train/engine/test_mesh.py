"""The same numbers on every mesh, and no more traffic than the trained parameters cause."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fact_jax.mesh import MeshConfig
from fact_jax.sharding import make_mesh
from fact_jax.utils.errors import UserError
from fact_train.config import TrainConfig
from fact_train.engine.checksums import checksums
from fact_train.engine.step import check_batch

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[3]
# All axes of the mesh and the microbatches at once; those that are slow take them one by one.
QUICK = ("8x1x1", "2x2x2 accumulate")
SLOW = ("1x8x1", "2x2x2", "accumulate", "base split", "base split 2x2x2", "remat")


def train_in(miniature, names):
    """Variant -> what :mod:`tests.train.engine.meshes` says of it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.engine.meshes", str(miniature), "one", *names],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {row.pop("name"): row for row in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def found(miniature):
    return train_in(miniature, QUICK)


@pytest.fixture(scope="module")
def found_slowly(miniature):
    return train_in(miniature, [*SLOW, "watched"])


def assert_the_numbers_of_one_device(found, name):
    for ours, one in zip(found[name]["metrics"], found["one"]["metrics"], strict=True):
        assert ours.keys() == one.keys()
        for metric, value in one.items():
            np.testing.assert_allclose(ours[metric], value, rtol=1e-5, atol=1e-7, err_msg=metric)
    losses = {metrics["loss"] for metrics in found["one"]["metrics"]}
    assert len(losses) == len(found["one"]["metrics"])
    worst = max(found[name]["difference"].items(), key=lambda item: item[1])
    assert worst[1] < 1e-5, worst


@pytest.mark.parametrize("name", QUICK)
def test_the_numbers_of_one_device(found, name):
    assert_the_numbers_of_one_device(found, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_numbers_of_one_device_one_setting_at_a_time(found_slowly, name):
    assert_the_numbers_of_one_device(found_slowly, name)


KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def collectives(text: str) -> list[tuple[str, int]]:
    """(kind, bytes of the result) of each collective in a compiled program, float32 or wider."""
    found = []
    for shape, kind in re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", text):
        arrays = re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", shape)
        sizes = [
            int(bits) // 8 * math.prod(map(int, filter(None, d.split(",")))) for bits, d in arrays
        ]
        found.append((kind, sum(sizes)))
    return found


def test_data_parallelism_moves_the_trained_parameters_and_nothing_else(found):
    """Gradients are summed once, updates gathered once; the frozen base stays where it is."""
    sizes = found["8x1x1"]["bytes"]
    trained = sum(sizes.values())
    # The adapter uses these on visual and on face tokens; XLA on the CPU sums the two apart.
    twice = sum(
        size for path, size in sizes.items() if re.search("face/(norm1|attn/to_[kv])/", path)
    )
    moved: dict[str, int] = {}
    for kind, size in collectives(found["8x1x1"]["text"]):
        moved[kind] = moved.get(kind, 0) + size
    scalars = 400  # losses, norms and metrics
    assert moved.keys() == {"all-reduce", "all-gather"}
    assert trained < moved["all-reduce"] <= trained + twice + scalars
    assert moved["all-gather"] <= trained


def test_checksums_do_not_depend_on_the_mesh(found):
    array = np.random.default_rng(0).standard_normal((8, 6, 4)).astype(np.float32)
    assert found["checksums"]["split"] == [checksums([jnp.asarray(array)])] * 4


def test_text_attention_is_off_on_every_device(found):
    """Bit for bit: with it off the pictures do not depend on the text."""
    assert found["text attention"]["off"] == 0.0
    assert found["text attention"]["on"] > 0.1


def test_attention_on_accelerators_moves_nothing(found):
    assert "while" in found["attention"]["text"]  # it does walk over tiles
    assert collectives(found["attention"]["text"]) == []


def held(found, name, pattern):
    """The parts of its leaves that a device holds."""
    return {part for path, part in found[name]["held"].items() if re.search(pattern, path)}


def test_what_the_axes_split(found):
    for name in QUICK:
        assert held(found, name, "(mu|nu|ema)/.*face/.*/kernel$") == {1 / 8}
    assert held(found, "8x1x1", "params/.*kernel$") == {1.0}
    mixed = QUICK[1]
    assert held(found, mixed, "params/.*face/attn/to_q/kernel$") == {1 / 4}
    assert held(found, mixed, "unet/.*(to_q|to_out/0)/kernel$") == {1 / 2}
    assert held(found, mixed, "alpha_attn|norm1/bias") == {1.0}


@pytest.mark.slow
def test_eight_devices_draw_the_pictures_of_one(found_slowly):
    """Up to a level of rounding. Rows of noise and of people that were mixed up would show."""
    found = found_slowly["watched"]
    assert all(difference <= 1.0 for difference in found["difference"].values())
    numbers = [
        found["difference"][f"validation/{name}"] for name in ("similarity", "inside_change")
    ]
    assert max(numbers) < 1e-3
    assert found["change"] > 0.05


@pytest.mark.slow
def test_what_one_axis_splits(found_slowly):
    assert held(found_slowly, "1x8x1", "(mu|nu|ema)/.*face/.*/kernel$") == {1 / 8}
    assert held(found_slowly, "1x8x1", "params/.*face/.*kernel$") <= {1 / 8, 1.0}
    assert 1 / 8 in held(found_slowly, "1x8x1", "params/.*face/.*kernel$")
    assert held(found_slowly, "1x8x1", "unet/.*kernel$") == {1.0}
    assert 1 / 8 in held(found_slowly, "base split", "unet/.*kernel$")


CONFIG = TrainConfig(task="toy", steps=1, batch_size=10, options=None)


@pytest.mark.parametrize(
    ("batch", "accumulate", "message"),
    [
        (10, 1, "batch 10 does not divide over data x fsdp = 8: batch_size=16 would"),
        (24, 2, "batch 24 does not divide into accumulate = 2 microbatches over data x fsdp = 8"),
    ],
)
def test_a_batch_that_does_not_divide(monkeypatch, batch, accumulate, message):
    monkeypatch.setattr("fact_train.engine.step.batch_ways", lambda mesh: 8)
    config = dataclasses.replace(CONFIG, batch_size=batch, accumulate=accumulate)
    with pytest.raises(UserError, match=message):
        check_batch(config, make_mesh(MeshConfig()))
