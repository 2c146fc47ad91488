"""What the JAX pipeline does beyond plain pictures, against PyTorch and against itself."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch as pytorch_backend

from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.weight_files import read_weights
from fact_convert.models.tokenizer import tokenize
from fact_infer.img2img import Img2ImgInput
from fact_infer.jax import pipeline as flax_pipeline
from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.photos import prepare_crops
from fact_infer.request import GenerationParams, Photo
from fact_infer.torch.pipeline import TorchPipeline
from fact_jax.fact import Guidance
from fact_jax.utils.cache import ContentCache
from fact_jax.utils.errors import UserError
from tests.infer.conftest import difference

pytestmark = pytest.mark.heavy

# Mean difference of 8-bit pictures; the rest is rounding of the two libraries' sums.
SAME, OTHER = 1.0, 3.0
PROMPTS, SEEDS = ("a smiling woman", "a man in a red coat"), (3, 4)


@pytest.fixture(scope="module")
def crops(files):
    return prepare_crops([Photo(path=files.photo), Photo(path=files.other_photo)], 32)[0][None]


@pytest.mark.parametrize(("precision", "products"), [("float32", "highest"), ("tf32", "high")])
def test_float32_is_multiplied_as_asked(files, monkeypatch, precision, products):
    """In both backends, whatever the process is set to, which stays as it was."""
    backend, seen = pytorch_backend, []

    def see(self, inputs, bar):
        seen.append(
            (
                jax.config.jax_default_matmul_precision,
                backend.get_float32_matmul_precision(),
                backend.backends.cudnn.allow_tf32,
            )
        )

    monkeypatch.setattr(backend.backends.cudnn, "allow_tf32", True)
    for kind in (FlaxPipeline, TorchPipeline):
        monkeypatch.setattr(kind, "_generate", see)
        pipeline = kind.load(files.base, dtype=precision)
        pipeline.generate(PROMPTS, SEEDS, None, GenerationParams(steps=1))
    (jax_products, *_), (_, torch_products, convolutions) = seen
    assert jax_products == torch_products == products
    assert convolutions is (precision == "tf32")
    assert jax.config.jax_default_matmul_precision != products
    assert backend.backends.cudnn.allow_tf32
    assert backend.get_float32_matmul_precision() == "highest"


def test_controls_of_both_backends_in_one_program(flax, torch, crops):
    """Two people with regions, and every number that may change without compiling again."""
    regions = np.zeros((1, 2, 32, 32), np.float32)
    regions[:, 0, :, :14] = regions[:, 1, 4:28, 20:] = 1.0
    drawn = []
    for guidance in (
        Guidance(text=3.0, cap=0.4, adain=True, combine="average", face_scale=(0.4, 1.2, 0.8)),
        Guidance(
            text=4.0,
            cap=0.2,
            adain=True,
            combine="average",
            start=0.3,
            block_scales=(("mid", 0.2), ("up_blocks", 1.5)),
        ),
    ):
        params = GenerationParams(sampler="ddim", steps=3, guidance=guidance, negative="blurred")
        asked = (PROMPTS, SEEDS, crops, params)
        ours, theirs = (p.generate(*asked, regions=regions) for p in (flax, torch))
        assert difference(ours, theirs) <= SAME
        drawn.append(theirs)
    assert difference(*drawn) > OTHER
    assert flax._denoise._cache_size() == 1
    base = torch.generate(PROMPTS, SEEDS, None, params)
    assert difference(drawn[0], base) > OTHER


def test_one_program_for_samplers_steps_and_photos(files, torch, crops):
    """Three photos are filled up to four, and are what PyTorch draws of three."""
    flax = FlaxPipeline.load(files.base, files.adapter, files.encoder)
    photos = np.concatenate([crops, crops[:, ::-1] // 2], axis=1)
    for sampler, steps, count, more in (
        ("ddim", 3, 3, {}),
        ("pndm", 4, 4, {"face_scale": (0.5, 1.0)}),
        ("dpmpp_2m", 2, 3, {"start": 0.4}),
    ):
        params = GenerationParams(sampler=sampler, steps=steps, guidance=Guidance(text=3.0, **more))
        asked = (PROMPTS, SEEDS, photos[:, :count], params)
        ours, theirs = (p.generate(*asked) for p in (flax, torch))
        assert difference(ours, theirs) <= SAME
    fewer = torch.generate(PROMPTS, SEEDS, photos[:, :2], params)
    assert difference(fewer, theirs) > OTHER
    assert flax._denoise._cache_size() == flax._prepare._cache_size() == 1


@pytest.mark.parametrize("combine", ["average", "normalized"])
def test_means_of_photos_that_were_filled_up(flax, torch, crops, combine):
    photos = np.concatenate([crops, crops[:, 1:]], axis=1)
    params = GenerationParams(
        sampler="ddim", steps=2, guidance=Guidance(text=3.0, combine=combine, adain=True)
    )
    ours, theirs = (p.generate(PROMPTS, SEEDS, photos, params) for p in (flax, torch))
    assert difference(ours, theirs) <= SAME


def test_programs_of_many_sizes_are_let_go_of(files, monkeypatch):
    flax = FlaxPipeline.load(files.base)
    monkeypatch.setattr(flax_pipeline, "MAX_SHAPES", 1)
    for width in (16, 32):
        params = GenerationParams(steps=1, sampler="ddim", width=width, guidance=Guidance(text=1.0))
        flax.generate(PROMPTS[:1], SEEDS[:1], None, params)
    assert flax._denoise._cache_size() == 1


@pytest.mark.parametrize(("sampler", "strength"), [("pndm", 0.7), ("euler", 1.0)])
def test_img2img_of_both_backends(flax, torch, crops, sampler, strength):
    """A part is drawn over; with PLMS from the middle of the trajectory, else from noise."""
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    images = images.repeat(8, axis=1).repeat(8, axis=2)
    latent_mask = np.zeros((2, 16, 20), bool)
    latent_mask[0, 3:12, 4:15] = latent_mask[1, :, :10] = True
    params = GenerationParams(
        sampler=sampler, steps=5, height=32, width=40, guidance=Guidance(text=2.0, stop=0.5)
    )
    img2img = Img2ImgInput(images=images, latent_mask=latent_mask, strength=strength)
    asked = (PROMPTS, SEEDS, crops[:, :1], params)
    ours, theirs = (p.generate(*asked, img2img=img2img) for p in (flax, torch))
    assert difference(ours, theirs) <= SAME
    forgotten = torch.generate(*asked)
    assert difference(theirs, forgotten) > OTHER


@pytest.mark.parametrize("backend", [FlaxPipeline, TorchPipeline])
def test_faces_without_an_adapter(files, crops, backend):
    with pytest.raises(UserError, match="loaded without an adapter"):
        backend.load(files.base).generate(PROMPTS, SEEDS, crops, GenerationParams(steps=1))


@pytest.mark.slow
def test_img2img_on_wider_latents():
    """The miniature's have 16 channels, which diffusers' own inpainting refuses."""
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    images = images.repeat(8, axis=1).repeat(8, axis=2)
    masks = np.zeros((1, 64, 64), np.float32)
    masks[:, 10:40, 20:60] = 1.0
    params = GenerationParams(sampler="ddim", steps=4, guidance=Guidance(text=3.0))
    pictures = []
    for backend in (FlaxPipeline, TorchPipeline):
        pipeline = backend.load("miniature/base")
        img2img = Img2ImgInput.masked(images, masks, 0.75, pipeline.base)
        drawn = pipeline.generate(PROMPTS[:1], SEEDS[:1], None, params, img2img=img2img)
        pictures.append(img2img.finish(drawn))
        same = (pictures[-1] == images).all(-1)
        assert same[masks == 0].all()
        assert same[masks == 1].mean() < 0.1
    assert difference(*pictures) <= SAME


MESH = """
import os, sys
import jax, numpy as np
from fact_jax.fact import Guidance
from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.request import GenerationParams
from tqdm import tqdm
assert jax.device_count() == 8
flax = FlaxPipeline.load(*sys.argv[1:4])
settings = GenerationParams(sampler="lcm", steps=2, guidance=Guidance(text=1.0))
crops = np.load(sys.argv[4])
bar = tqdm(file=open("/dev/null", "w"))
with bar:
    drawn = flax.generate(["a man"] * 4, [1, 2, 3, 4], crops, settings, bar=bar)
