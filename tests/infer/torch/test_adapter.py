"""The adapter in every Stable Diffusion pipeline of diffusers, and beside its other features."""

import contextlib
import copy
import dataclasses

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor2_0

from fact_infer.img2img import Img2ImgInput
from fact_infer.parts import load_parts
from fact_infer.request import GenerationParams
from fact_infer.torch.adapter import FactTorch, load_fact, unload_fact
from fact_infer.torch.attention_processors import installed
from fact_infer.torch.pipeline import TorchPipeline
from fact_infer.torch.unet_calls import StepScales
from fact_jax.fact import Guidance
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy

GUIDANCE = Guidance(text=3.0)


@pytest.fixture(scope="module")
def pipe(files):
    """A stock pipeline, without a face."""
    pipe = TorchPipeline.load(files.base).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def fact(pipe, files):
    loaded = load_fact(pipe, files.adapter, files.encoder)
    yield loaded
    unload_fact(pipe)


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def people(fact: FactTorch, count: int = 1, seed: int = 0) -> torch.Tensor:
    """Face tokens of made-up people."""
    draw = np.random.default_rng(seed)
    return fact.face_tokens(draw.integers(0, 256, (count, 1, 32, 32, 3), np.uint8))


def draw(pipe, prompt="a man", steps: int = 2, seed: int = 0, **more) -> np.ndarray:
    count = 1 if isinstance(prompt, str) else len(prompt)
    generators = [torch.Generator().manual_seed(seed) for _ in range(count)]
    return pipe(
        prompt,
        guidance_scale=GUIDANCE.text,
        num_inference_steps=steps,
        generator=generators,
        output_type="np",
        **more,
    ).images


def controlnet(pipe) -> ControlNetModel:
    torch.manual_seed(4)
    # Its picture comes to the latents' size by one halving, as this VAE's do.
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))
    for convolution in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
        torch.nn.init.normal_(convolution.weight, std=0.3)
    return net


@pytest.mark.parametrize("kind", ["img2img", "inpaint", "control", "control inpaint"])
def test_a_face_in_every_pipeline(fact, pipe, image, kind):
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1.0
    parts, more = dict(pipe.components), {}
    if "control" in kind:
        parts["controlnet"] = controlnet(pipe)
        more = {"control_image" if "inpaint" in kind else "image": image, "height": 32, "width": 32}
    if "inpaint" in kind:
        more |= {"image": image, "mask_image": mask, "strength": 0.9}
    if kind == "img2img":
        more = {"image": image, "strength": 0.9}
    other = {
        "img2img": StableDiffusionImg2ImgPipeline,
        "inpaint": StableDiffusionInpaintPipeline,
        "control": StableDiffusionControlNetPipeline,
        "control inpaint": StableDiffusionControlNetInpaintPipeline,
    }[kind](**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert other.unet is pipe.unet
    more["steps"] = 3
    base = draw(other, **more)
    face = people(fact)
    with fact.on(other).face(face, GUIDANCE):
        two = draw(other, **more)
    # The call that runs says which pipe it is and what its guidance scale is.
    with fact.face(face):
        np.testing.assert_array_equal(draw(other, **more), two)
    with fact.face(face, face_guidance=3.0):
        three = draw(other, **more)
    with fact.face(face, start=1.0):
        np.testing.assert_array_equal(draw(other, **more), base)
    assert np.abs(two - base).mean() > 0.01
    # A face guidance equal to the text's is the two branches of the null face.
    assert np.abs(three - two).mean() < 1 / 255


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        (HeunDiscreteScheduler, 7),
        (KDPM2DiscreteScheduler, 7),
        (UniPCMultistepScheduler, 4),
    ],
)
def test_window_and_schedule_hold_under_any_scheduler(fact, pipe, kind, calls):
    """Some call the UNet twice a step."""
    former, scales = pipe.scheduler, []
    pipe.scheduler = kind.from_config(former.config)
    hook = pipe.unet.conv_in.register_forward_pre_hook(
        lambda *_: scales.append(None if fact.context.scale is None else fact.context.scale.item())
    )
    try:
        with fact.face(people(fact), Guidance(text=3.0, face_scale=0.5, start=0.3, stop=0.6)):
            draw(pipe, steps=4)
            # From the pictures' own list of timesteps, which starts over with each of them.
            draw(pipe, steps=4)
    finally:
        pipe.scheduler = former
        hook.remove()
    assert len(scales) == 2 * calls
    assert scales[:calls] == scales[calls:]
    inside = [i for i, scale in enumerate(scales[:calls]) if scale is not None]
    assert inside == list(range(inside[0], inside[-1] + 1))
    assert {scales[i] for i in inside} == {0.5}
    # 4 steps: the third alone; KDPM2 has a level of its own between each two.
    assert len(inside) == {4: 1, 7: 2}[calls]
    assert inside[0] == {4: 2, 7: 3}[calls]


