"""What is not whole, or under a configuration that we do not compute, is refused by every command.

And with the words of ``load_state``, whatever it is opened for.
"""

import json
import shutil
import time

import jax
import numpy as np
import pytest

from fact_convert import load_adapter, load_pipeline, load_state
from fact_convert.cli.opening import check_supported, open_weights
from fact_convert.cli.saving import save_torch
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.torch_io import write_torch_file
from fact_convert.io.weight_files import read_file
from fact_convert.mapping import map_jax_path
from fact_convert.models.adapter import DIM_HEAD_KEY, infer_resampler, read_adapter
from fact_convert.models.inferred_configs import infer_config
from fact_convert.models.training_checkpoint import to_jax, write_checkpoint
from fact_convert.rules.key_tables import RESAMPLER_PREFIX
from fact_convert.weights import abstract_state, read_config
from fact_jax.models.clip_text import CLIPTextConfig
from fact_jax.models.controlnet import ControlNetConfig
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.models.transface import TransFaceConfig
from fact_jax.models.unet import UNetConfig
from fact_jax.models.vae import VAEConfig
from fact_jax.utils.errors import UserError
from tests.converters.conftest import run

pytestmark = pytest.mark.heavy

MINI_NET = ControlNetConfig(
    block_out_channels=(8, 16),
    down_attention=(True, False),
    layers_per_block=1,
    cross_attention_dim=24,
    heads=(2, 2),
    norm_num_groups=4,
    conditioning_embedding_out_channels=(4, 8),
)


def zeros(kind: str, config) -> dict[str, np.ndarray]:
    """A state of a model's shapes that takes no memory."""
    state = {}
    for path, variable in abstract_state(kind, config)[1].items():
        place = map_jax_path(kind, path, "")[0]
        model = np.broadcast_to(np.float32(0), variable.get_value().shape)
        state[place.torch] = place.transform.to_torch(model, model.ndim)
    return state


@pytest.fixture
def states(peer_state, golden):
    """A whole state of every kind."""
    resampler = golden("resampler", "state.")[0]
    return {
        **{kind: peer_state(kind)[0] for kind in ("unet", "vae", "clip_text")},
        "controlnet": zeros("controlnet", MINI_NET),
        "transface": golden("transface", "state.")[0],
        "adapter": golden("unet_adapter", "adapter.")[0],
        "resampler": {RESAMPLER_PREFIX + key: array for key, array in resampler.items()},
    }