assert bar.n == 2, bar.n
spread = {str(a.sharding.num_devices) for a in jax.tree.leaves(flax._states)}
assert spread == {"4"}, spread
np.save(sys.argv[5], drawn)
kept = " ".join(os.listdir(os.environ["JAX_COMPILATION_CACHE_DIR"]))
assert all(f"{name}_rows" in kept for name in ("prepare", "denoise", "decode")), kept
"""


@pytest.mark.slow
def test_a_batch_over_several_devices(files, flax, crops, tmp_path):
    """Four pictures on eight devices take four of them, and are what one device draws.

    The programs are kept on disk though a bar is shown.
    """
    crops = crops[:, :1]
    np.save(tmp_path / "crops.npy", crops)
    where = [str(path) for path in (files.base, files.adapter, files.encoder)]
    where += [str(tmp_path / name) for name in ("crops.npy", "drawn.npy")]
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", MESH, *where],
        env={
            **os.environ,
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    params = GenerationParams(sampler="lcm", steps=2, guidance=Guidance(text=1.0))
    alone = flax.generate(["a man"] * 4, [1, 2, 3, 4], crops, params)
    assert difference(np.load(tmp_path / "drawn.npy"), alone) <= SAME
    assert difference(alone[:1], alone[1:2]) > OTHER


def test_loras_are_in_the_base(files, steered):
    folder, _, state = steered
    plain = FlaxPipeline.load(files.base)._states
    merged = FlaxPipeline.load(files.base, loras=[(folder / "lora.safetensors", 0.6)])._states
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    up, down = (state[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
    place = ("down_blocks", 0, "attentions", 0, "transformer_blocks", 0, "attn1", "to_q", "kernel")
    before, after = (functools.reduce(lambda s, k: s[k], place, s["unet"]) for s in (plain, merged))
    np.testing.assert_allclose(after - before, 0.6 * (up @ down).T / 2, atol=1e-6)
    changed = [
        part
        for part in plain
        for one, other in zip(
            jax.tree.leaves(plain[part]), jax.tree.leaves(merged[part]), strict=True
        )
        if (np.asarray(one) != np.asarray(other)).any()
    ]
    assert sorted(changed) == ["text_encoder", "unet"]
    pipe = TorchPipeline.load(files.base, loras=[(folder / "lora.safetensors", 0.6)]).pipe
    theirs = pipe.unet.get_submodule(".".join(map(str, place[:-1]))).weight.detach()
    np.testing.assert_allclose(theirs.T, after, atol=1e-6)
    (theirs,) = (
        tensor
        for key, tensor in pipe.text_encoder.state_dict().items()
        if key.endswith("encoder.layers.0.self_attn.v_proj.weight")
    )
    ours = merged["text_encoder"]["encoder"]["layers"][0]["self_attn"]["v_proj"]["kernel"]
    np.testing.assert_allclose(theirs.T, ours, atol=1e-6)


def test_loras_are_the_same_in_both_backends(files, tmp_path):
    """Several of peft's, one of them DoRA, at their own strength, rounded once to the precision."""
    import torch

    base = read_weights(files.base / "unet", "diffusion_pytorch_model")
    module = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    weight = np.asarray(base[f"{module}.weight"], np.float64)
    draw, loras, wanted = np.random.default_rng(3), [], weight
    for name, dora in (("one", False), ("two", True)):
        down, up = (draw.normal(size=size) for size in ((4, weight.shape[1]), (len(weight), 4)))
        state = {"lora_A.weight": down, "lora_B.weight": up}
        delta = (0.5 if dora else 0.25) * 8 / 4 * up @ down
        wanted = wanted + delta
        if dora:
            state["lora_magnitude_vector"] = 1 + draw.random(len(weight))
            norm = np.linalg.norm(weight + delta, axis=1, keepdims=True)
            wanted = state["lora_magnitude_vector"][:, None] / norm * wanted
        state = {f"base_model.model.{module}.{k}": a.astype(np.float32) for k, a in state.items()}
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name / "adapter_model.safetensors", state, {})
        params = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": dora}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(params))
        # The weight file alone is named, or its folder.
        file = tmp_path / name / ("" if dora else "adapter_model.safetensors")
        loras.append((file, 0.5 if dora else 0.25))
    for dtype in (jnp.float32, jnp.bfloat16):
        flax = FlaxPipeline.load(files.base, dtype=dtype, loras=loras)
        place = ("mid_block", "attentions", 0, "transformer_blocks", 0, "attn2", "to_k", "kernel")
        ours = functools.reduce(lambda s, k: s[k], place, flax._states["unet"])
        precision = getattr(torch, jnp.dtype(dtype).name)
        pipe = TorchPipeline.load(files.base, dtype=precision, loras=loras).pipe
        theirs = pipe.unet.get_submodule(module).weight.detach().float().numpy()
        np.testing.assert_array_equal(np.asarray(ours, np.float32).T, theirs)
        exact = np.asarray(wanted, np.float32).astype(dtype).astype(np.float32)
        np.testing.assert_allclose(theirs, exact, rtol=2e-6, atol=2e-6)