def test_different_people_for_different_prompts(fact, pipe):
    prompts, faces = ["a man", "a smiling woman"], people(fact, 2)
    with fact.face(faces, GUIDANCE):
        both = draw(pipe, prompts)
    for i in range(2):
        with fact.face(faces[i : i + 1], GUIDANCE):
            alone = draw(pipe, prompts[i])
        np.testing.assert_allclose(both[i], alone[0], atol=1e-4)
    with fact.face(faces.flip(0), GUIDANCE):
        assert np.abs(draw(pipe, prompts) - both).mean() > 0.01


def test_what_does_not_fit_is_said_in_one_line(fact, pipe):
    with fact.face(people(fact, 2)), pytest.raises(UserError, match="draws 3 pictures at once"):
        draw(pipe, ["a man", "a woman", "a man"])
    with (
        fact.face(people(fact), Guidance(text=4.0)),
        pytest.raises(UserError, match="guidance_scale=3, the face was given 4"),
    ):
        draw(pipe)
    stranger = copy.copy(pipe)
    stranger.unet = torch.nn.Identity()
    with pytest.raises(UserError, match="has another UNet"):
        fact.on(stranger)


def test_keys_of_the_face_are_computed_once(fact, pipe):
    counts = dict.fromkeys(("face", "query"), 0)

    def counting(name):
        def hook(*_):
            counts[name] += 1

        return hook

    processor = next(iter(installed(pipe.unet).values()))
    attention = processor._block[0].attn2
    hooks = [
        attention.to_q.register_forward_hook(counting("query")),
        processor.linear.register_forward_hook(counting("face")),
    ]
    with fact.face(people(fact), dataclasses.replace(GUIDANCE, face=2.0)):
        draw(pipe, steps=3)
    assert counts == {"face": 1, "query": 3}
    draw(pipe, steps=3)
    assert counts == {"face": 1, "query": 6}
    for hook in hooks:
        hook.remove()


def test_slicing_on_and_off_again(fact, pipe):
    before = dict(pipe.unet.attn_processors)
    face = people(fact)
    with fact.face(face, GUIDANCE):
        fused = draw(pipe)
    pipe.enable_attention_slicing(1)
    try:
        kinds = {type(p).__name__ for p in pipe.unet.attn_processors.values()}
        assert kinds == {"SlicedAttnProcessor"}
        with fact.face(face, GUIDANCE):
            np.testing.assert_allclose(draw(pipe), fused, atol=1e-4)
        sliced = draw(pipe)
    finally:
        pipe.disable_attention_slicing()
    with fact.face(face, GUIDANCE):
        np.testing.assert_array_equal(draw(pipe), fused)
    np.testing.assert_allclose(draw(pipe), sliced, atol=1e-4)
    pipe.unet.set_attn_processor(dict(before))
    assert pipe.unet.attn_processors == before
    with fact.face(face, GUIDANCE):
        np.testing.assert_array_equal(draw(pipe), fused)


def test_a_pipe_is_saved_as_the_base_that_it_is(fact, pipe, files, tmp_path):
    pipe.unet.save_pretrained(tmp_path / "unet")
    again = type(pipe.unet).from_pretrained(tmp_path / "unet")
    base = type(pipe.unet).from_pretrained(files.base / "unet")
    assert again.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(again.state_dict()[k], v) for k, v in base.state_dict().items())
    # Sizes of both: nothing of the adapter lies in the file.
    (ours, theirs) = (
        next(folder.glob("*.safetensors")).stat().st_size
        for folder in (tmp_path / "unet", files.base / "unet")
    )
    assert ours == theirs


def test_saved_and_loaded_again(fact, pipe, tmp_path):
    face = people(fact)
    with fact.face(face, GUIDANCE):
        wanted = draw(pipe)
    fact.save_pretrained(tmp_path)
    unload_fact(pipe)
    again = load_fact(pipe, tmp_path)
    with again.face(people(again), GUIDANCE):
        np.testing.assert_array_equal(draw(pipe), wanted)


