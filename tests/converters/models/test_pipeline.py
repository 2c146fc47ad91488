"""Pipeline folders: what diffusers wrote we read, what we wrote diffusers opens."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fact_convert import dump_state, load_pipeline, load_state, save_pipeline, tokenize
from fact_convert.cli.main import main
from fact_convert.cli.opening import open_weights
from fact_convert.weights import parameters
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy


@pytest.fixture
def folder(pipeline_folder, tmp_path):
    return shutil.copytree(pipeline_folder, tmp_path / "base")


def test_what_diffusers_wrote_is_read(pipeline_folder, peer_state, same_bits):
    pipeline = load_pipeline(pipeline_folder)
    same_bits(peer_state("unet")[0], dump_state(pipeline.unet))
    same_bits(peer_state("vae")[0], dump_state(pipeline.vae))
    same_bits(peer_state("clip_text")[0], dump_state(pipeline.text_encoder))
    assert pipeline.schedule.beta_schedule == "scaled_linear"
    assert pipeline.schedule.steps_offset == 1
    assert pipeline.scheduler_class == "PNDMScheduler"
    assert tokenize(pipeline.tokenizer, ["cat"])[0].shape == (1, 77)


def test_diffusers_opens_what_we_wrote(pipeline_folder, peers, peer_state, same_bits, tmp_path):
    from diffusers import StableDiffusionPipeline

    save_pipeline(load_pipeline(pipeline_folder), tmp_path / "copy")
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "copy")
    for part, kind in (("unet", "unet"), ("vae", "vae"), ("text_encoder", "clip_text")):
        module = getattr(opened, part)
        same_bits(peer_state(kind)[0], {k: v.numpy() for k, v in module.state_dict().items()})
    reference = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    pictures = [
        pipe("the cat", num_inference_steps=3, generator=torch.manual_seed(3), output_type="np")
        for pipe in (opened, reference)
    ]
    assert np.array_equal(pictures[0].images, pictures[1].images)


def test_half_precision_variants(peers, folder, pipeline_folder, same_bits, tmp_path):
    for part, kind in (("unet", "unet"), ("vae", "vae"), ("text_encoder", "clip_text")):
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        half = type(peers[kind]).from_config if kind != "clip_text" else None
        model = half(peers[kind].config) if half else type(peers[kind])(peers[kind].config)
        model.load_state_dict(peers[kind].state_dict())
        model.half().save_pretrained(folder / part, variant="fp16")
    with pytest.raises(UserError, match="variant fp16"):
        load_pipeline(folder)
    pipeline = load_pipeline(folder, variant="fp16")
    opened = open_weights(folder, variant="fp16")
    assert opened.notes == []
    # As in diffusers, a part that has none of the variant is read as it is.
    shutil.rmtree(folder / "vae")
    shutil.copytree(pipeline_folder / "vae", folder / "vae")
    mixed = open_weights(folder, variant="fp16")
    assert [note.partition(": ")[2] for note in mixed.notes] == [
        "no weights of variant fp16: its ordinary ones are read"
    ]
    same_bits(mixed.states["unet"], opened.states["unet"])
    same_bits(mixed.states["vae"], open_weights(pipeline_folder).states["vae"])
    same_bits(dump_state(load_pipeline(folder, variant="fp16").vae), mixed.states["vae"])
    with pytest.raises(UserError, match=r"unet: no diffusion_pytorch_model\.bf16"):
        load_pipeline(folder, variant="bf16")
    assert pipeline.unet.conv_in.kernel[...].dtype == jnp.float32
    assert {array.dtype for array in dump_state(pipeline.unet).values()} == {np.dtype(np.float16)}
    save_pipeline(pipeline, tmp_path / "copy")
    again = load_pipeline(tmp_path / "copy", dtype=jnp.bfloat16)
    same_bits(dump_state(pipeline.vae), dump_state(load_pipeline(tmp_path / "copy").vae))
    assert again.vae.encoder.conv_in.kernel[...].dtype == jnp.bfloat16


def test_adapters_are_left_out(golden, unet_config, pipeline_folder, tmp_path):
    import dataclasses

    pipeline = load_pipeline(pipeline_folder)
    base, adapter = golden("unet_adapter", "unet.")[0], golden("unet_adapter", "adapter.")[0]
    unet = load_state("unet", base | adapter, unet_config)
    save_pipeline(dataclasses.replace(pipeline, unet=unet), tmp_path / "copy")
    saved = load_pipeline(tmp_path / "copy").unet
    assert saved.config.face_dim is None
    assert set(dump_state(saved)) == set(base)
    assert len(parameters(saved)) == len(base)


def test_nothing_is_replaced_unless_forced(pipeline_folder, folder, tmp_path):
    pipeline = load_pipeline(pipeline_folder)
    with pytest.raises(UserError, match="exists already"):
        save_pipeline(pipeline, folder)
    with pytest.raises(UserError, match="no run wrote it"):
        save_pipeline(pipeline, folder, force=True)
    for _ in range(2):
        save_pipeline(pipeline, tmp_path / "own", force=True)
    load_pipeline(tmp_path / "own")


def test_the_text_encoders_length_holds(folder):
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 10**30}))
    assert load_pipeline(folder).tokenizer.model_max_length == 77


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: shutil.rmtree(f / "vae"), "it has no vae"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "it has no tokenizer"),
        (lambda f: (f / "unet" / "config.json").unlink(), r"unet/config\.json: no such file"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), r"unet/config\.json: not valid"),
        (
            lambda f: shutil.copy(f / "unet" / "config.json", f / "vae" / "config.json"),
            "base/vae: ",
        ),
        (
            lambda f: shutil.copy(
                f / "unet" / "diffusion_pytorch_model.safetensors",
                f / "vae" / "diffusion_pytorch_model.safetensors",
            ),
            "base/vae: these are unet weights, but vae weights were wanted",
        ),
        (
            lambda f: (f / "scheduler" / "scheduler_config.json").write_text(
                '{"beta_schedule": "odd"}'
            ),
            "beta_schedule is 'odd'",
        ),
    ],
)
def test_damaged_folders(folder, damage, reason):
    damage(folder)
    with pytest.raises(UserError, match=reason) as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)


@pytest.fixture
def inverted(folder, tmp_path):
    """The pipeline after diffusers has loaded textual inversion of two rows and of one into it."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    generator = torch.manual_seed(5)
    for token, rows in (("<cat-toy>", 2), ("<Dog>", 1)):
        learned = 3 * torch.randn(rows, 24, generator=generator)
        pipe.load_textual_inversion({token: learned})
    pipe.save_pretrained(tmp_path / "inverted")
    return tmp_path / "inverted"


