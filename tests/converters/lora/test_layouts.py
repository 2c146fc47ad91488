"""LoRAs written in other layouts: read by diffusers and peft, and back bit for bit."""

import copy
import json

import ml_dtypes
import numpy as np
import pytest

from fact_convert.cli.inspection import summary
from fact_convert.cli.opening import open_weights
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.weight_files import read_file
from fact_convert.lora import merge_lora, merge_loras, read_lora
from fact_jax.utils.errors import UserError
from tests.converters.conftest import run
from tests.pipelines import pndm_scheduler, small_parts

peft = pytest.importorskip("peft")
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = {
    "unet": {
        f"{BLOCK}.attn2.to_k": 3,
        "down_blocks.0.resnets.0.conv1": 2,
        "mid_block.attentions.0.proj_in": 3,
    },
    "clip_text": {"encoder.layers.1.self_attn.q_proj": 3, "encoder.layers.0.mlp.fc1": 3},
}
"""Which layers have a LoRA, and of which rank."""


@pytest.fixture(scope="module")
def parts():
    import torch

    torch.manual_seed(0)
    return small_parts(vocab_size=60, special=(0, 1))


@pytest.fixture(scope="module")
def base(parts):
    names = {"unet": "unet", "clip_text": "text_encoder"}
    return {
        kind: {key: tensor.numpy().copy() for key, tensor in parts[name].state_dict().items()}
        for kind, name in names.items()
    }


def kohya(base, kinds, *, dora=False, dtype=np.float32, alpha=None) -> dict[str, np.ndarray]:
    """A LoRA as kohya's scripts save one; alphas differ and are no ranks."""
    draw, state = np.random.default_rng(0), {}
    for kind in kinds:
        for number, (module, rank) in enumerate(LAYERS[kind].items()):
            out, *inputs = base[kind][f"{module}.weight"].shape
            name = {"unet": "lora_unet_", "clip_text": "lora_te_text_model_"}[kind]
            name += module.replace(".", "_")
            ones = (1,) * (len(inputs) - 1)
            arrays = {
                "lora_down.weight": draw.normal(size=(rank, *inputs)),
                "lora_up.weight": draw.normal(size=(out, rank, *ones)),
            }
            if dora:
                arrays["dora_scale"] = 1 + draw.random(size=(out, 1, *ones))
            arrays = {key: array.astype(dtype) for key, array in arrays.items()}
            arrays["alpha"] = np.array(number + 0.5 if number % 2 else 2).astype(alpha or dtype)
            state |= {f"{name}.{key}": array for key, array in arrays.items()}
    return state


def same_tensors(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, array in one.items():
        assert (array.dtype, array.shape) == (other[key].dtype, other[key].shape), key
        assert np.asarray(array).tobytes() == np.asarray(other[key]).tobytes(), key


ROUNDS = {
    "float32": {},
    "float16": {"dtype": np.float16},
    "bfloat16": {"dtype": ml_dtypes.bfloat16},
    "alphas in float32": {"dtype": np.float16, "alpha": np.float32},
    "DoRA": {"dora": True},
}


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
@pytest.mark.parametrize("how", ROUNDS.values(), ids=ROUNDS)
def test_there_and_back(base, layout, how, tmp_path):
    """kohya's to another layout and back: tensors bit for bit, metadata, and the same change."""
    state, metadata = kohya(base, base, **how), {"ss_network_dim": "3", "ss_base": "ä"}
    first, back = tmp_path / "first.safetensors", tmp_path / "back.safetensors"
    other = tmp_path / ("peft" if layout == "peft" else "other.safetensors")
    write_safetensors(first, state, metadata)
    run("convert-lora", first, other, "--format", layout)
    run("convert-lora", other, back, "--format", "kohya")
    same_tensors(read_file(back)[0], state)
    assert metadata.items() <= read_file(back)[1].items()
    same_tensors(*(merge_lora(base, read_lora(file))["unet"] for file in (first, other)))


def test_from_diffusers_by_way_of_the_others(base, tmp_path):
    """Settings of peft's go along: rank-stabilised alphas, and what says where it was trained."""
    said = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "use_rslora": True, "task_type": "X"}
    said |= {"rank_pattern": {"conv1": 2}, "alpha_pattern": {"to_.": 0.3}, "target_modules": ["*"]}
    write_safetensors(tmp_path / "kohya.safetensors", kohya(base, ["unet"], dtype=np.float16), {})
    files = [
        tmp_path / name for name in ("0.safetensors", "peft", "2.safetensors", "3.safetensors")
    ]
    run("convert-lora", tmp_path / "kohya.safetensors", files[0], "--format", "diffusers")
    state, _ = read_file(files[0])
    packed = json.dumps({f"unet.{name}": value for name, value in said.items()})
    write_safetensors(files[0], state, {"lora_adapter_metadata": packed})
    for source, out, layout in zip(files, files[1:], ("peft", "kohya", "diffusers"), strict=False):
        run("convert-lora", source, out, "--format", layout)
    assert json.loads((files[1] / "adapter_config.json").read_text()) == said
    same_tensors(read_file(files[3])[0], state)
    assert json.loads(read_file(files[3])[1]["lora_adapter_metadata"]) == json.loads(packed)
    # The root of a rank is no number of half precision: alphas are kept as exact as they must be.
    same_tensors(*(merge_lora(base, read_lora(file))["unet"] for file in (files[0], files[2])))


