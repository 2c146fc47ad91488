"""fact-convert as a user or a script calls it."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from fact_convert.cli.main import main
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.weight_files import read_file
from fact_convert.models.adapter import DIM_HEAD_KEY


@pytest.fixture
def adapter(released_checkpoint, tmp_path):
    """The released checkpoint as our adapter file."""
    out = tmp_path / "adapter.safetensors"
    assert main(["to-torch", str(released_checkpoint), str(out), "--dim-head", "8"]) == 0
    return out


@pytest.mark.parametrize("command", [[], ["inspect"], ["to-torch"], ["to-jax"], ["verify"]])
def test_help_is_quick(command):
    fastest = 9.0
    for _ in range(3):  # the machine may be busy
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "fact_convert", *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        fastest = min(fastest, time.perf_counter() - start)
        if fastest < 1:
            break
    assert "usage: fact-convert" in done.stdout
    assert fastest < 1


def test_inspect_an_adapter(adapter, capsys):
    capsys.readouterr()
    assert main(["inspect", str(adapter), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["kind"] == "adapter"
    assert about["format"] == "safetensors"
    assert about["parts"]["adapter"] == {
        "tensors": 304,
        "parameters": 218448,
        "dtypes": ["float32"],
        "copies of the base's norm2": 32,
    }
    assert about["metadata"]["config"]["resampler"]["heads"] == 3
    assert main(["inspect", str(adapter)]) == 0
    assert "parameters 218,448" in capsys.readouterr().out


def test_inspect_a_pipeline_and_a_single_model(pipeline_folder, capsys):
    assert main(["inspect", str(pipeline_folder), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["kind"] == "pipeline"
    assert set(about["parts"]) == {"unet", "vae", "clip_text"}
    assert main(["inspect", str(pipeline_folder / "vae"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "vae"


def test_inspect_an_unknown_file_names_the_nearest_kind(golden, tmp_path, capsys):
    state = golden("transface", "state.")[0]
    odd = {f"odd.{key}": array for key, array in state.items() if "blocks" in key}
    few = {"norm.weight": state["norm.weight"]}
    write_safetensors(tmp_path / "x.safetensors", odd | few, {})
    assert main(["inspect", str(tmp_path / "x.safetensors"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["kind"] == "unknown"
    assert about["unknown keys"] == {"nearest to transface": sorted(odd)}


def test_there_and_back(released_checkpoint, adapter, same_bits, tmp_path, capsys):
    assert main(["to-jax", str(adapter), str(tmp_path / "jax")]) == 0
    assert main(["to-torch", str(tmp_path / "jax"), str(tmp_path / "back.ckpt")]) == 0
    back = dict(read_file(tmp_path / "back.ckpt")[0])
    assert back.pop(DIM_HEAD_KEY) == 8  # which the released code does not look at
    same_bits(read_file(released_checkpoint)[0], back)
    for one in (adapter, tmp_path / "jax", tmp_path / "back.ckpt"):
        assert main(["verify", str(one), str(released_checkpoint)]) == 0
    assert capsys.readouterr().out.endswith("the same numbers\n")


def test_a_pipeline_is_copied(pipeline_folder, tmp_path):
    assert main(["to-torch", str(pipeline_folder), str(tmp_path / "copy")]) == 0
    assert main(["verify", str(pipeline_folder), str(tmp_path / "copy")]) == 0


def test_what_config_overrules_is_said(pipeline_folder, tmp_path, capsys):
    source, file = tmp_path / "source", tmp_path / "one.safetensors"
    shutil.copytree(pipeline_folder, source)
    for name, key, value in (
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("unet/config.json", "attention_head_dim", 4),
    ):
        said = json.loads((source / name).read_text()) | {key: value}
        (source / name).write_text(json.dumps(said))
    assert main(["to-torch", str(source), str(file)]) == 0
    capsys.readouterr()
    assert main(["to-torch", str(file), str(tmp_path / "same"), "--config", str(source)]) == 0
    assert capsys.readouterr().err == ""
    other = ["to-torch", str(file), str(tmp_path / "other"), "--config", str(pipeline_folder)]
    assert main(other) == 0
    err = capsys.readouterr().err
    assert "prediction_type epsilon, not v_prediction" in err
    assert "heads (2, 2), not (4, 4)" in err
    assert err.count("\n") == 2


def test_verify_names_parts_that_only_one_has(pipeline_folder, tmp_path, capsys):
    unet = tmp_path / "unet.safetensors"
    assert main(["to-torch", str(pipeline_folder / "unet"), str(unet)]) == 0
    capsys.readouterr()
    assert main(["verify", str(unet), str(pipeline_folder)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    found = [line.removeprefix(f"only in {pipeline_folder}: ") for line in lines]
    assert [line.partition(",")[0] for line in found] == ["clip_text", "vae"]
    assert all(line.endswith(" tensors") for line in found)
    assert last == "different"


def test_verify_says_what_differs(tmp_path, capsys, golden):
    state = {k: v.astype(np.float32) for k, v in golden("transface", "state.")[0].items()}
    changed = dict(state)
    changed["norm.weight"] = state["norm.weight"] + np.float32(0.25)
    changed["norm.bias"] = np.full_like(state["norm.bias"], np.nan)
    changed["senet.0.weight"] = state["senet.0.weight"][:1]
    del changed["mask_token"]
    write_safetensors(tmp_path / "a.safetensors", state, {})
    write_safetensors(tmp_path / "b.safetensors", changed, {})
    pair = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main(["verify", *pair]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "transface/norm.weight: largest difference 0.25, 32 of 32" in lines
    assert f"only in {pair[0]}: transface/mask_token" in lines
    assert any("senet.0.weight: (16, 512) against (1, 512)" in line for line in lines)
    assert any("norm.bias" in line for line in lines)
    assert lines[-1] == "different"
    assert len(lines) == 5
    assert main(["verify", *pair, "--tolerance", "0.3"]) == 1
    assert "norm.weight" not in capsys.readouterr().out


def test_verify_compares_numbers_not_precisions(tmp_path, golden):
    state = golden("resampler", "state.")[0]
    single = {f"local_fac_prj.{k}": v.astype(np.float32) for k, v in state.items()}
    write_safetensors(tmp_path / "a.safetensors", state, {})
    write_safetensors(tmp_path / "b.safetensors", single, {})
    pair = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main(["verify", *pair]) == 0


def test_nothing_is_overwritten_unless_forced(
    adapter, released_checkpoint, same_bits, tmp_path, refused
):
    before = read_file(adapter)[0]
    arguments = ["to-torch", released_checkpoint, adapter, "--dim-head", "8"]
    assert "exists already" in refused(*arguments)
    assert main([*map(str, arguments), "--force"]) == 0
    same_bits(before, read_file(adapter)[0])
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "mine").touch()
    assert "exists already" in refused("to-jax", adapter, tmp_path / "jax")
    assert os.listdir(tmp_path / "jax") == ["mine"]


def test_bad_input_is_one_line(adapter, released_checkpoint, tmp_path, refused):
    out = tmp_path / "out.safetensors"
    assert "no such file" in refused("inspect", tmp_path / "absent.ckpt")
    assert "no weights that are known" in refused("inspect", tmp_path)
    assert "how wide a head of its resampler is" in refused("to-torch", released_checkpoint, out)
    assert "ends in .safetensors, .ckpt" in refused("to-torch", adapter, tmp_path / "x.zip")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(adapter.read_bytes()[:-100])
    for command in (["inspect", cut], ["to-torch", cut, out], ["to-jax", cut, tmp_path / "out"]):
        assert "not a whole safetensors file" in refused(*command)
    assert "not a whole" in refused("verify", adapter, cut)
    state = read_file(adapter)[0] | {"surplus": np.zeros(1, np.float32)}
    odd = tmp_path / "odd.safetensors"
    write_safetensors(odd, state, {})
    assert "1 unexpected (surplus)" in refused("to-torch", odd, out, "--dim-head", "8")
    assert not out.exists()


def test_a_mistyped_command_exits_with_2(capsys):
    assert main(["convert"]) == 2
    assert capsys.readouterr().err.startswith("error: argument COMMAND: invalid choice: 'convert'")


def test_to_torch_in_another_precision(adapter, tmp_path):
    half = tmp_path / "half.safetensors"
    assert main(["to-torch", str(adapter), str(half), "--dtype", "bfloat16"]) == 0
    (one, _), (other, _) = read_file(adapter), read_file(half)
    assert {array.dtype.name for array in other.values()} == {"bfloat16"}
    for key, array in one.items():
        np.testing.assert_array_equal(other[key], array.astype(other[key].dtype))


def test_a_pipeline_stored_in_half_still_computes_in_float32(pipeline_folder, tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "half"
    assert main(["to-torch", str(pipeline_folder), str(out), "--dtype", "float16"]) == 0
    stored, _ = read_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {array.dtype.name for array in stored.values()} == {"float16"}
    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert {p.dtype for p in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}


def test_nothing_in_a_file_steers_the_terminal(adapter, tmp_path, capsys):
    state, _ = read_file(adapter)
    odd = tmp_path / "odd\x1b[2J.safetensors"
    write_safetensors(odd, {"a": state["local_fac_prj.latents"]}, {"evil\x1b[31m": "x\u202ey\n"})
    capsys.readouterr()
    assert main(["inspect", str(odd)]) == 0
    assert main(["to-torch", str(odd), str(tmp_path / "out.ckpt")]) == 2
    assert main(["inspect", str(tmp_path / "no\x1b[2J")]) == 2
    out, err = capsys.readouterr()
    assert r"evil\x1b[31m" in out
    assert r"x\u202ey\n" in out
    assert all(line.isprintable() for line in (out + err).splitlines())


def test_long_lists_are_cut(adapter, tmp_path, refused):
    state, _ = read_file(adapter)
    surplus = {f"surplus{i:02d}": np.zeros(1, np.float32) for i in range(40)}
    write_safetensors(tmp_path / "x.safetensors", state | surplus, {})
    err = refused("to-torch", tmp_path / "x.safetensors", tmp_path / "y.ckpt")
    assert "40 unexpected (surplus00, " in err
    assert "surplus09 and 30 more)" in err
    assert "surplus10" not in err
