"""Files that are none of ours are named as what they are."""

import json
import shutil

import numpy as np
import pytest
import torch

from fact_convert.cli.main import main
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.torch_io import write_torch_file
from fact_convert.io.weight_files import read_file
from fact_convert.models.adapter import DIM_HEAD_KEY
from fact_jax.utils.errors import UserError


def zeros(*shape):
    return np.zeros(shape, np.float32)


FAMILIES = {
    "SDXL": [
        {"conditioner.embedders.0.x": zeros(1), "model.diffusion_model.out.2.bias": zeros(4)},
        {"add_embedding.linear_1.weight": zeros(4, 4), "conv_in.weight": zeros(4, 4, 3, 3)},
        {"model.diffusion_model.label_emb.0.0.weight": zeros(4, 4)},
    ],
    "SD3": [
        {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": zeros(4, 4)},
        {"transformer_blocks.0.attn.add_q_proj.weight": zeros(4, 4)},
    ],
    "Flux": [
        {"double_blocks.0.img_attn.qkv.weight": zeros(4, 4)},
        {"single_transformer_blocks.0.attn.to_q.weight": zeros(4, 4)},
    ],
    "Stable Diffusion 2": [{"cond_stage_model.model.ln_final.weight": zeros(4)}],
    "an IP-Adapter": [
        {"image_proj.proj.weight": zeros(4, 4), "ip_adapter.1.to_k_ip.weight": zeros(4, 4)}
    ],
    "a textual inversion": [
        {"<cat-toy>": zeros(768)},
        {"emb_params": zeros(4, 768)},
        {"clip_l": zeros(2, 768), "clip_g": zeros(2, 1280)},
    ],
    "TAESD": [
        {f"{i}.conv.{j}.weight": zeros(4, 4, 3, 3) for i in range(3, 9) for j in (0, 2, 4)}
        | {"1.weight": zeros(4, 4, 3, 3), "1.bias": zeros(4)},
        {f"decoder.layers.{i}.conv.{j}.weight": zeros(4) for i in range(9) for j in (0, 2, 4)},
    ],
}


@pytest.mark.parametrize(
    ("family", "state"), [(name, state) for name, states in FAMILIES.items() for state in states]
)
def test_other_families_are_named(family, state, tmp_path, capsys):
    write_safetensors(tmp_path / "x.safetensors", state, {})
    write_torch_file(tmp_path / "x.ckpt", state)
    for file in ("x.safetensors", "x.ckpt"):
        for command in (["inspect"], ["to-jax", str(tmp_path / "out")]):
            command.insert(1, str(tmp_path / file))
            assert main(command) == 2
            err = capsys.readouterr().err
            assert f"this is {family}" in err
            assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("family", "held"),
    [
        ("an IP-Adapter", {"image_proj": {"a": 1}, "ip_adapter": {"1.to_k_ip.weight": 2}}),
        ("a textual inversion", {"string_to_token": {"*": 265}, "string_to_param": {"*": 1}}),
    ],
)
def test_other_families_in_nested_pickles(family, held, tmp_path):
    held = {name: {key: torch.ones(2, 768) for key in inner} for name, inner in held.items()} | {
        "name": "x"
    }
    torch.save(held, tmp_path / "x.bin")
    with pytest.raises(UserError, match=f"this is {family}"):
        read_file(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("StableDiffusionXLImg2ImgPipeline", "SDXL"),
        ("StableDiffusion3Pipeline", "SD3"),
        ("FluxPipeline", "Flux"),
    ],
)
def test_other_pipelines_are_named(name, family, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"this is {family}: only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n <html lang=en>", "a web page"),
        (b"<?xml version='1.0'?><Error>", "a web page"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b'{"error": "Repository not found"}', "JSON text"),
        (b"\x1f\x8b\x08\0", "packed with gzip"),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "gguf"])
def test_first_bytes_are_named(start, said, ending, tmp_path):
    file = tmp_path / f"x.{ending}"
    file.write_bytes(start)
    with pytest.raises(UserError, match=said) as caught:
        read_file(file)
    assert ("though its ending says" in str(caught.value)) == (ending != "gguf")


def test_the_wrong_ending(tmp_path):
    state = {"a.b": zeros(3)}
    write_safetensors(tmp_path / "x.safetensors", state, {})
    torch.save({"a.b": torch.ones(3)}, tmp_path / "x.pt")
    torch.save({"a.b": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for source, name, said in (
        ("x.safetensors", "y.ckpt", "is a safetensors file, though its ending says pickle"),
        ("x.pt", "y.safetensors", "is a zip archive, .* though its ending says safetensors"),
        ("old.pt", "z.safetensors", "is a pickle, .* though its ending says safetensors"),
        ("x.pt", "y.zip", "is a zip archive, .* not a weight file by its ending"),
    ):
        shutil.copy(tmp_path / source, tmp_path / name)
        with pytest.raises(UserError, match=said):
            read_file(tmp_path / name)


def test_a_program_is_no_weights(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "x.pt")
    with pytest.raises(UserError, match="a TorchScript program"):
        read_file(tmp_path / "x.pt")


def test_endings_in_capitals(released_checkpoint, same_bits, tmp_path):
    wanted = read_file(released_checkpoint)[0]
    source = shutil.copy(released_checkpoint, tmp_path / "A.CKPT")
    for name in ("B.SAFETENSORS", "b.sft", "B.PT", "b.Pth", "b.BIN", "C.SFT"):
        arguments = ["to-torch", str(source), str(tmp_path / name), "--dim-head", "8"]
        assert main(arguments) == 0
        assert (tmp_path / name).is_file()
        found = {k: a for k, a in read_file(tmp_path / name)[0].items() if k != DIM_HEAD_KEY}
        same_bits(found, wanted)
        source = tmp_path / name
