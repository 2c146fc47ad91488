"""`fact-infer plan` of the miniature, compiled for a TPU and a GPU."""

import json
import shutil

import pytest

from fact_infer.cli.main import main

CHIPS = [
    (["--topology", "v5e:1x1"], "splash_mha_fwd_no_residuals"),
    (["--gpu", "h100"], "__cudnn$fmhaSoftmax"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The miniature's small files, with an autoencoder that compiles quickly."""
    folder = tmp_path_factory.mktemp("plan") / "base"
    shutil.copytree("miniature/base", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "vae" / "config.json"
    narrow = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | narrow))
    return folder


@pytest.mark.parametrize(("chip", "kernel"), CHIPS)
def test_plan_of_the_miniature(base, capsys, chip, kernel):
    """At 64 x 512 the two blocks of the first level have 512 tokens: enough for kernels."""
    models = [
        *("--base", str(base), "--adapter", "miniature/adapter/adapter.safetensors"),
        *("--encoder", "miniature/encoder", "--precision", "bfloat16"),
    ]
    sizes = ["--height", "512", "--width", "64", "--batch", "1", "--sampler", "ddim"]
    assert main(["plan", *chip, *models, *sizes, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    denoise, decode = report["programs"]["denoise"], report["programs"]["decode"]
    assert (denoise["runs"], decode["runs"]) == (50, 1)
    assert denoise["kernels"][kernel] == 4  # each block's own attention, and the face's
    assert kernel not in decode["kernels"]  # float32

    parts, parameters = report["memory"]["parts"], report["parameters"]
    gates = 2 * 9  # two a block, which stay float32
    assert parts["unet"] == 2 * parameters["unet"] + 2 * gates
    assert parts["encoder"] == 4 * parameters["encoder"]
    assert report["memory"]["used"] == sum(parts.values()) < report["memory"]["usable"]
    assert parts["temporary"] + parts["conditions"] == max(
        program["needed"] for program in report["programs"].values()
    )
    # Conditions, and at least one activation: 512 tokens of 64 channels for two branches.
    assert denoise["needed"] > parts["conditions"] + 2 * 512 * 64 * 2
    assert report["largest_batch"]["compiled"] == [1, 4]
    assert report["largest_batch"]["pictures"] > 100
    best, worst = report["roofline"]["picture_seconds"]
    assert 0 < denoise["arithmetic_seconds"] * 50 < best <= worst