def test_img2img_under_a_controlnet(files):
    pipe = TorchPipeline.load(files.base).pipe
    parts = dataclasses.replace(load_parts(files.base), controlnet="of the test")
    pipeline = TorchPipeline(parts, pipe, controlnet(pipe))
    seen, under = np.random.default_rng(2).integers(0, 256, (2, 1, 32, 32, 3), np.uint8)
    params = GenerationParams(sampler="ddim", steps=2, guidance=GUIDANCE)

    def picture(**more):
        return pipeline.generate(["a man"], [1], None, params, **more).astype(float)

    steered = picture(control=seen)
    whole = Img2ImgInput.whole(under, 1.0, pipeline.base)
    np.testing.assert_array_equal(picture(control=seen, img2img=whole), steered)
    half = Img2ImgInput.whole(under, 0.5, pipeline.base)
    assert np.abs(picture(control=seen, img2img=half) - picture(img2img=half)).mean() > 1.0
    assert np.abs(picture(control=seen, img2img=half) - steered).mean() > 1.0


def test_offloaded_models(fact, pipe):
    """accelerate takes over ``forward``, before or after; here both devices are the CPU."""
    face = people(fact)
    with fact.face(face, GUIDANCE):
        wanted = draw(pipe)
    _, hook = accelerate.cpu_offload_with_hook(pipe.unet, "cpu")
    try:
        with fact.face(face, GUIDANCE):
            np.testing.assert_array_equal(draw(pipe), wanted)
    finally:
        hook.remove()
    again = copy.deepcopy(pipe.unet)
    context = next(iter(installed(again).values())).context
    accelerate.cpu_offload(again, "cpu")
    sequential = pipe.__class__(**{**pipe.components, "unet": again}, requires_safety_checker=False)
    with (
        pytest.raises(UserError, match="use enable_model_cpu_offload instead"),
        dataclasses.replace(fact, pipe=sequential, context=context).face(face, GUIDANCE),
    ):
        pass


def test_half_precision(files):
    """float16 as on a GPU: the picture is whole and still somebody's."""
    half = TorchPipeline.load(files.base, files.adapter, files.encoder, torch.float16)
    crops = np.random.default_rng(0).integers(0, 256, (1, 1, 32, 32, 3), np.uint8)
    params = GenerationParams(steps=2, guidance=GUIDANCE)
    face = half.generate(["a man"], [0], crops, params).astype(float)
    base = half.generate(["a man"], [0], None, params).astype(float)
    exact = TorchPipeline.load(files.base, files.adapter, files.encoder)
    wanted = exact.generate(["a man"], [0], crops, params).astype(float)
    assert {p.dtype for p in half.pipe.unet.parameters()} == {torch.float16}
    assert np.abs(face - wanted).mean() < 1.0
    assert np.abs(face - base).mean() > 3.0


def test_a_window_over_timesteps_that_are_rounded_to_one(pipe):
    karras = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    karras.set_timesteps(100)
    assert len(set(karras.timesteps.tolist())) < 100
    scales = StepScales(Guidance(text=3.0, stop=0.5))
    assert [scales.at(karras, t) for t in karras.timesteps] == [1.0] * 50 + [0.0] * 50
    # The last 60, as image-to-image takes them, in a loop that passes numbers.
    values = karras.timesteps[40:].tolist()
    assert [scales.at(karras, t) for t in values] == [1.0] * 30 + [0.0] * 30


def low_rank(unet) -> dict[str, torch.Tensor]:
    """A LoRA for every attention of the base, as diffusers' users have it."""
    draw, state = torch.Generator().manual_seed(5), {}
    for path, module in unet.named_modules():
        if "processor" not in path and path.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            outputs, inputs = module.weight.shape
            state[f"unet.{path}.lora_A.weight"] = torch.randn(3, inputs, generator=draw) * 0.2
            state[f"unet.{path}.lora_B.weight"] = torch.randn(outputs, 3, generator=draw) * 0.2
    return state


def test_lora_of_diffusers_before_or_after(pipe, files):
    pytest.importorskip("peft")
    lora, base = low_rank(pipe.unet), draw(pipe)
    pipe.load_lora_weights(lora)
    try:
        styled = draw(pipe)
        fact = load_fact(pipe, files.adapter, files.encoder)
        face = people(fact)
        np.testing.assert_array_equal(draw(pipe), styled)
        with fact.face(face, GUIDANCE):
            after = draw(pipe)
        pipe.unload_lora_weights()
        np.testing.assert_array_equal(draw(pipe), base)
        with fact.face(face, GUIDANCE):
            alone = draw(pipe)
        pipe.load_lora_weights(lora)
        touched = {path for path, _ in pipe.unet.named_modules() if "lora" in path}
        assert touched
        assert not [path for path in touched if "processor" in path]
        with fact.face(face, GUIDANCE):
            np.testing.assert_array_equal(draw(pipe), after)
        assert np.abs(after - alone).mean() > 0.01
        assert np.abs(after - styled).mean() > 0.01
        # What a call scales its LoRA by reaches the text's keys, which are read before it.
        half = {"cross_attention_kwargs": {"scale": 0.5}}
        with fact.face(face, dataclasses.replace(GUIDANCE, start=1.0)):
            silent = draw(pipe, **half)
        np.testing.assert_array_equal(silent, draw(pipe, **half))
        assert np.abs(silent - styled).mean() > 0.001
        unload_fact(pipe)
        np.testing.assert_array_equal(draw(pipe), styled)
    finally:
        pipe.unload_lora_weights()
        unload_fact(pipe)
    np.testing.assert_array_equal(draw(pipe), base)


