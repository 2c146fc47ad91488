"""The report's numbers and its verdict, from made-up stats, and what the command refuses."""

import importlib.util

import pytest

from fact_infer.cli.main import main
from fact_infer.plan.report import format_report, largest_batch, make_report, second_batch, verdict
from fact_jax.plan.chips import CHIPS

GB = 1e9
WEIGHTS = {"unet": 2 * GB, "vae": 1 * GB}


def program(flops, needed, accessed):
    return {
        "flops": flops,
        "model_flops": sum(flops.values()),
        "needed": needed,
        "usable": None,
        "accessed": accessed,
        "kernels": {"flash": 3},
    }


def batch(count, denoise, decode, prepare=GB):
    return {
        "batch": count,
        "conditions": 0.5 * GB,
        "programs": {
            "prepare": program({"float32": 1e12}, prepare, 819e6),
            "denoise": program({"bfloat16": 197e9}, denoise, 2 * 819e6),
            "decode": program({"default": 197e9}, decode, 0.5 * 819e6),
        },
    }


def stats(*batches):
    return {
        "notes": ["a note"],
        "parameters": {"unet": 10, "vae": 5},
        "weights": WEIGHTS,
        "size": [256, 512],
        "calls": 50,
        "batches": list(batches),
        "seconds": 1.0,
    }


def test_numbers_of_one_chip():
    """Milliseconds on v5e: 6e12 operations of float32 (six passes) take 30.5, memory 1; a step
    1 and 2; the decoder 1 and 0.5."""
    report = make_report(CHIPS["v5e"], 2, stats(batch(2, 2 * GB, 3 * GB), batch(8, 8 * GB, 6 * GB)))
    prepare, denoise, decode = (report["programs"][n] for n in ("prepare", "denoise", "decode"))
    assert prepare["seconds"] == pytest.approx([6 / 197, 6 / 197 + 0.001])
    assert denoise["seconds"] == pytest.approx([0.002, 0.003])
    assert (denoise["runs"], denoise["bound_by"]) == (50, "memory")
    assert decode["seconds"] == pytest.approx([0.001, 0.0015])
    bounds = report["roofline"]
    best, worst = 6 / 197 + 0.1 + 0.001, 6 / 197 + 0.001 + 0.15 + 0.0015
    assert bounds["batch_seconds"] == pytest.approx([best, worst])
    assert bounds["picture_seconds"] == pytest.approx([best / 4, worst / 4])  # two chips, two each
    own = (1e12 + 51 * 197e9) / 197e12
    assert bounds["mfu"] == pytest.approx([own / best, own / worst])
    assert bounds["bound_by"] == "memory"
    memory = report["memory"]
    assert memory["parts"] == {**WEIGHTS, "conditions": 0.5 * GB, "temporary": 2.5 * GB}
    assert (memory["largest_program"], memory["used"]) == ("decode", 6 * GB)
    text = "\n".join(format_report(report))
    for part in (
        "2 x v5e, batch 4 of 512 x 256: 2 a chip, 50 calls of the UNet",
        "note: a note",
        "   10 parameters",
        "temporary        2.5000 GB   of decode",
        "50 x denoise: 0.197 TFLOP and 1.638 GB, 2 ms to 3 ms, bound by memory",
        "   3 x flash",
        "a picture: 32.86 ms to 45.74 ms, bound by memory",
    ):
        assert part in text


def test_tf32_and_float32_on_a_gpu():
    """989 TFLOP/s of 16 bits, half of it TF32, and 132 x 128 lanes at 1.98 GHz of float32."""
    for kind, rate in (("bfloat16", 989e12), ("tf32", 989e12 / 2), ("float32", 66.9e12)):
        asked = batch(1, GB, GB)
        asked["programs"]["denoise"]["flops"] = {kind: rate}
        report = make_report(CHIPS["h100"], 1, stats(asked, batch(2, 2 * GB, 2 * GB)))
        assert report["programs"]["denoise"]["arithmetic_seconds"] == pytest.approx(1, abs=1e-3)


def test_largest_batch_is_that_of_the_program_that_grows_fastest():
    """3 GB of weights, 13 of memory: steps of 1 + n GB would let 9 run, the decoder's 4 + n / 2
    12; with a decoder of n GB that is 10 at 1 it is 1."""
    sizes = [batch(1, 2 * GB, 4.5 * GB), batch(4, 5 * GB, 6 * GB)]
    assert largest_batch(sizes, 3 * GB, 13 * GB) == 9
    assert largest_batch(sizes[::-1], 3 * GB, 13 * GB) == 9
    assert largest_batch([batch(1, 2 * GB, 10 * GB), batch(2, 3 * GB, 11 * GB)], 3e9, 13e9) == 1
    assert largest_batch([batch(2, 20 * GB, GB), batch(1, 12 * GB, GB)], 3e9, 13e9) == 0


def test_second_batch_is_near_to_the_largest():
    assert second_batch(batch(1, GB, 0.5 * GB), 3 * GB, 13 * GB) == 4  # 10 would fit
    assert second_batch(batch(4, 9 * GB, GB), 3 * GB, 13 * GB) == 8
    assert second_batch(batch(4, 11 * GB, GB), 3 * GB, 13 * GB) == 2
    assert second_batch(batch(1, 11 * GB, GB), 3 * GB, 13 * GB) is None
    assert second_batch(batch(1, 4 * GB, GB), 3 * GB, 13 * GB) == 2


def test_verdict():
    fitting = make_report(CHIPS["v5e"], 2, stats(batch(1, GB, GB), batch(8, 8 * GB, 8 * GB)))
    assert verdict(fitting) == (
        "fits, with 12.91 GB to spare; the largest batch is 26, on a straight line through the "
        "memory of programs compiled for 2 and 16"
    )
    # The compiler's refusal names what it needs and what there is.
    refused = batch(1, 20 * GB, GB)
    refused["programs"]["denoise"] |= {"usable": 16 * GB, "accessed": None, "kernels": None}
    report = make_report(CHIPS["v5e"], 1, stats(refused))
    assert verdict(report) == "does not fit: 7.00 GB too much; not even one picture a chip does"
    assert report["roofline"] is None
    assert any("it does not compile" in line for line in format_report(report))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "h100:8", "--batch", "4"], "--batch 4 does not divide over 8 chips"),
        (["--gpu", "h10"], "the nearest is 'h100'"),
        (["--topology", "v5e", "--batch", "4"], "expected a TPU and its shape"),
        (["--gpu", "h200", "--adapter", "a", "--photos", "0"], "--photos must be at least 1"),
        (["--gpu", "h200"], "pip install 'jax[cuda13]'"),
        (["--topology", "v5e:2x2"], "pip install 'jax[tpu]'"),
    ],
)
def test_what_is_refused(monkeypatch, capsys, options, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", "--base", "somewhere", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