PROMPT = "the <cat-toy> and a <Dog>, <dog>"


def test_textual_inversion_is_kept(inverted, tmp_path, capsys):
    from diffusers import StableDiffusionPipeline

    def seen(folder) -> np.ndarray:
        """The hidden states of the text, by JAX."""
        pipeline = load_pipeline(folder)
        ids = jnp.asarray(tokenize(pipeline.tokenizer, [PROMPT])[0])
        return np.asarray(pipeline.text_encoder(ids))

    def theirs(folder) -> np.ndarray:
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        return pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].detach().numpy()

    wanted = theirs(inverted)
    np.testing.assert_allclose(seen(inverted), wanted, atol=1e-5)
    save_pipeline(load_pipeline(inverted), tmp_path / "saved")
    made = {
        "copy": [inverted],
        "jax": [inverted],
        "back": [tmp_path / "jax", "--config", inverted.with_name("base")],
        "one.safetensors": [inverted],
        "many": [tmp_path / "one.safetensors", "--config", inverted.with_name("base")],
    }
    for name, arguments in made.items():
        command = "to-jax" if name == "jax" else "to-torch"
        source, *rest = map(str, arguments)
        assert main([command, source, str(tmp_path / name), *rest]) == 0
    for name in ("saved", "copy", "back", "many"):
        assert np.array_equal(seen(tmp_path / name), seen(inverted)), name
        np.testing.assert_allclose(theirs(tmp_path / name), wanted, atol=1e-5)
    capsys.readouterr()
    assert main(["to-torch", str(inverted), str(tmp_path / "one.ckpt")]) == 0
    assert "no place for the names of 3 added tokens: <cat-toy>, " in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "one.safetensors")]) == 0
    assert "<cat-toy> <cat-toy>_1 <Dog>" in capsys.readouterr().out


def test_more_tokens_than_rows(folder, tmp_path, capsys):
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<cat-toy>": 600}))
    with pytest.raises(UserError, match=r"more tokens \(601\) than the text encoder's 600"):
        load_pipeline(folder)
    assert main(["to-torch", str(folder), str(tmp_path / "copy")]) == 2
    assert "more tokens" in capsys.readouterr().err