def damaged(state: dict, way: str) -> tuple[dict, str]:
    """The state with one tensor in the middle that is not right, and that tensor's key."""
    weights = [key for key, array in state.items() if array.ndim > 1]
    key = weights[len(weights) // 2]
    array = state[key]
    others = {
        "misshapen": np.zeros((array.shape[0] + 1, *array.shape[1:]), np.float32),
        "empty": np.zeros((0, *array.shape[1:]), np.float32),
        "of integers": np.zeros(array.shape, np.int32),
        "of other axes": np.zeros((*array.shape, 2), np.float32),
    }
    rest = {k: a for k, a in state.items() if k != key}
    return rest if way == "deleted" else rest | {key: others[way]}, key


@pytest.mark.parametrize("way", ["deleted", "misshapen", "empty", "of integers", "of other axes"])
def test_every_kind_is_checked(states, way, tmp_path):
    for kind, state in states.items():
        parts = ("adapter", "resampler") if kind in ("adapter", "resampler") else (kind,)
        wrong, key = damaged(state, way)
        rest = {k: array for part in parts if part != kind for k, array in states[part].items()}
        write_safetensors(tmp_path / f"{kind}.safetensors", rest | wrong, {})
        with pytest.raises(UserError, match=f"{kind}.safetensors: ") as caught:
            check_supported(open_weights(tmp_path / f"{kind}.safetensors"))
        assert key.removeprefix(RESAMPLER_PREFIX) in str(caught.value), (kind, way)
        write_safetensors(tmp_path / "whole.safetensors", rest | state, {})
        check_supported(open_weights(tmp_path / "whole.safetensors"))


def test_every_command_checks(peer_state, tmp_path, capsys, refused):
    state, config = peer_state("unet")
    wrong, key = damaged(state, "deleted")
    with pytest.raises(UserError) as caught:
        load_state("unet", wrong, config)
    message = str(caught.value)
    assert f"1 missing ({key})" in message
    file, out = tmp_path / "x.safetensors", tmp_path / "out"
    write_safetensors(file, wrong, {})
    write_torch_file(tmp_path / "x.ckpt", wrong)
    params, kept = to_jax({"unet": wrong})
    write_checkpoint(tmp_path / "checkpoint", params, {"kept": kept})
    for source in (file, tmp_path / "x.ckpt", tmp_path / "checkpoint"):
        for command in (
            ("to-jax", source, out),
            ("to-jax", source, out, "--dry-run"),
            ("to-torch", source, tmp_path / "out.safetensors"),
            ("to-torch", source, tmp_path / "out.ckpt", "--dry-run"),
            ("to-torch", source, tmp_path / "out.ckpt", "--format", "original"),
            ("to-torch", source, out),
            ("verify", source, file),
        ):
            assert refused(*command).endswith(message), command
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", "x.ckpt", "checkpoint"}
    capsys.readouterr()
    run("inspect", file, "--json")
    assert key in json.loads(capsys.readouterr().out)["difference"]


def test_a_damaged_pipeline_is_opened_by_none(pipeline_folder, peer_state, tmp_path, refused):
    from fact_infer.torch.pipeline import TorchPipeline

    folder = shutil.copytree(pipeline_folder, tmp_path / "base")
    wrong, key = damaged(peer_state("vae")[0], "deleted")
    write_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", wrong, {})
    message = f"the weights do not fit the vae: 1 missing ({key})"
    for command in ("to-jax", "to-torch"):
        for name in ("out", "out.ckpt") if command == "to-torch" else ("out",):
            assert refused(command, folder, tmp_path / name) == f"{folder}: {message}"
    assert refused("verify", folder, folder) == f"{folder}: {message}"
    for load in (load_pipeline, TorchPipeline.load):
        with pytest.raises(UserError) as caught:
            load(folder)
        assert str(caught.value) == f"{folder / 'vae'}: {message}"


ODD_CONFIGS = (
    {"center_input_sample": True},
    {"freq_shift": 1},
    {"flip_sin_to_cos": False},
    {"act_fn": "gelu"},
    {"class_embed_type": "timestep"},
    {"resnet_time_scale_shift": "scale_shift"},
    {"dual_cross_attention": True},
    {"attention_head_dim": 7},
    {"norm_num_groups": 5},
    {"norm_eps": "small"},
)


@pytest.mark.parametrize("odd", ODD_CONFIGS, ids=lambda odd: next(iter(odd)))
def test_configurations_that_load_state_refuses(peer_state, odd, tmp_path, refused):
    state, config = peer_state("unet")
    with pytest.raises(UserError) as caught:
        load_state("unet", state, config | odd)
    folder = tmp_path / "unet"
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", state, {})
    (folder / "config.json").write_text(json.dumps(config | odd))
    for command in (
        ("to-jax", folder, "o"),
        ("to-torch", folder, "o.ckpt"),
        ("verify", folder, folder),
    ):
        assert refused(*command, *(["--dry-run"] if command[0] != "verify" else [])) == (
            f"{folder}: {caught.value}"
        )


@pytest.mark.parametrize(
    "odd",
    [
        {"layers_per_block": 2000},
        {"layers_per_block": 10**9},
        {"layers_per_block": 1.5},
        {"layers_per_block": True},
        {"layers_per_block": -1},
        {"block_out_channels": [2**40, 16]},
        {"block_out_channels": 8},
        {"in_channels": 10**30},
        {"attention_head_dim": [2, "3"]},
        {"norm_eps": float("nan")},
    ],
    ids=str,
)
def test_what_a_configuration_dictates_costs_nothing(peer_state, odd, tmp_path, refused):
    state, config = peer_state("unet")
    folder = tmp_path / "unet"
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", state, {})
    (folder / "config.json").write_text(json.dumps(config | odd))
    began = time.process_time()
    said = refused("to-jax", folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"unet configuration|no unet can be"):
        read_config("unet", config | odd)
    assert time.process_time() - began < 2
    assert "unet" in said


def test_folders_and_files_with_nothing_to_read(states, tmp_path, refused):
    write_safetensors(tmp_path / "none.safetensors", {}, {})
    assert refused("to-jax", tmp_path / "none.safetensors", "out").endswith("no tensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {}}))
    write_safetensors(folder / "diffusion_pytorch_model-1.safetensors", states["vae"], {})
    assert "weight_map names no file" in refused("to-jax", folder, "out")
    (tmp_path / "run" / "checkpoints" / "²" / "state").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "²" / "state" / "_METADATA").write_text("{}")
    assert "no weights that are known here" in refused("to-jax", tmp_path / "run", "out")
    params, kept = to_jax({"vae": states["vae"]})
    write_checkpoint(tmp_path / "7", params, {"kept": kept, "steps_before": "many"})
    line = refused("to-torch", tmp_path / "7", tmp_path / "out.safetensors")
    assert "steps_before 'many'" in line


def test_an_adapter_that_lacks_a_block(states, tmp_path, refused):
    gone = "mid_block.attentions.0.transformer_blocks.0."
    state = {k: a for k, a in states["adapter"].items() if not k.startswith(gone)}
    write_safetensors(tmp_path / "x.safetensors", state | states["resampler"], {})
    line = refused("to-torch", tmp_path / "x.safetensors", "x.ckpt", "--dim-head", 8)
    assert f"17 missing ({gone}" in line
    write_safetensors(tmp_path / "y.safetensors", states["adapter"], {})
    assert "no local_fac_prj" in refused("to-jax", tmp_path / "y.safetensors", "out")


def test_the_miniature_adapter_keeps_its_heads(miniature, same_bits, tmp_path, refused, capsys):
    source = miniature / "adapter" / "adapter.safetensors"
    run("to-torch", source, tmp_path / "a.ckpt")
    run("to-jax", tmp_path / "a.ckpt", tmp_path / "jax")
    run("to-torch", tmp_path / "a.ckpt", tmp_path / "b.safetensors")
    run("to-torch", tmp_path / "jax", tmp_path / "c.ckpt")
    known = load_adapter(source).resampler
    for name in ("a.ckpt", "b.safetensors", "c.ckpt"):
        resampler = load_adapter(tmp_path / name).resampler
        assert resampler.config == known.config == ResamplerConfig.mini(), name
        tokens = jax.random.normal(jax.random.key(0), (1, 36, 128))
        assert np.array_equal(resampler(tokens), known(tokens))
    # As the released code takes it apart, the side key is in neither part.
    held = read_file(tmp_path / "a.ckpt")[0]
    assert held.pop(DIM_HEAD_KEY).item() == 32
    assert not DIM_HEAD_KEY.startswith("local_fac_prj")
    assert "processor" not in DIM_HEAD_KEY
    same_bits(held, read_file(source)[0])
    run("verify", tmp_path / "a.ckpt", source)
    for width in (64, 0):
        line = refused("to-torch", source, "x.safetensors", "--dim-head", width)
        assert f"its resampler is 32 wide, not {width}" in line
    write_torch_file(tmp_path / "bare.ckpt", held)
    for command in (("to-torch", "x.safetensors"), ("to-jax", "out")):
        line = refused(command[0], tmp_path / "bare.ckpt", tmp_path / command[1])
        assert "how wide a head of its resampler is" in line
        assert "--dim-head" in line
    with pytest.raises(UserError, match="how wide a head of its resampler is"):
        read_adapter(tmp_path / "bare.ckpt")
    run("to-torch", tmp_path / "bare.ckpt", tmp_path / "d.ckpt", "--dim-head", 32)
    assert load_adapter(tmp_path / "d.ckpt").resampler.config == ResamplerConfig.mini()
    run("to-torch", tmp_path / "bare.ckpt", tmp_path / "wide.ckpt", "--dim-head", 64)
    capsys.readouterr()
    run("verify", source, tmp_path / "wide.ckpt")
    line = capsys.readouterr().out
    assert "other settings: resampler" in line
    assert "dim_head 64, not 32" in line
    for width, reason in ((0, "cannot be 0 wide"), (-32, "cannot be -32"), (48, "cannot be 48")):
        line = refused("to-jax", tmp_path / "bare.ckpt", "out", "--dim-head", width)
        assert reason in line


@pytest.mark.parametrize("value", [np.zeros(0, np.int64), np.float32(32), np.array([1, 2]), 0])
def test_a_side_key_that_is_no_width(states, value, tmp_path):
    state = states["adapter"] | states["resampler"] | {DIM_HEAD_KEY: np.asarray(value)}
    write_safetensors(tmp_path / "x.safetensors", state, {})
    for open_file in (read_adapter, open_weights):
        with pytest.raises(UserError, match="is not the width of a head"):
            open_file(tmp_path / "x.safetensors")


def test_metadata_of_other_programs_may_have_a_dim_head(states, tmp_path):
    state, file = states["adapter"] | states["resampler"], tmp_path / "x.safetensors"
    write_safetensors(file, state, {"dim_head": "8"})
    with pytest.raises(UserError, match="how wide a head of its resampler is"):
        save_torch(open_weights(file), tmp_path / "y.safetensors")
    save_torch(open_weights(file), tmp_path / "y.safetensors", dim_head=8)
    assert load_adapter(tmp_path / "y.safetensors").resampler.config.dim_head == 8


@pytest.mark.parametrize("width", ["8", [8], 8.5])
def test_a_checkpoint_whose_dim_head_is_no_number(states, width, tmp_path):
    params, _ = to_jax({kind: states[kind] for kind in ("adapter", "resampler")})
    write_checkpoint(tmp_path / "c", params, {"dim_head": width})
    with pytest.raises(UserError, match="its heads cannot be"):
        save_torch(open_weights(tmp_path / "c"), tmp_path / "y.safetensors")


def test_the_released_resampler_is_known_by_its_size():
    released = zeros("resampler", ResamplerConfig.sd15())
    config, note = infer_resampler(released)
    assert config == ResamplerConfig.sd15().to_dict()
    assert "dim_head 64 taken (12 heads)" in note
    for change in ({"heads": 16}, {"dim": 768}, {"depth": 2}):
        other = zeros("resampler", ResamplerConfig(**change))
        with pytest.raises(UserError, match="does not say how wide a head"):
            infer_resampler(other)


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("unet", UNetConfig.sd15(), "heads 8, norm_num_groups 32 taken, as in Stable Diffusion 1"),
        (
            "unet",
            UNetConfig(cross_attention_dim=1024, heads=(5, 10, 20, 20), use_linear_projection=True),
            "heads 5-10-20, norm_num_groups 32 taken, as in Stable Diffusion 2",
        ),
        ("controlnet", ControlNetConfig.sd15(), "heads 8, norm_num_groups 32 taken"),
        ("vae", VAEConfig.sd15(), "scaling_factor 0.18215, norm_num_groups 32 taken"),
        ("clip_text", CLIPTextConfig.sd15(), "num_attention_heads 12, hidden_act quick_gelu taken"),
        (
            "clip_text",
            CLIPTextConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,
                num_attention_heads=16,
                hidden_act="gelu",
            ),
            "num_attention_heads 16, hidden_act gelu taken, as in Stable Diffusion 2",
        ),
        ("transface", TransFaceConfig.vit_l(), "num_heads 8 taken"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_sizes_are_known_and_said(kind, config, said):
    state = zeros(kind, config)
    found, note = infer_config(kind, state)
    assert read_config(kind, found) == config
    assert said in note


def test_settings_that_nobody_could_tell_are_asked_for(states, tmp_path, refused):
    for kind, untold in (
        ("unet", "heads and norm_num_groups"),
        ("controlnet", "heads and norm_num_groups"),
        ("vae", "scaling_factor and norm_num_groups"),
        ("clip_text", "num_attention_heads and hidden_act"),
        ("transface", "heads"),
    ):
        write_safetensors(tmp_path / f"{kind}.safetensors", states[kind], {})
        line = refused("to-torch", tmp_path / f"{kind}.safetensors", tmp_path / "out")
        assert untold in line
        # A file needs no configuration, and gets none.
        run("to-torch", tmp_path / f"{kind}.safetensors", tmp_path / f"{kind}.ckpt")
    assert not (tmp_path / "out").exists()


def test_files_hold_the_configuration_of_their_source(pipeline_folder, miniature, tmp_path, capsys):
    run("to-torch", miniature / "encoder", tmp_path / "e.safetensors")
    run("to-torch", tmp_path / "e.safetensors", tmp_path / "e")
    wanted = json.loads((miniature / "encoder" / "config.json").read_text())
    assert json.loads((tmp_path / "e" / "config.json").read_text()) == wanted
    run("to-torch", miniature / "encoder", tmp_path / "e.pt")
    assert "transface: such a file does not hold" in capsys.readouterr().err
    run("to-torch", pipeline_folder, tmp_path / "b.safetensors")
    assert "such a file" not in capsys.readouterr().err
    beside = tmp_path / "beside"
    shutil.copytree(pipeline_folder / "tokenizer", beside / "tokenizer")
    run("to-torch", tmp_path / "b.safetensors", tmp_path / "b", "--config", beside)
    for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        wanted = json.loads((pipeline_folder / name).read_text())
        assert json.loads((tmp_path / "b" / name).read_text()) == wanted, name


def index(folder) -> dict:
    return json.loads((folder / "model_index.json").read_text())


def with_inputs(folder, channels: int, class_name: str):
    """The pipeline as another class, its UNet taking as many channels."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = dict(read_file(file)[0])
    shape = (8, channels, 3, 3)
    state = {
        k: np.zeros(shape, "f4") if k == "conv_in.weight" else a.copy() for k, a in state.items()
    }
    write_safetensors(file, state, {})
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": channels}))
    (folder / "model_index.json").write_text(
        json.dumps(index(folder) | {"_class_name": class_name})
    )
    return folder


@pytest.mark.parametrize(
    ("channels", "name"),
    [
        (9, "StableDiffusionInpaintPipeline"),
        (8, "StableDiffusionInstructPix2PixPipeline"),
        (4, "StableDiffusionImg2ImgPipeline"),
    ],
)
def test_the_class_of_a_pipeline_is_kept(pipeline_folder, channels, name, tmp_path, capsys):
    import diffusers

    folder = with_inputs(shutil.copytree(pipeline_folder, tmp_path / "base"), channels, name)
    run("to-torch", folder, tmp_path / "copy")
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "copy")).__name__ == name
    for out in ("b.safetensors", "b.ckpt"):
        run("to-torch", folder, tmp_path / out)
        said = capsys.readouterr().err
        assert ("does not say this class" in said) == (channels == 4 and out == "b.ckpt")
        run("to-torch", tmp_path / out, tmp_path / f"{out}.folder", "--config", folder)
        wanted = "StableDiffusionPipeline" if channels == 4 and out == "b.ckpt" else name
        assert index(tmp_path / f"{out}.folder")["_class_name"] == wanted
    run("to-jax", folder, tmp_path / "jax")
    run("to-torch", tmp_path / "jax", tmp_path / "back", "--config", folder)
    assert index(tmp_path / "back") == index(tmp_path / "copy")
    if channels != 4:
        with pytest.raises(UserError, match="made for inpainting or editing"):
            load_pipeline(folder)


def test_a_class_that_cannot_be_kept_is_said(pipeline_folder, tmp_path, capsys, refused):
    name = "StableDiffusionControlNetPipeline"
    folder = with_inputs(shutil.copytree(pipeline_folder, tmp_path / "base"), 4, name)
    run("to-torch", folder, tmp_path / "copy")
    assert f"{name} becomes StableDiffusionPipeline" in capsys.readouterr().err
    with_inputs(folder, 5, name)
    assert "from 5 to 4 channels" in refused("to-torch", folder, tmp_path / "out")


def scheduler(folder) -> dict:
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


def test_the_same_numbers_of_other_settings(pipeline_folder, tmp_path, capsys):
    other = shutil.copytree(pipeline_folder, tmp_path / "other")
    config = scheduler(other) | {"prediction_type": "v_prediction"}
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    (other / "model_index.json").write_text(json.dumps(index(other) | {"_class_name": "Other"}))
    capsys.readouterr()
    run("verify", pipeline_folder, other)
    line = capsys.readouterr().out
    assert line.startswith(f"the same numbers, but {other} has other settings: scheduler ")
    assert "prediction_type v_prediction, not epsilon; class Other, not Stable" in line
    run("verify", pipeline_folder, other, "--json")
    about = json.loads(capsys.readouterr().out)
    assert about["same"]
    assert set(about["settings"]) == {"scheduler", "class"}
    run("verify", pipeline_folder, pipeline_folder)
    assert capsys.readouterr().out == "the same numbers\n"


@pytest.mark.parametrize("betas", [{}, {"beta_schedule": "linear", "beta_start": 1e-4}])
def test_v_prediction_is_kept(pipeline_folder, betas, tmp_path, refused):
    folder = shutil.copytree(pipeline_folder, tmp_path / "base")
    config = scheduler(folder) | betas | {"prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    beside = shutil.copytree(folder, tmp_path / "beside")
    shutil.rmtree(beside / "scheduler")
    run("to-jax", folder, tmp_path / "jax")
    for name in ("b.safetensors", "b.ckpt", "jax"):
        if name != "jax":
            run("to-torch", folder, tmp_path / name)
        run("to-torch", tmp_path / name, tmp_path / f"{name}.folder", "--config", beside)
        found = scheduler(tmp_path / f"{name}.folder")
        keys = ("prediction_type", "beta_schedule", "beta_start", "beta_end")
        assert {key: found[key] for key in keys} == {key: config[key] for key in keys}, name
    state, _ = read_file(tmp_path / "b.ckpt")
    assert state["v_pred"].shape == (0,)
    assert ("alphas_cumprod" in state) == bool(betas)
    text = read_file(tmp_path / "b.safetensors")[1]
    assert text["modelspec.prediction_type"] == "v"
    # A folder of diffusers without its scheduler is not whole: what its UNet predicts is unknown.
    assert "it has no scheduler" in refused("to-torch", beside, tmp_path / "out")
    assert "it has no scheduler" in refused("to-torch", beside, tmp_path / "out.ckpt")
    assert "it has no scheduler" in refused("to-jax", beside, tmp_path / "out")


def test_a_file_that_says_nothing_of_its_schedule(pipeline_folder, tmp_path, capsys):
    run("to-torch", pipeline_folder, tmp_path / "b.ckpt")
    beside = shutil.copytree(pipeline_folder, tmp_path / "beside")
    shutil.rmtree(beside / "scheduler")
    run("to-torch", tmp_path / "b.ckpt", tmp_path / "b", "--config", beside)
    assert "scheduler: nothing says the noise schedule" in capsys.readouterr().err


@pytest.mark.parametrize("linear", [True, False])
def test_projections_are_as_the_configuration_has_them(pipeline_folder, linear, tmp_path):
    """As ``--config`` of Stable Diffusion 2.1 with a file whose projections are convolutions."""
    from diffusers import UNet2DConditionModel

    beside = shutil.copytree(pipeline_folder, tmp_path / "beside")
    config = json.loads((beside / "unet" / "config.json").read_text())
    (beside / "unet" / "config.json").write_text(
        json.dumps(config | {"use_linear_projection": linear})
    )
    state = read_file(pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors")[0]
    other = {
        k: (a.reshape(a.shape[:2]) if a.ndim == 4 else a[:, :, None, None])
        if k.endswith(("proj_in.weight", "proj_out.weight")) and (a.ndim == 4) == linear
        else a
        for k, a in state.items()
    }
    for given in (state, other):
        write_safetensors(tmp_path / "x.safetensors", given, {})
        out = tmp_path / f"out-{given is other}"
        run("to-torch", tmp_path / "x.safetensors", out, "--config", beside)
        opened = UNet2DConditionModel.from_pretrained(out).state_dict()
        for key, array in opened.items():
            assert np.array_equal(array.numpy().reshape(state[key].shape), state[key]), key