def test_controlnet_of_diffusers(files, torch, steered):
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline
    from PIL import Image

    folder, controlnet, _ = steered
    flax = FlaxPipeline.load(files.base, controlnet=folder / "controlnet")
    picture = np.random.default_rng(8).integers(0, 256, (32, 40, 3), np.uint8)
    params = GenerationParams(
        sampler="ddim", steps=3, height=32, width=40, guidance=Guidance(text=3.0)
    )
    ours = flax.generate(PROMPTS, SEEDS, None, params, control=picture[None], control_scale=0.8)
    pipe = StableDiffusionControlNetPipeline(
        **torch.pipe.components
        | {"scheduler": DDIMScheduler.from_pretrained(files.base / "scheduler")},
        controlnet=controlnet,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    text = torch._text(tokenize(torch.base.tokenizer, ["", *PROMPTS])[0])
    theirs = pipe(
        prompt_embeds=text[1:],
        negative_prompt_embeds=text[:1].expand_as(text[1:]),
        image=[Image.fromarray(picture)] * 2,
        guidance_scale=3.0,
        num_inference_steps=3,
        height=32,
        width=40,
        latents=torch._noise(SEEDS, 16, 20),
        controlnet_conditioning_scale=0.8,
        output_type="np",
    ).images
    assert difference(ours, np.round(255 * theirs).astype(np.uint8)) <= SAME
    assert difference(ours, torch.generate(PROMPTS, SEEDS, None, params)) > OTHER
    with pytest.raises(UserError, match="no ControlNet to look at it"):
        FlaxPipeline.load(files.base).generate(PROMPTS, SEEDS, None, params, control=picture[None])


def test_prompts_and_faces_are_encoded_once(flax, torch, crops):
    """And the pictures are the same bits, whether they were encoded now or before."""
    params = GenerationParams(sampler="ddim", steps=2, guidance=Guidance(text=3.0))
    for pipeline in (flax, torch):
        asked = (["a smiling woman"], [3], crops[:1], params)
        pipeline._cache = ContentCache()
        first = pipeline.generate(*asked)
        misses = pipeline._cache.misses
        np.testing.assert_array_equal(pipeline.generate(*asked), first)
        assert (pipeline._cache.hits, pipeline._cache.misses) == (misses, misses)
        other = pipeline.generate(*asked[:2], crops[:1, :, ::-1], params)
        assert pipeline._cache.misses == misses + 1
        assert difference(other, first) > OTHER


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_a_bar_that_shows_pictures_is_given_them(files, sampler):
    """Also between Euler's timesteps, which may be fractions."""

    class Bar:
        n, shown = 0, []

        def set_description(self, text, refresh=True):
            pass

        def update(self):
            self.n += 1

        def show(self, pictures):
            self.shown.append(pictures())

    bar, flax = Bar(), FlaxPipeline.load(files.base)
    bar.shown = []
    schedule = dataclasses.replace(flax.base.schedule, timestep_spacing="linspace")
    base = dataclasses.replace(flax.base, schedule=schedule)
    flax.parts = dataclasses.replace(flax.parts, base=base)
    params = GenerationParams(sampler=sampler, steps=3)
    drawn = flax.generate(PROMPTS, SEEDS, None, params, bar=bar)
    assert [shown.shape for shown in bar.shown] == [drawn.shape] * 3
