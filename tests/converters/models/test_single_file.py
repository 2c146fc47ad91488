"""Bases in one file of the original layout: what diffusers reads of ours, what we read of such."""

import json
import shutil

import numpy as np
import pytest
import torch

from fact_convert.cli.main import main
from fact_convert.cli.opening import open_weights
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.torch_io import write_torch_file
from fact_convert.io.weight_files import read_file
from fact_convert.models.single_file import is_ldm, read_ldm, read_schedule, write_ldm
from fact_convert.rules.ldm import IGNORED, unet_pairs, vae_pairs
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy

UNET = "model.diffusion_model."
SD15 = {
    "unet": (
        ("input_blocks.0.0.weight", "conv_in.weight"),
        ("time_embed.2.bias", "time_embedding.linear_2.bias"),
        ("input_blocks.1.0.in_layers.0.weight", "down_blocks.0.resnets.0.norm1.weight"),
        ("input_blocks.2.1.proj_in.weight", "down_blocks.0.attentions.1.proj_in.weight"),
        ("input_blocks.3.0.op.bias", "down_blocks.0.downsamplers.0.conv.bias"),
        ("input_blocks.4.0.skip_connection.weight", "down_blocks.1.resnets.0.conv_shortcut.weight"),
        ("input_blocks.11.0.out_layers.3.weight", "down_blocks.3.resnets.1.conv2.weight"),
        (
            "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        ),
        ("middle_block.2.emb_layers.1.weight", "mid_block.resnets.1.time_emb_proj.weight"),
        ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("output_blocks.3.1.norm.weight", "up_blocks.1.attentions.0.norm.weight"),
        ("output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
        ("output_blocks.11.1.proj_out.bias", "up_blocks.3.attentions.2.proj_out.bias"),
        ("out.2.weight", "conv_out.weight"),
    ),
    "vae": (
        (
            "encoder.down.2.downsample.conv.weight",
            "encoder.down_blocks.2.downsamplers.0.conv.weight",
        ),
        ("encoder.mid.attn_1.q.weight", "encoder.mid_block.attentions.0.to_q.weight"),
        ("decoder.up.3.block.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight"),
        (
            "decoder.up.0.block.0.nin_shortcut.weight",
            "decoder.up_blocks.3.resnets.0.conv_shortcut.weight",
        ),
        ("decoder.up.1.upsample.conv.bias", "decoder.up_blocks.2.upsamplers.0.conv.bias"),
        ("decoder.norm_out.bias", "decoder.conv_norm_out.bias"),
    ),
}


_SIDES = [
    (side, i, j)
    for side, layers in (("encoder.down", 2), ("decoder.up", 3))
    for i in range(4)
    for j in range(layers)
]
WITNESSES = {
    "unet": (
        {f"down_blocks.{i}.resnets.{j}.norm1.weight" for i in range(4) for j in range(2)}
        | {f"up_blocks.{i}.attentions.0.norm.weight" for i in (1, 2, 3)},
        {f"input_blocks.{i}.0.op.weight" for i in (3, 6, 9)}
        | {f"input_blocks.{i}.0.in_layers.0.weight" for i in (1, 2, 4, 5, 7, 8, 10, 11)}
        | {f"output_blocks.{i}.1.norm.weight" for i in (3, 6, 9)},
    ),
    "vae": (
        {f"{side}_blocks.{i}.resnets.{j}.norm1.weight" for side, i, j in _SIDES},
        {f"{side}.{i}.block.{j}.norm1.weight" for side, i, j in _SIDES},
    ),
}
"""Keys of the full size, in either layout, that tell how large the model is."""


@pytest.mark.parametrize(("kind", "pairs"), [("unet", unet_pairs), ("vae", vae_pairs)])
def test_the_names_of_the_full_size(kind, pairs):
    ours, original = (set(pairs(keys)) for keys in WITNESSES[kind])
    assert ours == original
    assert len(dict(ours)) == len({name for _, name in ours}) == len(ours)
    state = dict.fromkeys(WITNESSES[kind][0], np.zeros(1))
    state |= {name: np.full(1, i) for i, (_, name) in enumerate(SD15[kind])}
    flat = write_ldm({kind: state})
    prefix = {"unet": UNET, "vae": "first_stage_model."}[kind]
    for i, (name, _) in enumerate(SD15[kind]):
        assert flat[prefix + name] == i, name


@pytest.fixture(scope="session")
def original(pipeline_folder, tmp_path_factory):
    """The small base as one safetensors file in the original layout."""
    out = tmp_path_factory.mktemp("original") / "base.safetensors"
    assert main(["to-torch", str(pipeline_folder), str(out)]) == 0
    return out


@pytest.fixture
def state(original):
    return dict(read_file(original)[0])


def draw(pipe) -> np.ndarray:
    """A picture, small and the same every time."""
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 2, "generator": torch.manual_seed(3), "output_type": "np"}
    return pipe("the cat", height=16, width=16, **steps).images


def test_diffusers_opens_our_file(original, pipeline_folder):
    from diffusers import StableDiffusionPipeline

    options = {"config": str(pipeline_folder), "local_files_only": True, "safety_checker": None}
    opened = StableDiffusionPipeline.from_single_file(original, **options)
    known = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    for part in ("unet", "vae", "text_encoder"):
        one, other = (getattr(pipe, part).state_dict() for pipe in (opened, known))
        assert set(one) == set(other)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert np.array_equal(draw(opened), draw(known))


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_becomes_a_folder(original, pipeline_folder, ending, dtype, tmp_path, capsys):
    from diffusers import StableDiffusionPipeline

    file, folder = tmp_path / f"base{ending}", tmp_path / "folder"
    assert main(["to-torch", str(original), str(file), "--dtype", dtype]) == 0
    assert main(["to-torch", str(file), str(folder), "--config", str(pipeline_folder)]) == 0
    assert main(["verify", str(file), str(folder)]) == 0
    exact = main(["verify", str(folder), str(pipeline_folder)])
    assert exact == (0 if dtype == "float32" else 1)
    pictures = [draw(StableDiffusionPipeline.from_pretrained(x)) for x in (folder, pipeline_folder)]
    assert np.allclose(*pictures, atol=0 if dtype == "float32" else 0.05)


def test_through_jax_and_back(original, tmp_path, same_bits):
    assert main(["to-jax", str(original), str(tmp_path / "jax")]) == 0
    assert main(["to-torch", str(tmp_path / "jax"), str(tmp_path / "back.safetensors")]) == 0
    same_bits(read_file(original)[0], read_file(tmp_path / "back.safetensors")[0])


def test_a_file_of_a_trainer(original, state, tmp_path, capsys):
    aside = {"betas": np.zeros(3), "model_ema.decay": np.float32(0.5).reshape(())}
    aside |= {"cond_stage_model.logit_scale": np.ones(1, np.float32)}
    wrapped = {key: torch.from_numpy(np.array(array)) for key, array in (state | aside).items()}
    torch.save({"state_dict": wrapped, "global_step": 7, "epoch": 1}, tmp_path / "x.ckpt")
    opened = open_weights(tmp_path / "x.ckpt")
    assert sorted(key for keys in opened.left_out.values() for key in keys) == sorted(aside)
    assert main(["verify", str(tmp_path / "x.ckpt"), str(original)]) == 0
    assert main(["to-torch", str(tmp_path / "x.ckpt"), str(tmp_path / "y.safetensors")]) == 0
    assert "left out 1 keys (betas): the noise schedule" in capsys.readouterr().err


def test_noise_schedules_are_known_or_asked_for(state, pipeline_folder, tmp_path, capsys):
    from fact_jax.diffusion.noise_schedules import NoiseSchedule, alphas_cumprod_numpy

    for schedule, told in ((NoiseSchedule.sd15(), False), (NoiseSchedule.mini(), True)):
        abar = {"alphas_cumprod": alphas_cumprod_numpy(schedule)}
        ((reason, keys),) = read_ldm(state | abar, "ema")[1].items()
        assert keys == ["alphas_cumprod"]
        assert "give --config" not in reason
        found = read_schedule(state | abar, {})
        assert (found is not None) == told
        if told:
            names = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
            assert all(found[name] == getattr(schedule, name) for name in names)
    cosine = np.cos(np.linspace(0, 1.5, 1000, dtype=np.float32)) ** 2
    write_safetensors(tmp_path / "x.safetensors", state | {"alphas_cumprod": cosine}, {})
    beside = shutil.copytree(pipeline_folder, tmp_path / "beside")
    arguments = ["to-torch", str(tmp_path / "x.safetensors"), str(tmp_path / "out")]
    assert main([*arguments, "--config", str(beside), "--dry-run"]) == 0
    shutil.rmtree(beside / "scheduler")
    assert main([*arguments, "--config", str(beside)]) == 2
    assert "a noise schedule that is NOT one of those known" in capsys.readouterr().err


def test_running_averages(state, original, tmp_path):
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): array + 1
        for key, array in state.items()
        if key.startswith(UNET)
    }
    write_safetensors(tmp_path / "x.safetensors", state | averages, {})
    plain = open_weights(original).states
    raw = open_weights(tmp_path / "x.safetensors", weights="params")
    assert all(np.array_equal(raw.states["unet"][k], a) for k, a in plain["unet"].items())
    averaged = open_weights(tmp_path / "x.safetensors")
    assert all(np.array_equal(averaged.states["unet"][k], a + 1) for k, a in plain["unet"].items())
    assert all(np.array_equal(averaged.states["vae"][k], a) for k, a in plain["vae"].items())
    for opened in (raw, averaged):
        assert "unknown" not in opened.states
        ((_, keys),) = opened.left_out.items()
        assert len(keys) == len(averages)


