"""The verdict and what it advises, from made-up stats."""

import dataclasses
import functools
import importlib.util

import pytest

from fact_jax.plan.chips import CHIPS
from fact_jax.plan.compiled_program import read_overflow
from fact_jax.plan.targets import gpu_target, read_gpu, read_topology, tpu_target
from fact_jax.utils.errors import UserError
from fact_train.config import load_config
from fact_train.plan.report import format_report, make_report, suggestions, verdict

GB = 1e9
CONFIG = dataclasses.replace(load_config("mini")[1], batch_size=64, remat="block")
PARTS = {"frozen": 2 * GB, "trainable": GB, "optimizer": 2 * GB, "ema": GB, "batch": 0}


def stats(**changes):
    return {
        "notes": ["a note"],
        "parameters": {"frozen": 10, "trainable": 5},
        "bytes": PARTS | {"temporary": 8 * GB},
        "flops": 64e12,
        "model_flops": 48e12,
        "watched_flops": 2000e12,
        "accessed": 10 * GB,
        "kernels": {"flash": 3},
        "usable": None,
        "collectives": [
            {"kind": "all-reduce", "bytes": GB, "arrays": 7, "group": 4, "times": 1, "stride": 1},
        ],
        "seconds": 1.0,
    } | changes


def test_numbers_of_one_chip():
    report = make_report(CONFIG, CHIPS["v5e"], 4, stats())
    assert report["samples_a_chip"] == 16
    assert report["flops"] == {"executed": 16e12, "model": 12e12}
    # Every 1,000 steps, as in `mini`, beside 1,000 x 16 TFLOP.
    watching = {"pictures": 32, "every": 1000, "flops": 2e15, "share": pytest.approx(2 / 18)}
    assert report["watching"] == watching
    roofline = report["roofline"]
    assert roofline["arithmetic_seconds"] == pytest.approx(16 / 197)
    assert roofline["memory_seconds"] == pytest.approx(10 / 819)
    # Scattered and gathered, three quarters of a GB each time, at 200 GB/s.
    assert roofline["collective_seconds"] == pytest.approx(1.5 / 200)
    worst = 16 / 197 + 10 / 819 + 1.5 / 200
    assert roofline["step_seconds"] == pytest.approx([16 / 197, worst])
    assert roofline["mfu"] == pytest.approx([12 / 16, 12 / 197 / worst])
    assert roofline["bound_by"] == "arithmetic"
    assert roofline["samples_a_second_a_chip"] == pytest.approx(16 / (16 / 197))


def test_it_fits():
    report = make_report(CONFIG, CHIPS["v5e"], 4, stats())
    assert report["memory"]["fits"]
    assert verdict(report) == "fits, with 2.91 GB to spare"
    text = "\n".join(format_report(report))
    for part in (
        "note: a note",
        "16 samples a chip",
        "optimizer",
        "pictures: 32 every 1000 steps, 2000 TFLOP a chip, 11.1% of the whole",
        "   3 x flash",
        "all-reduce",
        "a step: 81.22 ms to 100.9 ms, bound by arithmetic",
        "collectives 7.5 ms",
        "MFU: at most 75%, 60% without overlap",
        "v5e: 197",
    ):
        assert part in text


def test_it_does_not_fit():
    """20 GB of 16 with 16 samples a chip: 14 GB are theirs, so 11 would fit."""
    large = {"bytes": PARTS | {"temporary": 14 * GB}, "usable": 16 * GB}
    large |= {"collectives": None, "accessed": None, "kernels": None}
    report = make_report(CONFIG, CHIPS["v5e"], 4, stats(**large))
    assert not report["memory"]["fits"]
    assert any("does not compile" in line for line in format_report(report))
    said = verdict(report)
    assert said.startswith("does not fit: 4.00 GB too much; try accumulate=2 ")
    assert "--global-batch 44 (11 samples a chip)" in said
    assert "mesh.fsdp=4 (frees up to 3.0 GB a chip)" in said


def test_remat_is_advised_first():
    plain = dataclasses.replace(CONFIG, remat="none")
    assert suggestions(plain, 4, PARTS, 20 * GB, 16 * GB)[0].startswith("remat=block")