@pytest.mark.parametrize("layouts", [["diffusers"], ["peft", "kohya"], ["diffusers", "kohya"]])
def test_diffusers_reads_what_is_written(parts, base, layouts, tmp_path):
    from diffusers import StableDiffusionPipeline

    first = out = tmp_path / "first.safetensors"
    write_safetensors(first, kohya(base, base), {})
    for layout in layouts:
        source, out = out, tmp_path / (layout if layout == "peft" else f"{layout}.safetensors")
        run("convert-lora", source, out, "--format", layout)
    pipe = StableDiffusionPipeline(
        **copy.deepcopy(parts),
        tokenizer=None,
        scheduler=pndm_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.load_lora_weights(out)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    ours = merge_lora(base, read_lora(first))
    models = {"unet": pipe.unet, "clip_text": pipe.text_encoder}
    if layouts[-1] == "kohya":  # of any such file, diffusers reads that part differently
        del models["clip_text"]
    for kind, model in models.items():
        for key, tensor in model.state_dict().items():
            np.testing.assert_allclose(tensor.numpy(), ours[kind][key], rtol=0, atol=2e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_reads_what_is_written(parts, base, dora, tmp_path):
    first = tmp_path / "kohya.safetensors"
    write_safetensors(first, kohya(base, base, dora=dora), {})
    run("convert-lora", first, tmp_path / "peft", "--format", "peft")
    about = summary(open_weights(tmp_path / "peft"))
    assert (about["kind"], about["layers"]) == (
        "DoRA" if dora else "LoRA",
        {"unet": 3, "clip_text": 2},
    )
    ours = merge_lora(base, read_lora(first))
    for kind, part in {"unet": "unet", "clip_text": "text_encoder"}.items():
        model = peft.PeftModel.from_pretrained(copy.deepcopy(parts[part]), tmp_path / "peft" / part)
        for key, tensor in model.merge_and_unload().state_dict().items():
            np.testing.assert_allclose(tensor.numpy(), ours[kind][key], rtol=0, atol=2e-6)


def test_each_part_of_a_folder_has_its_own_settings(base, tmp_path):
    """Also if their numbers are the same: peft looks for the layers that they name."""
    state = kohya(base, base)
    state |= {key: np.array(2, np.float32) for key in state if key.endswith("alpha")}
    state = {key: array for key, array in state.items() if "conv1" not in key}
    write_safetensors(tmp_path / "kohya.safetensors", state, {})
    run("convert-lora", tmp_path / "kohya.safetensors", tmp_path / "once", "--format", "peft")
    run("convert-lora", tmp_path / "once", tmp_path / "twice", "--format", "peft")
    for part in ("unet", "text_encoder"):
        one, other = (tmp_path / name / part / "adapter_config.json" for name in ("once", "twice"))
        assert one.read_text() == other.read_text()


@pytest.mark.parametrize(
    ("state", "layout", "message"),
    [
        ({"lokr_w1": (2, 2), "lokr_w2": (4, 12)}, "peft", "is LoKr; only LoRA and DoRA"),
        ({"lora_mid.weight": (2, 2, 3, 3)}, "peft", "three parts"),
        ({"dora_scale": (1, 24)}, "diffusers", "magnitudes for the inputs"),
        ({"scalar": ()}, "kohya", "has scalars beside"),
        ({}, "peft", "a LoRA is a folder"),
    ],
)
def test_what_a_layout_cannot_hold(state, layout, message, tmp_path, capsys):
    name = f"lora_unet_{BLOCK.replace('.', '_')}_attn2_to_k"
    conv = (1, 1) if "lora_mid.weight" in state else ()
    if "lokr_w1" not in state:
        state = state | {"lora_down.weight": (2, 24, *conv), "lora_up.weight": (8, 2, *conv)}
    arrays = {f"{name}.{part}": np.full(shape, 2, np.float32) for part, shape in state.items()}
    write_safetensors(tmp_path / "x.safetensors", arrays, {})
    file = layout != "peft" or "a LoRA is a folder" in message
    out = tmp_path / ("out.safetensors" if file else "out")
    run("convert-lora", tmp_path / "x.safetensors", out, "--format", layout, status=2)
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_nothing_is_overwritten_or_written_when_tried(base, tmp_path, capsys):
    first, out = tmp_path / "kohya.safetensors", tmp_path / "out.safetensors"
    write_safetensors(first, kohya(base, ["unet"]), {})
    run("convert-lora", first, out, "--format", "diffusers", "--dry-run")
    assert "would be LoRA of 3 layers (diffusers)" in capsys.readouterr().out
    assert not out.exists()
    out.write_text("mine")
    run("convert-lora", first, out, "--format", "diffusers", status=2)
    assert out.read_text() == "mine"
    run("convert-lora", first, out, "--format", "diffusers", "--force")
    assert len(read_lora(out).layers) == 3


def test_merged_in_float32_and_rounded_once(base, tmp_path):
    """Of a base in half precision too, and to half precision of one in float32."""
    weight, other = "down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"
    write_safetensors(tmp_path / "lora.safetensors", kohya(base, ["unet"]), {})
    added = merge_lora({"unet": base["unet"]}, read_lora(tmp_path / "lora.safetensors"))["unet"][
        weight
    ]
    delta = np.asarray(added, np.float64) - base["unet"][weight]
    for stored, asked in (("float16", "float32"), ("float32", "float16"), ("float16", None)):
        state = {key: array.astype(stored) for key, array in base["unet"].items()}
        source, out = (
            tmp_path / f"{stored}{asked}.safetensors",
            tmp_path / f"to-{stored}{asked}.safetensors",
        )
        write_safetensors(source, state, {})
        how = ("--dtype", asked) if asked else ()
        run("merge-lora", source, tmp_path / "lora.safetensors", out, "--format", "file", *how)
        found = read_file(out)[0]
        wanted = (state[weight] + delta).astype(np.float32)
        assert {array.dtype.name for array in found.values()} == {asked or stored}
        np.testing.assert_array_equal(found[other], state[other].astype(asked or stored))
        assert np.abs(found[weight] - wanted.astype(asked or stored)).max() < 1e-6


def test_several_with_a_scale_each(base, tmp_path, capsys):
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "one", "two", "out", "back")]
    unet, one, two, out, back = files
    write_safetensors(unet, base["unet"], {})
    write_safetensors(one, kohya(base, ["unet"]), {})
    write_safetensors(two, {k: a / 3 for k, a in kohya(base, ["unet"]).items()}, {})
    run("merge-lora", unet, one, two, out, "--scale", 0.5, "--scale", -2, "--format", "file")
    err = capsys.readouterr().err
    assert "one.safetensors: LoRA, 3 layers added at 0.5" in err
    assert "two.safetensors: LoRA, 3 layers added at -2" in err
    wanted = merge_lora(
        merge_lora({"unet": base["unet"]}, read_lora(one), 0.5), read_lora(two), -2
    )["unet"]
    for key, array in read_file(out)[0].items():
        np.testing.assert_allclose(array, wanted[key], rtol=0, atol=2e-6, err_msg=key)
    how = ("--scale", 0.5, "--scale", -2, "--remove", "--format", "file")
    run("merge-lora", out, one, two, back, *how)
    run("verify", back, unet, "--tolerance", 2e-6)
    for scales, message in (((1, 2, 3), "3 --scale for 2 LoRAs"), (("nan",), "a scale of nan")):
        how = [word for scale in scales for word in ("--scale", scale)]
        run("merge-lora", unet, one, two, tmp_path / "no.safetensors", *how, status=2)
        assert message in capsys.readouterr().err


def test_dora_is_not_taken_out(base, tmp_path, capsys):
    write_safetensors(tmp_path / "base.safetensors", base["unet"], {})
    write_safetensors(tmp_path / "dora.safetensors", kohya(base, ["unet"], dora=True), {})
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "dora", "out")]
    run("merge-lora", *files, "--remove", status=2)
    assert "is DoRA" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be taken out again"):
        merge_loras(base, [(read_lora(files[1]), 1.0)], remove=True)