def test_a_vae_alone(state, peer_state, tmp_path):
    bare = {
        key.removeprefix("first_stage_model."): array
        for key, array in state.items()
        if key.startswith("first_stage_model.")
    }
    write_torch_file(tmp_path / "vae.ckpt", bare | {"loss.logvar": np.ones(1, np.float32)})
    opened = open_weights(tmp_path / "vae.ckpt")
    assert set(opened.states) == {"vae"}
    wanted = peer_state("vae")[0]
    assert {k: a.shape for k, a in opened.states["vae"].items()} == {
        k: a.shape for k, a in wanted.items()
    }
    assert all(np.array_equal(opened.states["vae"][key], array) for key, array in wanted.items())


def test_text_encoders_without_their_first_word(state):
    word = "cond_stage_model.transformer.text_model."
    short = {key.replace(word, word.removesuffix("text_model.")): a for key, a in state.items()}
    assert set(short) != set(state)
    assert read_ldm(short, "ema")[0].keys() == read_ldm(state, "ema")[0].keys()
    assert set(read_ldm(short, "ema")[0]["clip_text"]) == set(
        read_ldm(state, "ema")[0]["clip_text"]
    )


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{UNET}input_blocks.1.0.odd.weight", "unexpected"),
        (f"{UNET}input_blocks.999.0.in_layers.0.weight", "unexpected"),
        (f"{UNET}input_blocks.1.1.odd.weight", "unexpected"),
        ("model_ema.diffusion_modelinput_blocks99", "unexpected"),
        ("odd", "unexpected"),
        ("first_stage_model.encoder.down_blocks.0.resnets.0.norm1.weight", "unexpected"),
        ("cond_stage_model.transformer.encoder.layers.0.mlp.fc1.bias", "unexpected"),
        ("conditioner.embedders.0.x", "this is SDXL"),
        ("cond_stage_model.model.ln_final.weight", "this is Stable Diffusion 2"),
    ],
)
def test_keys_that_do_not_belong(state, key, message, pipeline_folder, tmp_path, capsys):
    write_safetensors(tmp_path / "x.safetensors", state | {key: np.ones(1, np.float32)}, {})
    capsys.readouterr()
    assert main(["to-torch", str(tmp_path / "x.safetensors"), str(tmp_path / "out.ckpt")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    # Of two names for one weight the second is the odd one.
    named = key.split(".", 3)[-1] in err or " more)" in err
    assert named or "only Stable Diffusion 1.x is known" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out.ckpt").exists()


def test_what_a_folder_needs(original, pipeline_folder, tmp_path, capsys):
    def fails(*arguments) -> str:
        assert main(["to-torch", str(original), str(tmp_path / "out"), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "holds no tokenizer" in fails()
    assert "no such folder" in fails("--config", tmp_path / "absent")
    beside = shutil.copytree(pipeline_folder, tmp_path / "beside")
    config = json.loads((beside / "unet" / "config.json").read_text())
    changed = json.dumps(config | {"cross_attention_dim": 16})
    (beside / "unet" / "config.json").write_text(changed)
    assert "the weights do not fit the unet" in fails("--config", beside)
    (beside / "unet" / "config.json").write_text(json.dumps(config))
    shutil.rmtree(beside / "tokenizer")
    assert "holds no tokenizer" in fails("--config", beside)
    assert not (tmp_path / "out").exists()


def test_what_has_no_place_in_a_file(golden, peer_state):
    adapter = golden("unet_adapter", "adapter.")[0]
    with pytest.raises(UserError, match=r"272 tensors have no place.*alpha_attn"):
        write_ldm({"adapter": adapter})
    odd = peer_state("unet")[0] | {"down_blocks.0.resnets.0.odd": np.ones(1)}
    with pytest.raises(UserError, match=r"1 tensors have no place .*resnets\.0\.odd"):
        write_ldm({"unet": odd})


def test_other_files_are_not_taken_for_bases(golden, peer_state):
    assert not is_ldm(peer_state("unet")[0])
    assert not is_ldm(peer_state("vae")[0])
    assert not is_ldm(golden("transface", "state.")[0])
    assert all(len(entry.reason) > 10 for entry in IGNORED)


@pytest.fixture(scope="module")
def controlnet():
    """diffusers' ControlNet in Stable Diffusion's shape, narrow, with random weights."""
    from diffusers import ControlNetModel

    torch.manual_seed(2)
    net = ControlNetModel(
        block_out_channels=(32, 64, 64, 64),
        norm_num_groups=32,
        cross_attention_dim=24,
        conditioning_embedding_out_channels=(4, 6, 8, 12),
    )
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_()
    return net


HINTS = [
    (f"input_hint_block.{2 * i + 2}", f"controlnet_cond_embedding.blocks.{i}") for i in range(6)
]
CONTROL = [
    ("input_hint_block.0", "controlnet_cond_embedding.conv_in"),
    *HINTS,
    ("input_hint_block.14", "controlnet_cond_embedding.conv_out"),
    ("zero_convs.11.0", "controlnet_down_blocks.11"),
    ("middle_block_out.0", "controlnet_mid_block"),
    ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
    ("input_blocks.11.0.in_layers.2", "down_blocks.3.resnets.1.conv1"),
    ("middle_block.1.proj_in", "mid_block.attentions.0.proj_in"),
]


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_controlnets_in_their_original_layout(controlnet, prefix, same_bits, tmp_path):
    from diffusers import ControlNetModel

    controlnet.save_pretrained(tmp_path / "net")
    state = {key: tensor.numpy() for key, tensor in controlnet.state_dict().items()}
    one = tmp_path / "one.safetensors"
    assert main(["to-torch", str(tmp_path / "net"), str(one), "--format", "original"]) == 0
    written = read_file(one)[0]
    for theirs, ours in CONTROL:
        assert np.array_equal(written[f"control_model.{theirs}.bias"], state[f"{ours}.bias"])
    read = ControlNetModel.from_single_file(str(one), config=str(tmp_path / "net"))
    same_bits({key: tensor.numpy() for key, tensor in read.state_dict().items()}, state)

    bare = {prefix + key.removeprefix("control_model."): a for key, a in written.items()}
    write_torch_file(tmp_path / "bare.pth", bare)
    opened = open_weights(tmp_path / "bare.pth")
    assert opened.kind == "controlnet"
    same_bits(opened.states["controlnet"], state)
    # Its widths are not Stable Diffusion's: nothing but the configuration tells its heads.
    back = ["to-torch", str(tmp_path / "bare.pth"), str(tmp_path / "back")]
    assert main(back) == 2
    assert main([*back, "--config", str(tmp_path / "net")]) == 0
    again = ControlNetModel.from_pretrained(tmp_path / "back")
    same_bits({key: tensor.numpy() for key, tensor in again.state_dict().items()}, state)
    assert again.config.conditioning_embedding_out_channels == [4, 6, 8, 12]
    assert tuple(again.config.down_block_types) == controlnet.config.down_block_types


def test_a_unet_alone_without_a_prefix(state, peer_state, same_bits, tmp_path):
    bare = {key.removeprefix(UNET): a for key, a in state.items() if key.startswith(UNET)}
    write_safetensors(tmp_path / "unet.safetensors", bare, {})
    opened = open_weights(tmp_path / "unet.safetensors")
    assert opened.format == "original layout, safetensors"
    same_bits(opened.states["unet"], peer_state("unet")[0])
