"""The adapter follows the call that runs, whichever pipe it is of and whatever changes in it."""

import contextlib
import dataclasses
import functools
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from fact_infer.img2img import Img2ImgInput
from fact_infer.request import GenerationParams
from fact_infer.torch.adapter import FactTorch, load_fact, unload_fact
from fact_infer.torch.attention_processors import installed
from fact_infer.torch.pipeline import TorchPipeline
from fact_jax.fact import Guidance
from fact_jax.utils.errors import UserError
from tests.infer.torch.test_adapter import GUIDANCE, low_rank, people

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def pipeline(files):
    """Our own program's pipeline, with the face in it."""
    pipeline = TorchPipeline.load(files.base, files.adapter, files.encoder)
    pipeline.pipe.scheduler = DDIMScheduler.from_config(pipeline.pipe.scheduler.config)
    pipeline.pipe.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipe(pipeline):
    processors = dict(pipeline.pipe.unet.attn_processors)
    yield pipeline.pipe
    # diffusers leaves its own in place when a picture fails.
    pipeline.pipe.unet.set_attn_processor(processors)


@pytest.fixture
def fact(pipeline):
    return pipeline.fact


@pytest.fixture(scope="module")
def face(pipeline):
    return people(pipeline.fact)


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def draw(pipe, prompt="a man", steps: int = 3, guidance_scale: float = 3.0, **more) -> np.ndarray:
    """Latents (b, 4, h, w)."""
    return pipe(
        prompt,
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **more,
    ).images.numpy()


def around(pipe, kind: type, **parts):
    """Another pipe around the same UNet."""
    other = kind.from_pipe(pipe, **parts)
    other.set_progress_bar_config(disable=True)
    return other


@contextlib.contextmanager
def rows_seen(fact: FactTorch):
    """Of each call of the UNet with a face: in which rows of its batch the face is."""
    processor, found = next(iter(installed(fact.pipe.unet).values())), []

    def look(*_):
        if processor.keys is not None:
            # A product of many rows may round otherwise than that of one.
            found.append([not torch.allclose(row, null, atol=1e-5) for row in processor.keys[0]])

    with torch.no_grad():
        null = processor.face_keys(fact.null_tokens())[0][0]
    hook = fact.pipe.unet.conv_in.register_forward_pre_hook(look)
    try:
        yield found
    finally:
        hook.remove()


# Contents and adapters that change between steps.


def scaled_in_place(pipe, step, t, values):
    values["prompt_embeds"].mul_(0.5)
    return values


def scaled_past_the_counter(pipe, step, t, values):
    values["prompt_embeds"].data.mul_(0.5)
    return values


def replaced(pipe, step, t, values):
    return {"prompt_embeds": values["prompt_embeds"] * 0.5}