class Masked(AttnProcessor2_0, torch.nn.Module):
    """As an IP-Adapter's: it has weights, and takes masks."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.own, self.seen = torch.nn.Parameter(torch.ones(3)), []

    def __call__(self, attn, hidden_states, *args, ip_adapter_masks=None, **more):
        self.seen.append(ip_adapter_masks)
        return super().__call__(attn, hidden_states, *args, **more)


def test_what_another_processor_has_stays_its_own(pipe, files):
    """Its weights in the UNet's state, and its arguments."""
    plain = dict(pipe.unet.attn_processors)
    path = next(name for name in plain if name.endswith("attn2.processor"))
    masked, base = Masked(), draw(pipe)
    pipe.unet.set_attn_processor({**plain, path: masked})
    state = pipe.unet.state_dict()
    assert state[f"{path}.own"].tolist() == [1.0] * 3
    fact = load_fact(pipe, files.adapter, files.encoder)
    try:
        assert pipe.unet.state_dict().keys() == state.keys()
        pipe.unet.load_state_dict({**state, f"{path}.own": torch.full((3,), 2.0)})
        assert masked.own.tolist() == [2.0] * 3
        np.testing.assert_array_equal(
            draw(pipe, cross_attention_kwargs={"ip_adapter_masks": "a mask"}), base
        )
        assert set(masked.seen) == {"a mask"}
        with fact.face(people(fact), GUIDANCE):
            assert np.abs(draw(pipe) - base).mean() > 0.01
    finally:
        unload_fact(pipe)
        pipe.unet.set_attn_processor(plain)


def test_an_error_within_a_block_leaves_nothing_behind(fact, pipe):
    base = draw(pipe)

    def fail(*_):
        raise MemoryError

    norm = pipe.unet.mid_block.attentions[0].transformer_blocks[0].norm2
    hook = norm.register_forward_hook(fail)
    with fact.face(people(fact), GUIDANCE), pytest.raises(MemoryError):
        draw(pipe)
    hook.remove()
    np.testing.assert_array_equal(draw(pipe), base)


def test_what_is_over_or_nested_is_refused(pipe, files):
    fact = load_fact(pipe, files.adapter, files.encoder)
    face = people(fact)
    with fact.face(face, GUIDANCE):
        drawn = draw(pipe)
        with (
            pytest.raises(UserError, match="being drawn already"),
            fact.face(face, GUIDANCE),
        ):
            pass
        np.testing.assert_array_equal(draw(pipe), drawn)
    unload_fact(pipe)
    try:
        for again in (False, True):
            if again:
                load_fact(pipe, files.adapter, files.encoder)
            with (
                pytest.raises(UserError, match="no longer in the pipe"),
                fact.face(face, GUIDANCE),
            ):
                pass
    finally:
        unload_fact(pipe)


@contextlib.contextmanager
def compiled(unet, how: str):
    """By one of the ways that diffusers' users have; the eager backend, which still traces."""
    options = {"backend": "eager", "fullgraph": how != "in place"}
    if how == "wrapped":
        yield torch.compile(unet, **options)
    elif how == "in place":
        unet.compile(**options)
        yield unet
        unet._compiled_call_impl = None
    else:
        unet.compile_repeated_blocks(**options)
        yield unet
        for module in unet.modules():
            module._compiled_call_impl = None
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapped", "in place", "by blocks"])
def test_compiled(fact, pipe, how):
    face, plain = people(fact), draw(pipe)
    with fact.face(face, GUIDANCE):
        wanted = draw(pipe)
    whole = pipe.unet
    with compiled(whole, how) as unet:
        pipe.unet = unet
        try:
            np.testing.assert_allclose(draw(pipe), plain, atol=1e-4)
            with fact.face(face, GUIDANCE):
                np.testing.assert_allclose(draw(pipe), wanted, atol=1e-4)
            np.testing.assert_allclose(draw(pipe), plain, atol=1e-4)
        finally:
            pipe.unet = whole