def test_state_alone_is_too_much():
    """No batch is small enough: only splitting helps, and on one chip nothing does."""
    assert [s.split()[0] for s in suggestions(CONFIG, 4, PARTS, 20 * GB, 5 * GB)] == ["mesh.fsdp=4"]
    assert suggestions(CONFIG, 1, PARTS, 20 * GB, 5 * GB) == ["a chip with more memory"]


def test_a_part_of_a_gpu_is_usable():
    """79.0 of 85.9 GB: 78 fit and 80 do not."""
    for used, fits in ((78, True), (80, False)):
        sizes = PARTS | {"temporary": (used - 6) * GB}
        report = make_report(CONFIG, CHIPS["h100"], 4, stats(bytes=sizes))
        assert report["memory"]["usable"] == pytest.approx(0.92 * 80 * 2**30)
        assert report["memory"]["fits"] is fits


@pytest.mark.parametrize(
    "words",
    [
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (17.20G) exceeds available HBM (15.75G). HLO module: jit_f.",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.20G of 15.75G hbm. "
        "Exceeded hbm capacity by 1.45G.",
    ],
)
def test_the_compilers_complaint(words):
    assert read_overflow(words) == (17.2 * 2**30, 15.75 * 2**30)


def test_another_complaint_is_no_overflow():
    with pytest.raises(RuntimeError, match="does not compile"):
        read_overflow("INTERNAL: something else")


def test_reading_what_was_asked_for():
    chip, count, target = read_topology("v5e:16x16")
    assert (chip, count) == (CHIPS["v5e"], 256)
    assert target.options == {"topology_name": "v5e:16x16", "num_slices": 1}
    assert read_topology("v5e:16x16", slices=4)[1:] == (1024, tpu_target("v5e:16x16", 4))
    assert read_topology("V5E:16x16") == read_topology("v5e:16x16")
    assert read_topology("v5p:4x4x8")[:2] == (CHIPS["v5p"], 128)
    # Less than a whole host has to be said.
    alone = read_topology("v5e:1x1")[2].options
    assert alone == tpu_target("v5e:2x2").options | {
        "topology_name": "v5e:1x1",
        "chips_per_host_bounds": [1, 1, 1],
    }
    half, count, _ = read_topology("tpu7x:2x2x1")
    assert (half.peak, half.memory, count) == (2307e12 / 2, 96 * 2**30, 8)
    assert read_gpu("h100") == (CHIPS["h100"], 8, gpu_target("h100", 8))
    assert read_gpu("h200", usual=1)[1] == 1
    chip, count, target = read_gpu("H200:64")
    assert (chip, count, target.options["topology"]) == (CHIPS["h200"], 64, "1x8x8")
    assert "major: 9 minor: 0" in target.options["target_config"]


def test_every_gpu_can_be_compiled_for():
    for chip in CHIPS.values():
        if chip.kinds[0].startswith("NVIDIA"):
            config = gpu_target(chip.name, 3).options["target_config"]
            assert f"device_memory_size: {int(chip.memory)}" in config
            assert chip.kinds[0] in config


@pytest.mark.parametrize("compilers", [[], ["libtpu"], ["jax_cuda13_plugin"]])
def test_the_compiler_must_be_installed(monkeypatch, compilers):
    found = {"libtpu": tpu_target("v5e:2x2"), "jax_cuda13_plugin": gpu_target("h100", 8)}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in compilers or None)
    for name, target in found.items():
        if name in compilers:
            variables = target.environment()
            assert variables.get("JAX_PLATFORMS") == ("cpu" if name == "libtpu" else None)
        else:
            with pytest.raises(UserError, match=r"the chip itself is not needed.*pip install 'jax"):
                target.environment()


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        (read_topology, "v5e", "expected a TPU and its shape, as v5e:16x16"),
        (read_topology, "v6:2x2", "the nearest is 'v6e'"),
        (read_topology, "h100:2x2", "no data on a chip 'h100'"),
        (read_topology, "v5e:0x2", "expected a TPU and its shape"),
        (functools.partial(read_topology, slices=0), "v5e:2x2", "--slices 0: expected at least 1"),
        (read_gpu, "h100:0", "expected a GPU and how many"),
        (read_gpu, "h100:12", "up to 8 GPUs, or whole nodes of them"),
        (read_gpu, "h10", "the nearest is 'h100'"),
    ],
)
def test_what_cannot_be_read(read, text, words):
    with pytest.raises(UserError, match=words):
        read(text)
