"""fact-convert writing: every layout, what is left out, and what is only tried."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from fact_convert import load_encoder
from fact_convert.cli.inspection import _base_of_adapter
from fact_convert.cli.opening import Weights, open_weights
from fact_convert.cli.saving import save_jax
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.torch_io import write_torch_file
from fact_convert.io.weight_files import read_file
from fact_convert.models.adapter import DIM_HEAD_KEY
from fact_convert.rules.key_tables import ADAPTER_INFIX
from tests.converters.conftest import run

pytestmark = pytest.mark.heavy

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture
def base_file(golden, tmp_path):
    """The UNet that the released checkpoint belongs to."""
    write_safetensors(tmp_path / "unet.safetensors", golden("unet_adapter", "unet.")[0], {})
    return tmp_path / "unet.safetensors"


@pytest.fixture
def encoder(golden, tmp_path):
    state = {k: v.astype(np.float32) for k, v in golden("transface", "state.")[0].items()}
    write_torch_file(tmp_path / "encoder.pt", state)
    return tmp_path / "encoder.pt"


def test_copies_of_the_bases_norm2(released_checkpoint, base_file, same_bits, tmp_path, capsys):
    state = read_file(released_checkpoint)[0]
    copies = {key for key in state if ".processor.ln." in key}
    out = tmp_path / "a.ckpt"
    run("to-torch", released_checkpoint, out)
    assert f"{len(copies)} copies of its base's norm2 kept" in capsys.readouterr().err
    run("to-torch", released_checkpoint, out, "--force", "--base", base_file)
    assert f"left out {len(copies)} copies" in capsys.readouterr().err
    same_bits({k: a for k, a in state.items() if k not in copies}, read_file(out)[0])

    own = f"{BLOCK}.attn2.processor.ln.bias"
    state[own] = state[own] + np.float32(0.5)
    write_torch_file(tmp_path / "own.ckpt", state)
    run("to-torch", tmp_path / "own.ckpt", out, "--force", "--base", base_file)
    err = capsys.readouterr().err
    assert f"left out {len(copies) - 1} copies" in err
    assert "KEPT 1 norm2 that differ" in err
    assert own in err
    kept = {k: a for k, a in state.items() if k not in copies or k == own}
    same_bits(kept, read_file(out)[0])
    run("to-jax", out, tmp_path / "jax", "--dim-head", 8)
    run("to-torch", tmp_path / "jax", tmp_path / "back.ckpt")
    back = {k: a for k, a in read_file(tmp_path / "back.ckpt")[0].items() if k != DIM_HEAD_KEY}
    same_bits(kept, back)


def test_a_base_that_is_not_the_adapters(released_checkpoint, peer_state, tmp_path, capsys):
    write_safetensors(tmp_path / "x.safetensors", peer_state("unet")[0], {})
    arguments = ("to-torch", released_checkpoint, tmp_path / "a.ckpt", "--base")
    run(*arguments, tmp_path / "x.safetensors", status=2)
    assert "made for another base" in capsys.readouterr().err
    run(*arguments, released_checkpoint, status=2)
    assert "--base wants an adapter and its base" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_adapter_out_of_a_whole_checkpoint(
    released_checkpoint, golden, same_bits, dtype, tmp_path, capsys
):
    state = read_file(released_checkpoint)[0]
    prefix = "local_fac_prj."
    parts = {
        "unet": golden("unet_adapter", "unet.")[0]
        | {k: a for k, a in state.items() if not k.startswith(prefix) and ".ln." not in k},
        "resampler": {k: a for k, a in state.items() if k.startswith(prefix)},
    }
    whole = Weights(path=released_checkpoint, format="checkpoint", states=parts, metadata={})
    save_jax(whole, tmp_path / "whole")
    options = ["--dim-head", 8, *(["--dtype", dtype] if dtype else [])]
    run("extract", tmp_path / "whole", tmp_path / "a.safetensors", *options)
    wanted = {k: a for k, a in state.items() if ".ln." not in k}
    found = read_file(tmp_path / "a.safetensors")[0]
    if dtype is None:
        same_bits(wanted, found)
    assert set(found) == set(wanted)
    assert {array.dtype.name for array in found.values()} == {dtype or "float32"}
    assert all(np.array_equal(a.astype(found[k].dtype), found[k]) for k, a in wanted.items())
    write_safetensors(tmp_path / "unet.safetensors", golden("unet_adapter", "unet.")[0], {})
    run("extract", tmp_path / "unet.safetensors", tmp_path / "b.ckpt", status=2)
    assert "no whole adapter: unet, but no adapter and no resampler" in capsys.readouterr().err


def test_a_lora_is_added_and_taken_out(pipeline_folder, tmp_path, capsys):
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = open_weights(pipeline_folder).states["unet"][f"{key}.weight"]
    rng = np.random.default_rng(0)
    down = rng.standard_normal((2, weight.shape[1]), np.float32)
    up = rng.standard_normal((weight.shape[0], 2), np.float32)
    lora = {f"unet.{key}.lora_A.weight": down, f"unet.{key}.lora_B.weight": up}
    write_safetensors(tmp_path / "lora.safetensors", lora, {})
    merged, out = tmp_path / "merged.safetensors", tmp_path / "out"
    run("merge-lora", pipeline_folder, tmp_path / "lora.safetensors", merged, "--scale", 0.5)
    assert "1 layers added at 0.5" in capsys.readouterr().err
    found = open_weights(merged).states["unet"]
    np.testing.assert_allclose(found[f"{key}.weight"], weight + 0.5 * up @ down, atol=1e-6)
    other = ("--remove", "--config", pipeline_folder)
    run("merge-lora", merged, tmp_path / "lora.safetensors", out, "--scale", 0.5, *other)
    run("verify", out, pipeline_folder, "--tolerance", 1e-6)
    run("verify", merged, pipeline_folder, status=1)
    assert f"unet/{key}.weight" in capsys.readouterr().out


def test_a_face_encoder_as_a_folder_and_as_onnx(encoder, golden, same_bits, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    config = json.loads(golden("transface", "state.")[1]["config"])
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "config.json").write_text(json.dumps(config))
    run("to-torch", encoder, tmp_path / "folder", "--config", tmp_path / "beside")
    module = load_encoder(tmp_path / "folder")
    assert module.config == load_encoder(encoder, config=config).config
    same_bits(read_file(encoder)[0], read_file(tmp_path / "folder" / "model.safetensors")[0])
    run("to-torch", tmp_path / "folder", tmp_path / "encoder.onnx")
    session = runtime.InferenceSession(tmp_path / "encoder.onnx")
    size = module.config.img_size
    images = np.random.default_rng(0).uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    tokens, _ = session.run(["tokens", "embedding"], {"images": images.transpose(0, 3, 1, 2)})
    assert tokens.shape == (1, *read_file(encoder)[0]["pos_embed"].shape[1:])


def test_only_an_encoder_becomes_onnx(base_file, tmp_path, capsys):
    run("to-torch", base_file, tmp_path / "x.onnx", status=2)
    assert "only a face encoder becomes an ONNX file" in capsys.readouterr().err


def test_one_model_as_a_folder(pipeline_folder, peers, tmp_path, capsys):
    from diffusers import UNet2DConditionModel

    file = pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors"
    run("to-torch", file, tmp_path / "unet.ckpt", "--format", "original")
    assert "model.diffusion_model.input_blocks.0.0.bias" in read_file(tmp_path / "unet.ckpt")[0]
    run("to-torch", tmp_path / "unet.ckpt", tmp_path / "unet", "--config", pipeline_folder)
    opened = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    wanted = peers["unet"].state_dict()
    assert set(opened) == set(wanted)
    assert all(torch.equal(opened[key], array) for key, array in wanted.items())
    run("to-torch", tmp_path / "unet", tmp_path / "again", "--dry-run")
    capsys.readouterr()
    shutil.copy(pipeline_folder / "vae" / "config.json", tmp_path / "unet" / "config.json")
    run("to-torch", tmp_path / "unet", tmp_path / "again", status=2)
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "variant", "count"),
    [
        (["--save-variant", "fp16"], "fp16", 3),
        (["--save-variant", "fp16", "--shard", "30kB"], "fp16", 9),
        (["--shard", "30000", "--legacy"], None, 9),
    ],
)
def test_files_of_a_folder(pipeline_folder, peers, options, variant, count, tmp_path, capsys):
    from diffusers import StableDiffusionPipeline

    run("to-torch", pipeline_folder, tmp_path / "out", *options)
    suffix = "bin" if "--legacy" in options else "safetensors"
    found = list((tmp_path / "out").rglob(f"*.{suffix}"))
    if "--shard" in options:
        assert all(file.stat().st_size < 60_000 for file in found)
        assert len(found) > count
    else:
        assert len(found) == count
    # Without the last argument, diffusers looks for no pickles that have an index.
    pipe = StableDiffusionPipeline.from_pretrained(
        tmp_path / "out", variant=variant, use_safetensors="--legacy" not in options
    )
    for part, kind in (("unet", "unet"), ("vae", "vae"), ("text_encoder", "clip_text")):
        opened, wanted = getattr(pipe, part).state_dict(), peers[kind].state_dict()
        assert set(opened) == set(wanted)
        assert all(torch.equal(opened[key], array) for key, array in wanted.items())
    chosen = ["--variant", variant] if variant else []
    run("to-torch", tmp_path / "out", tmp_path / "x.ckpt", *chosen)
    run("verify", tmp_path / "x.ckpt", pipeline_folder)


def test_only_folders_have_variants_and_shards(encoder, tmp_path, capsys):
    for options in (["--shard", "1GB"], ["--save-variant", "fp16"], ["--legacy"]):
        run("to-torch", encoder, tmp_path / "x.pt", *options, status=2)
        assert "only folders have variants" in capsys.readouterr().err
    for size in ("much", "inf", "nan", "1e400", "0", "-1"):
        run("to-torch", encoder, tmp_path / "x", f"--shard={size}", status=2)
        assert "argument --shard: " in capsys.readouterr().err


def test_what_a_pipeline_has_beside_is_said(pipeline_folder, tmp_path, capsys):
    folder = shutil.copytree(pipeline_folder, tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    run("to-torch", folder, tmp_path / "copy")
    assert "left out 1 keys (safety_checker): parts of a pipeline" in capsys.readouterr().err
    assert json.loads((tmp_path / "copy" / "model_index.json").read_text())["safety_checker"] == [
        None,
        None,
    ]


def test_a_dry_run_writes_nothing(
    pipeline_folder, released_checkpoint, encoder, base_file, miniature, tmp_path, capsys
):
    before = sorted(tmp_path.iterdir())
    for source, out, *options in (
        (pipeline_folder, "a.safetensors"),
        (pipeline_folder, "b"),
        (released_checkpoint, "c.safetensors", "--dim-head", 8),
        (miniature / "encoder", "d.onnx"),
        (miniature / "encoder", "e"),
        (encoder, "f.pt", "--dtype", "float16"),
    ):
        run("to-torch", source, tmp_path / out, "--dry-run", *options)
        assert f"{tmp_path / out}: would be " in capsys.readouterr().out
    run("to-jax", pipeline_folder, tmp_path / "g", "--dry-run")
    run("to-torch", released_checkpoint, tmp_path / "c.safetensors", "--dry-run", status=2)
    run("to-torch", encoder, base_file, "--dry-run", status=2)
    assert "exists already" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_weights_that_are_there_twice(peer_state, tmp_path, capsys):
    state = dict(peer_state("vae")[0])
    name = "decoder.mid_block.attentions.0"
    state[f"{name}.query.weight"] = state[f"{name}.to_q.weight"] + 1
    write_safetensors(tmp_path / "x.safetensors", state, {})
    for command, out in (("to-torch", "out.safetensors"), ("to-jax", "out")):
        run(command, tmp_path / "x.safetensors", tmp_path / out, status=2)
        assert "are the same weight twice" in capsys.readouterr().err


def inspected(capsys, path) -> dict:
    capsys.readouterr()
    run("inspect", path, "--json")
    return json.loads(capsys.readouterr().out)


def test_inspect_knows_content_and_base(released_checkpoint, pipeline_folder, tmp_path, capsys):
    run("to-jax", released_checkpoint, tmp_path / "jax", "--dim-head", 8)
    run("to-torch", pipeline_folder, tmp_path / "x.safetensors")
    pairs = (released_checkpoint, tmp_path / "jax"), (pipeline_folder, tmp_path / "x.safetensors")
    hashes = [{inspected(capsys, path)["hash"] for path in pair} for pair in pairs]
    assert [len(found) for found in hashes] == [1, 1]
    assert hashes[0] != hashes[1]
    about = inspected(capsys, tmp_path / "x.safetensors")
    assert (about["kind"], about["dtype"]) == ("pipeline", "float32")
    assert about["parameters"] == sum(part["parameters"] for part in about["parts"].values())
    assert len(json.loads(about["metadata"]["sources"])) == 3


def test_inspect_names_the_family(tmp_path, capsys):
    def unet(*widths: int, text: int, inputs: int = 4) -> dict[str, np.ndarray]:
        widths = {
            f"down_blocks.{i}.resnets.0.conv1.weight": (c, 1, 3, 3) for i, c in enumerate(widths)
        }
        block = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        shapes = widths | {block: (8, text), "conv_in.weight": (8, inputs, 3, 3)}
        return {key: np.zeros(shape, np.float16) for key, shape in shapes.items()}

    for widths, text, inputs, name in (
        ((320, 640, 1280, 1280), 768, 4, "Stable Diffusion 1.x"),
        ((320, 640, 1280, 1280), 768, 9, "Stable Diffusion 1.x, inpainting"),
        ((320, 640, 1280, 1280), 1024, 4, "Stable Diffusion 2.x"),
        ((64, 128, 192), 64, 12, "the miniature"),
        ((64, 128, 192), 63, 12, None),
    ):
        state = unet(*widths, text=text, inputs=inputs)
        write_safetensors(tmp_path / "x.safetensors", state, {})
        assert inspected(capsys, tmp_path / "x.safetensors").get("base") == name


def test_inspect_names_the_base_of_an_adapter():
    """By the channels of its blocks on the way down, at whichever levels."""
    for widths, name in (
        ({0: 320, 1: 640, 2: 1280}, "for Stable Diffusion 1.x"),
        ({1: 128, 2: 192}, "for the miniature"),
        ({1: 640, 2: 1280}, None),
    ):
        block = "down_blocks.{}.attentions.0.transformer_blocks.0{}linear.weight"
        state = {
            block.format(i, ADAPTER_INFIX): np.zeros((c, 8), np.float16) for i, c in widths.items()
        }
        assert _base_of_adapter(state) == name


def test_inspect_says_how_an_unknown_file_differs(encoder, tmp_path, capsys):
    state = dict(read_file(encoder)[0])
    odd = {f"odd.{i}": np.zeros(2, np.float32) for i in range(2 * len(state))}
    gone = state.pop("norm.bias")
    write_safetensors(tmp_path / "x.safetensors", state | odd | {"a\x1bb": gone}, {})
    run("inspect", tmp_path / "x.safetensors", status=2)
    assert "\x1b" not in capsys.readouterr().err
    write_safetensors(tmp_path / "x.safetensors", state | odd, {"note": "a\x1bb"})
    about = inspected(capsys, tmp_path / "x.safetensors")
    assert about["kind"] == "unknown"
    assert "33% of the keys are those of a transface" in about["difference"]
    assert "1 missing (norm.bias)" in about["difference"]
    run("inspect", tmp_path / "x.safetensors")
    text = capsys.readouterr().out
    assert f"and {len(odd) - 10:,} more (--json)" in text
    assert "\x1b" not in text


def test_a_reader_that_goes_away(released_checkpoint, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        run("inspect", released_checkpoint, status=141)
        print("nobody reads this", flush=True)
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def checked_folder(pipeline_folder, tmp_path_factory):
    """The pipeline with a safety checker and a feature extractor, as diffusers writes it."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision = {**small, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(
        text_config={**small, "num_attention_heads": 2, "vocab_size": 10},
        vision_config=vision,
        projection_dim=8,
    )
    pipe = StableDiffusionPipeline.from_pretrained(
        pipeline_folder,
        safety_checker=StableDiffusionSafetyChecker(config),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8),
        requires_safety_checker=True,
    )
    folder = tmp_path_factory.mktemp("checked") / "base"
    pipe.save_pretrained(folder)
    return folder