@pytest.mark.parametrize("edit", [scaled_in_place, scaled_past_the_counter, replaced])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_text_that_a_callback_edits(fact, pipe, face, edit, mode):
    edited = functools.partial(
        draw, pipe, callback_on_step_end=edit, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    with mode():
        plain, other = draw(pipe), edited()
        with fact.face(face, dataclasses.replace(GUIDANCE, start=1.0)):
            np.testing.assert_array_equal(edited(), other)
    assert np.abs(other - plain).max() > 1e-3


def test_adapters_that_a_callback_changes(fact, pipe, face):
    def weaker(pipe, step, t, values):
        pipe.set_adapters("style", 0.3)
        return values

    def fused(pipe, step, t, values):
        if not step:
            pipe.fuse_lora(lora_scale=0.5)
        return values

    def undo(change):
        if change is fused:
            pipe.unfuse_lora()
        pipe.set_adapters("style", 1.0)

    pipe.load_lora_weights(low_rank(pipe.unet), adapter_name="style")
    try:
        plain = draw(pipe)
        for change in (weaker, fused):
            changed = draw(pipe, callback_on_step_end=change)
            undo(change)
            with fact.face(face, dataclasses.replace(GUIDANCE, start=1.0)):
                np.testing.assert_allclose(
                    draw(pipe, callback_on_step_end=change), changed, atol=1e-5
                )
            undo(change)
            assert np.abs(changed - plain).max() > 1e-2
    finally:
        pipe.unload_lora_weights()


# Settings that follow the call.


def test_the_guidance_scale_is_the_calls(fact, pipe, face):
    for scale in (1.0, 3.0, 7.5):
        with fact.face(face, Guidance(text=scale)):
            given = draw(pipe, guidance_scale=scale)
        with fact.face(face):
            np.testing.assert_array_equal(draw(pipe, guidance_scale=scale), given)
        # A face guidance as high as the text's is the two branches of the null face.
        with fact.face(face, face_guidance=scale):
            np.testing.assert_allclose(draw(pipe, guidance_scale=scale), given, atol=1e-4)


def test_a_pipe_made_from_another(fact, pipe, face, image):
    """It shares the UNet, but has a call, and may have a scheduler, of its own."""
    other = around(pipe, StableDiffusionImg2ImgPipeline)
    more = {"image": image, "strength": 0.6, "steps": 5}
    with fact.on(other).face(face, Guidance(text=4.0)):
        wanted = draw(other, guidance_scale=4.0, **more)
    with fact.face(face):
        first = draw(pipe)
        np.testing.assert_array_equal(draw(other, guidance_scale=4.0, **more), wanted)
        np.testing.assert_array_equal(draw(pipe), first)
        other.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.set_timesteps(2)
        np.testing.assert_array_equal(draw(other, guidance_scale=4.0, **more), wanted)
    assert np.abs(draw(other, guidance_scale=4.0, **more) - wanted).max() > 1e-2


def test_a_pipe_whose_unet_is_not_compiled(fact, pipe, face):
    """Hooks are around the compiled one: past them there would be no face, without a word."""
    other, plain = around(pipe, StableDiffusionPipeline), pipe.unet
    with fact.face(face):
        wanted = draw(pipe)
    pipe.unet = torch.compile(plain, backend="eager")
    try:
        with fact.face(face), pytest.raises(UserError, match="name the pipe that calls it"):
            draw(other)
        with fact.on(other).face(face):
            np.testing.assert_array_equal(draw(other), wanted)
    finally:
        pipe.unet = plain


def test_windows_count_the_steps_that_are_drawn(fact, pipe, face, image):
    other = around(pipe, StableDiffusionImg2ImgPipeline)
    scales, context = [], fact.context
    hook = pipe.unet.conv_in.register_forward_pre_hook(
        lambda *_: scales.append(context.scale.item() if context.scale is not None else 0.0)
    )
    with fact.on(other).face(face, Guidance(text=3.0, face_scale=(0.9, 0.3), stop=0.5)):
        draw(other, image=image, strength=0.4, steps=10)
    hook.remove()
    # 4 of 10 steps.
    np.testing.assert_allclose(scales, [0.9, 0.7, 0.0, 0.0], rtol=1e-6)


def test_image_to_image_as_our_program_draws_it(pipeline, fact, pipe, image):
    """With the window over what is drawn, in both."""
    crops = np.random.default_rng(0).integers(0, 256, (1, 1, 32, 32, 3), np.uint8)
    pixels = np.uint8(255 * image.permute(0, 2, 3, 1).numpy())
    guidance = Guidance(text=3.0, face_scale=0.8, start=0.25)
    settings = GenerationParams(sampler="ddim", steps=8, guidance=guidance)
    img2img = Img2ImgInput.whole(pixels, 0.5, pipeline.base)
    wanted = pipeline.generate(["a man"], [5], crops, settings, img2img=img2img)
    other = around(pipe, StableDiffusionImg2ImgPipeline)
    noise = pipeline._noise([5], 16, 16)

    def from_mean(image, timestep, *_, **__):
        mean = other.vae.encode(torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
        latents = mean.latent_dist.mean * other.vae.config.scaling_factor
        return other.scheduler.add_noise(latents, noise, timestep)

    other.prepare_latents = from_mean
    with fact.face(fact.face_tokens(crops), scale=0.8, start=0.25):
        ours = other(
            "a man",
            image=image,
            strength=0.5,
            num_inference_steps=8,
            guidance_scale=3.0,
            output_type="np",
        ).images
    assert np.abs(np.round(255 * ours) - wanted).max() <= 1


# Pipes and callbacks that change the batch.


def test_guidance_that_is_cut_off(fact, pipe, face):
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    with rows_seen(fact) as rows:
        with fact.face(face, GUIDANCE):
            ours, whole = draw(pipe, callback_on_step_end=cut), draw(pipe)
        with fact.face(face, face_guidance=3.0):
            first = draw(pipe, steps=1, callback_on_step_end=cut)
            draw(pipe, callback_on_step_end=cut)
    assert rows[:3] == [[False, True], [True], [True]]
    assert rows[-3:] == [[False, False, True], [False, True], [False, True]]
    assert np.abs(ours - whole).max() > 1e-3
    with fact.face(face):
        np.testing.assert_allclose(draw(pipe, steps=1), first, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_perturbed_attention_guidance(fact, pipe, face, guidance_scale):
    pag = around(pipe, StableDiffusionPAGPipeline, pag_applied_layers="mid")
    with rows_seen(fact) as rows, fact.on(pag).face(face, Guidance(text=guidance_scale)):
        without = draw(pag, guidance_scale=guidance_scale, pag_scale=0.0)
        ours = draw(pag, guidance_scale=guidance_scale, pag_scale=2.0)
        np.testing.assert_array_equal(without, draw(pipe, guidance_scale=guidance_scale))
    branches = [False, True] if guidance_scale > 1 else [True]
    assert rows[:6] == [branches] * 3 + [[*branches, True]] * 3
    assert np.abs(ours - without).max() > 1e-4
    with (
        fact.face(face, face_guidance=2.0),
        pytest.raises(UserError, match="PAGPipeline has branches of"),
    ):
        draw(pag)


@pytest.mark.filterwarnings("ignore")
def test_self_attention_guidance(fact, pipe, face):
    """It tells no guidance scale, and calls the UNet a second time with the negative branch."""
    sag = around(pipe, StableDiffusionSAGPipeline)
    with fact.on(sag).face(face, GUIDANCE):
        without = draw(sag, sag_scale=0.0)
        # It attends without torch's fused kernel in one block.
        np.testing.assert_allclose(without, draw(pipe), atol=1e-4)
        with rows_seen(fact) as rows:
            ours = draw(sag, sag_scale=1.0, num_images_per_prompt=2)
    assert rows == [[False, False, True, True], [False, False]] * 3
    with fact.face(face, Guidance(text=1.0)), rows_seen(fact) as rows:
        draw(sag, sag_scale=1.0, guidance_scale=1.0, steps=2)
    assert rows == [[True]] * 4
    assert np.abs(ours[:1] - without).max() > 1e-4
    with fact.face(face), pytest.raises(UserError, match=r"SAGPipeline.*: give it to the face"):
        draw(sag)
    with fact.face(face, Guidance(text=3.0, face=2.0)), pytest.raises(UserError, match="of its ow"):
        draw(sag)


@pytest.mark.filterwarnings("ignore")
def test_a_pipe_of_many_views_is_refused(fact, pipe, face):
    panorama = around(pipe, StableDiffusionPanoramaPipeline)
    with fact.face(face), pytest.raises(UserError, match="PanoramaPipeline is not supported"):
        draw(panorama, height=32, width=64)


def conditioned(pipe, files, **config):
    """A pipe with an adapter, around a UNet with another input."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel.from_config({**pipe.unet.config, **config})
    parts = {**pipe.components, "unet": unet}
    other = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other, load_fact(other, files.adapter, files.encoder)


def test_a_unet_that_is_told_the_guidance_scale(pipe, files, face):
    other, fact = conditioned(pipe, files, time_cond_proj_dim=8)
    parts = {**other.components, "scheduler": LCMScheduler.from_config(pipe.scheduler.config)}
    lcm = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    lcm.set_progress_bar_config(disable=True)
    for each in (other, lcm):
        base = draw(each, guidance_scale=8.5)
        with rows_seen(fact) as rows:
            with fact.on(each).face(face, Guidance(text=8.5)):
                ours = draw(each, guidance_scale=8.5)
            with fact.face(face):
                np.testing.assert_array_equal(draw(each, guidance_scale=8.5), ours)
            with fact.face(face, face_guidance=1.0):
                np.testing.assert_allclose(draw(each, guidance_scale=8.5), ours, atol=1e-4)
        assert rows == [[True]] * 6 + [[False, True]] * 3
        assert np.abs(ours - base).max() > 1e-2


def test_three_branches_of_a_pipe_that_edits(pipe, files, face, image):
    other, fact = conditioned(pipe, files, in_channels=8)
    edit = StableDiffusionInstructPix2PixPipeline(**other.components, requires_safety_checker=False)
    edit.set_progress_bar_config(disable=True)
    base = draw(edit, image=image)
    with fact.face(face), rows_seen(fact) as rows:
        assert np.abs(draw(edit, image=image) - base).max() > 1e-2
    assert rows == [[True, False, False]] * 3


@torch.no_grad()
def loop(pipe, scale: float, steps: int = 3) -> np.ndarray:
    """As a user writes it, everything by name."""
    text, negative = pipe.encode_prompt("a man", "cpu", 1, True)
    pipe.scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for t in pipe.scheduler.timesteps:
        noise = pipe.unet(
            sample=torch.cat([x, x]),
            timestep=t,
            encoder_hidden_states=torch.cat([negative, text]),
        ).sample
        n, p = noise.chunk(2)
        x = pipe.scheduler.step(n + scale * (p - n), t, x).prev_sample
    return x.numpy()


def test_a_loop_written_by_hand(fact, pipe, face):
    with fact.face(face, GUIDANCE):
        wanted = draw(pipe)
        np.testing.assert_allclose(loop(pipe, 3.0), wanted, atol=1e-5)
        # The scheduler starts anew with every loop.
        np.testing.assert_allclose(loop(pipe, 3.0), wanted, atol=1e-5)
    with (
        fact.face(face),
        pytest.raises(UserError, match=r"no pipe .* as guidance=Guidance\(text=7.5\)"),
    ):
        loop(pipe, 3.0)
    with fact.face(face, face_guidance=2.0, stop=0.7):
        wanted = draw(pipe)
    with fact.face(face, Guidance(text=3.0, face=2.0, stop=0.7)):
        np.testing.assert_allclose(loop(pipe, 3.0), wanted, atol=1e-5)
    text = torch.zeros(3, 77, 24)
    with fact.face(face, Guidance(text=3.0)), pytest.raises(UserError, match="with 3 rows"):
        pipe.unet(torch.zeros(3, 4, 16, 16), 5, encoder_hidden_states=text)
    ours = fact.face(face, Guidance(text=1.0, stop=0.5))
    with ours, pytest.raises(UserError, match=r"timestep 1\.5, which is none of the pipe's DDIM"):
        pipe.unet(torch.zeros(1, 4, 16, 16), 1.5, encoder_hidden_states=text[:1])
    with fact.face(face, Guidance(text=1.0)):
        pipe.unet(torch.zeros(1, 4, 16, 16), 1.5, encoder_hidden_states=text[:1])


def test_sequential_offload_is_refused_before_anything_moves(files):
    import accelerate

    pipe = TorchPipeline.load(files.base).pipe
    fact = load_fact(pipe, files.adapter, files.encoder)
    crops = np.zeros((1, 1, 32, 32, 3), np.uint8)
    wanted = fact.face_tokens(crops)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        accelerate.cpu_offload(module, "cpu")
    for call in (lambda: fact.face_tokens(crops), fact.null_tokens):
        with pytest.raises(UserError, match="use enable_model_cpu_offload instead"):
            call()
    assert {p.device.type for p in fact.encoder.parameters()} == {"cpu"}
    assert {p.device.type for p in fact.resampler.parameters()} == {"cpu"}
    other = dataclasses.replace(fact, pipe=TorchPipeline.load(files.base).pipe)
    assert torch.equal(other.face_tokens(crops), wanted)
    unload_fact(pipe)
    with pytest.raises(UserError, match="use enable_model_cpu_offload instead"):
        load_fact(pipe, files.adapter, files.encoder)


# What is given to the library.


def test_arguments_are_checked(fact, face):
    crops = np.zeros((1, 2, 32, 32, 3), np.uint8)
    for bad, more, message in (
        (crops / 255.0, {}, r"uint8 \(pictures, photos, 32, 32, 3\), got float64"),
        (crops[0], {}, r"got uint8 \(2, 32, 32, 3\)"),
        (np.zeros((1, 1, 112, 112, 3), np.uint8), {}, r"got uint8 \(1, 1, 112, 112, 3\)"),
        (torch.zeros(1, 1, 32, 32, 3), {}, "got Tensor"),
        (crops, {"combine": "sum"}, "combine must be one of"),
        (crops, {"people": 3}, "2 photos cannot be of 3 people"),
        (crops, {"people": 0}, "of 0 people"),
    ):
        with pytest.raises(UserError, match=message):
            fact.face_tokens(bad, **more)
    mask = np.ones((8, 8), np.float32)
    for tokens, more, message in (
        (face * float("nan"), {}, "not finite"),
        (face[0], {}, r"must be \(pictures, tokens, 20\), got \(5, 20\)"),
        (face[..., :7], {}, "must be"),
        (face[:, :3], {}, "3 face tokens: they must be a multiple of 5"),
        (face, {"scale": -0.5}, "face scale must lie in 0..2, got -0.5"),
        (face, {"scale": [1.0, float("nan")]}, "face scale must lie in 0..2, got nan"),
        (face, {"scale": "strong"}, "must be a number, one for each picture"),
        (face, {"scales": [1.0, -1.0]}, "face scale must lie in 0..2, got -1"),
        (face, {"face_guidance": float("inf")}, "face guidance must lie in 0..50, got inf"),
        (face, {"schedule": (0.1, 3.0)}, "face scale must lie in 0..2, got 3"),
        (face, {"face_guidance": 2.0, "negative_face": "same"}, "give one of the two"),
        (face, {"guidance": Guidance(), "cap": 1.0}, "give these settings within the guidance"),
        (face, {"guidance": Guidance(text=float("nan"))}, "guidance must lie in 1..50, got nan"),
        (face, {"regions": []}, "a mask for each person"),
        (face, {"regions": [mask[0]]}, r"a mask must be \(h, w\)"),
        (face, {"regions": [mask * 2]}, r"a mask must be \(h, w\)"),
        (face, {"regions": [mask, mask]}, "5 face tokens cannot be of 2 people"),
        ([face, face], {}, "tokens of 2 people: give regions"),
        ("photo.png", {}, "face tokens are tensors"),
        (face.numpy(), {}, "face tokens are tensors"),
        (face, {"schedule": 0.5}, "the schedule must be several numbers, got 0.5"),
        (face, {"scales": 1.0}, "the scales must be several numbers, got 1.0"),
        (face, {"scales": ["a"]}, "face scale must be a number, got 'a'"),
        (face, {"block_scales": {"up": 3.0}}, "block scale 'up' must lie in 0..2, got 3"),
        (face, {"regions": "left.png"}, "left.png"),
        (face, {"regions": 3}, "regions must be a mask for each person, got 3"),
        (face, {"guidance": 7.5}, r"must be as Guidance\(text=7.5\), got 7.5"),
        (face, {"block_scales": [("up", 1.0, 2.0)]}, "must be as {'up_blocks': 0.5}, got"),
        (face, {"block_scales": 0.5}, "must be as {'up_blocks': 0.5}, got 0.5"),
        (face, {"start": None}, "start must be a number, got None"),
        (None, {}, "face tokens are tensors"),
        ([], {}, "face tokens are tensors"),
        ([face, torch.cat([face, face], 1)], {"regions": [mask, mask]}, "as many face tokens as"),
    ):
        with pytest.raises(UserError, match=message), fact.face(tokens, **more):
            pass
    with pytest.raises(UserError, match="no face is being drawn"):
        fact.set_scale(0.5)
    with pytest.raises(UserError, match="at least one photo"):
        fact.tokens()
    with pytest.raises(UserError, match="each by itself, not as a list"):
        fact.tokens(["a.png", "b.png"])


def test_tokens_of_photos(fact, files):
    one = fact.tokens(files.photo)
    both = fact.tokens(str(files.photo), files.other_photo)
    assert one.shape == (1, 5, 20)
    assert torch.equal(both[:, :5], one)
    average = fact.tokens(files.photo, files.other_photo, combine="average")
    np.testing.assert_allclose(average, both.unflatten(1, (2, 5)).mean(1), atol=1e-6)
    with pytest.raises(UserError, match=r"nobody\.jpg"):
        fact.tokens("nobody.jpg")


def test_more_pictures_than_faces(fact, pipe, face):
    """``num_images_per_prompt``, one face for many prompts, and both."""
    two = torch.cat([face, people(fact, seed=1)])
    prompts = ["a man", "a smiling woman"]
    with fact.face(two), rows_seen(fact) as rows:
        ours = draw(pipe, prompts, num_images_per_prompt=2)
    assert rows[0] == [False] * 4 + [True] * 4
    with fact.face(two.repeat_interleave(2, 0)):
        np.testing.assert_array_equal(draw(pipe, prompts, num_images_per_prompt=2), ours)
    with fact.face(face):
        once = draw(pipe, prompts)
    with fact.face(face.expand(2, -1, -1)):
        np.testing.assert_array_equal(draw(pipe, prompts), once)


def test_a_strength_for_each_picture(fact, pipe, face):
    two, prompts = face.expand(2, -1, -1), ["a man", "a smiling woman"]
    with fact.face(two, scale=[0.4, 1.2]):
        ours = draw(pipe, prompts)
    for i, scale in enumerate((0.4, 1.2)):
        with fact.face(two, scale=scale):
            np.testing.assert_allclose(ours[i], draw(pipe, prompts)[i], atol=1e-5)
    with fact.face(two, scale=[0.0, 1.0]):
        ours = draw(pipe, prompts)
    with fact.face(two, scale=0.0):
        silent = draw(pipe, prompts)
    np.testing.assert_array_equal(silent, draw(pipe, prompts))
    np.testing.assert_array_equal(ours[0], silent[0])
    with fact.face(face, scale=[0.5, 0.5]), pytest.raises(UserError, match="not for 1 pictures"):
        draw(pipe)


def test_a_strength_and_a_mask_for_each_person(fact, pipe, face, tmp_path):
    other, base = people(fact, seed=1), draw(pipe)
    left, right = (np.zeros((24, 48), np.uint8) for _ in range(2))
    left[:, :24] = right[:, 24:] = 255
    Image.fromarray(right).resize((100, 80)).save(tmp_path / "right.png")
    masks = [Image.fromarray(left).resize((64, 64)), tmp_path / "right.png"]
    together = functools.partial(fact.face, [face, other])
    with together(regions=masks):
        ours = draw(pipe)
    with together(regions=[left / np.float32(255), right], scale=[[1.0, 1.0]]):
        np.testing.assert_allclose(draw(pipe), ours, atol=1e-5)
    # Without a strength a person is as one without a place, but for what is normalised over all.
    with together(regions=masks, scale=[[1.0, 0.0]]):
        one = draw(pipe)
    with together(regions=masks, scale=[[0.0, 1.0]]):
        two = draw(pipe)
    assert min(np.abs(a - b).max() for a, b in ((one, ours), (two, ours), (one, two))) > 1e-3
    with together(regions=masks, scale=[[0.0, 0.0]]):
        np.testing.assert_array_equal(draw(pipe), base)
    with together(regions=masks, face_guidance=3.0):
        np.testing.assert_allclose(draw(pipe), ours, atol=1e-4)


def test_a_scale_that_a_callback_sets(fact, pipe, face):
    def fade(pipe, step, t, values):
        fact.set_scale(max(0.8 - 0.4 * (step + 1), 0.0))
        return values

    with fact.face(face, schedule=(0.8, 0.0)):
        wanted = draw(pipe)
    with fact.face(face, scale=0.8):
        np.testing.assert_allclose(draw(pipe, callback_on_step_end=fade), wanted, atol=1e-5)


def test_nothing_stays_behind(fact, pipe, face):
    base = draw(pipe)
    with fact.face(face, scale=[1.0]), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(draw(pipe) - base).max() > 1e-2
    assert fact.context.strength is None
    np.testing.assert_array_equal(draw(pipe), base)