def test_safety_checker_and_feature_extractor_are_copied(
    checked_folder, same_bits, tmp_path, capsys
):
    from diffusers import StableDiffusionPipeline

    run("to-torch", checked_folder, tmp_path / "copy", "--dtype", "float16")
    assert "safety_checker" not in capsys.readouterr().err
    pipes = [
        StableDiffusionPipeline.from_pretrained(f) for f in (checked_folder, tmp_path / "copy")
    ]
    one, other = (
        {key: tensor.numpy() for key, tensor in pipe.safety_checker.state_dict().items()}
        for pipe in pipes
    )
    same_bits(one, other)
    assert pipes[0].feature_extractor.to_dict() == pipes[1].feature_extractor.to_dict()
    assert pipes[1].config.requires_safety_checker is True
    run("to-torch", checked_folder, tmp_path / "one.safetensors")
    assert "left out 2 keys (" in capsys.readouterr().err


def test_a_safety_checker_in_a_variant_alone(checked_folder, tmp_path):
    folder = shutil.copytree(checked_folder, tmp_path / "base")
    weights = folder / "safety_checker" / "model.safetensors"
    wanted = weights.read_bytes()
    weights.rename(weights.with_name("model.fp16.safetensors"))
    (folder / "safety_checker" / "secret.json").symlink_to("/etc/hostname")
    run("to-torch", folder, tmp_path / "copy")
    copied = tmp_path / "copy" / "safety_checker"
    assert (copied / "model.safetensors").read_bytes() == wanted
    assert sorted(os.listdir(copied)) == ["config.json", "model.safetensors"]
