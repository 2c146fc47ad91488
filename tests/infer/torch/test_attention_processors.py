"""Adapters in diffusers' own UNet: the released code's values, and nothing left behind."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from fact_infer.parts import check_fit, read_base, read_face_models
from fact_infer.torch.attention_processors import FaceContext, FaceProcessor, installed, text_blocks
from fact_infer.torch.models import Resampler, encoder_from, load_strictly
from fact_jax.fact import Guidance
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.models.transface import TransFaceConfig
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy


def part(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return {k: v.astype(np.float32) for k, v in found.items()}


@pytest.fixture
def adapted(golden):
    """The golden UNet with its adapters installed, the context, and the golden tensors."""
    tensors, facts = golden("unet_adapter", "")
    config = json.loads(facts["unet_config"])
    unet = UNet2DConditionModel.from_config(config)
    load_strictly(unet, part(tensors, "unet."), "unet")
    context = FaceContext()
    states = part(tensors, "adapter.")
    for path, block in text_blocks(unet):
        state = part(states, f"{path}.attn2.processor.")
        processor = FaceProcessor(block.attn2.to_q.in_features, block.attn2.heads, 24)
        load_strictly(processor, state, path).install(path, block, context)
    return unet, context, {k: torch.from_numpy(v) for k, v in tensors.items()}


def predict(unet, tensors) -> torch.Tensor:
    with torch.no_grad():
        return unet(
            tensors["in.latents"],
            tensors["in.timesteps"],
            encoder_hidden_states=tensors["in.text"],
            return_dict=False,
        )[0]


def test_noise_prediction_of_the_released_code(adapted):
    unet, context, tensors = adapted
    with torch.no_grad():
        for processor in installed(unet).values():
            processor.keys = processor.face_keys(tensors["in.face"])
    context.scale = torch.tensor(1.0)
    ours = predict(unet, tensors)
    torch.testing.assert_close(ours, tensors["out.noise_pred"], atol=1e-4, rtol=0)
    assert (ours - tensors["out.base_noise_pred"]).abs().max() > 0.1
    context.scale = torch.tensor(0.0)
    zero = predict(unet, tensors)
    context.scale = None
    silent = predict(unet, tensors)
    for processor in installed(unet).values():
        processor.keys = None
    absent = predict(unet, tensors)
    for processor in installed(unet).values():
        processor.remove()
    plain = predict(unet, tensors)
    assert torch.equal(zero, plain)
    assert torch.equal(silent, plain)
    assert torch.equal(absent, plain)
    torch.testing.assert_close(plain, tensors["out.base_noise_pred"], atol=1e-4, rtol=0)


def test_copy_of_the_base_norm_wins_where_there_is_a_face(adapted):
    """Released files hold the blocks' ``norm2`` again, and loaded last it counted."""
    unet, context, tensors = adapted
    plain = predict(unet, tensors)
    for processor in installed(unet).values():
        (width,) = processor.norm1.normalized_shape
        processor.ln = torch.nn.LayerNorm(width)
        torch.nn.init.normal_(processor.ln.weight)
        processor.remove()
        processor.install(processor.path, *processor._block, context)
    assert torch.equal(predict(unet, tensors), plain)
    for processor in installed(unet).values():
        processor.keys = ()
    armed = predict(unet, tensors)
    copies = {path: processor.ln for path, processor in installed(unet).items()}
    for processor in installed(unet).values():
        processor.remove()
    for path, block in text_blocks(unet):
        block.norm2 = copies[path]
    assert (armed - plain).abs().max() > 0.01
    assert torch.equal(armed, predict(unet, tensors))


def test_encoder_and_resampler_of_the_released_code(golden):
    tensors, facts = golden("transface", "")
    config = TransFaceConfig.from_dict(json.loads(facts["config"]))
    encoder = encoder_from(part(tensors, "state."), config, "transface")
    image = torch.from_numpy(tensors["in.image"])
    local = torch.from_numpy(tensors["out.local"])
    torch.testing.assert_close(encoder(image), local, atol=1e-4, rtol=0)

    tensors, facts = golden("resampler", "")
    resampler = Resampler(ResamplerConfig.from_dict(json.loads(facts["config"])))
    load_strictly(resampler, part(tensors, "state."), "resampler")
    tokens = torch.from_numpy(tensors["in.tokens"])
    wanted = torch.from_numpy(tensors["out.face_tokens"])
    torch.testing.assert_close(resampler(tokens), wanted, atol=1e-4, rtol=0)
    null = torch.from_numpy(tensors["out.null_face_tokens"])
    torch.testing.assert_close(resampler(torch.zeros_like(tokens)), null, atol=1e-4, rtol=0)


def test_every_wrong_key_is_listed():
    layer = torch.nn.Linear(2, 3)
    state = {"weight": np.zeros((2, 3), np.float32), "gain": np.zeros(1, np.float32)}
    with pytest.raises(UserError) as caught:
        load_strictly(layer, state, "file")
    assert str(caught.value) == (
        "file: 1 missing (bias); 1 unexpected (gain); 1 misshapen (weight (2, 3) instead of (3, 2))"
    )


def test_adapter_for_another_base_is_refused_before_weights_are_read(files):
    face = read_face_models(files.adapter, files.encoder)
    base = read_base(files.base)
    check_fit(base, face)
    longer = dataclasses.replace(base.unet, block_out_channels=(8, 24))
    wider = dataclasses.replace(base.unet, cross_attention_dim=32)
    for unet, error in (
        (longer, r"blocks of channels 8, 16, 8, 8, .* has 4 .* channels 8, 24, 8, 8$"),
        (wider, "its text is 24 wide, that of .* 32$"),
    ):
        with pytest.raises(UserError, match=error):
            check_fit(dataclasses.replace(base, unet=unet), face)
    forged = dataclasses.replace(face, metadata={"config": {"unet": 24}})
    with pytest.raises(UserError, match=r"metadata 'config' does not hold an object 'unet'$"):
        check_fit(base, forged)


def test_no_adapter_is_said_in_one_line(files):
    from fact_infer.torch.adapter import load_fact

    with pytest.raises(UserError, match="no adapter is named"):
        load_fact(None, encoder=files.encoder)


def test_unloaded_pipe_is_the_same_pipe(files):
    from fact_infer.torch.adapter import load_fact, unload_fact
    from fact_infer.torch.pipeline import TorchPipeline

    pipe = TorchPipeline.load(files.base).pipe
    pipe.set_progress_bar_config(disable=True)
    modules = dict(pipe.unet.named_modules())
    processors = dict(pipe.unet.attn_processors)
    state = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def draw(steps: int = 2) -> np.ndarray:
        return pipe(
            "a man", num_inference_steps=steps, latents=noise, guidance_scale=3.0, output_type="np"
        ).images

    before = draw()
    fact = load_fact(pipe, files.adapter, files.encoder)
    assert list(pipe.unet.state_dict()) == list(state)
    assert any(".attn2.processor.alpha_attn" in key for key, _ in pipe.unet.named_parameters())
    with pytest.raises(UserError, match="has a face adapter already"):
        load_fact(pipe, files.adapter, files.encoder)
    np.testing.assert_array_equal(draw(), before)
    face = fact.face_tokens(np.zeros((1, 1, 32, 32, 3), np.uint8))
    with fact.face(face, Guidance(text=3.0), [1.0, 1.0]):
        assert np.abs(draw() - before).mean() > 0.01
    with pytest.raises(UserError, match="more steps"), fact.face(face, Guidance(text=3.0), [1.0]):
        draw()
    np.testing.assert_array_equal(draw(), before)
    unload_fact(pipe)
    np.testing.assert_array_equal(draw(), before)
    assert {path: id(m) for path, m in modules.items()} == {
        path: id(m) for path, m in pipe.unet.named_modules()
    }
    assert {path: id(p) for path, p in processors.items()} == {
        path: id(p) for path, p in pipe.unet.attn_processors.items()
    }
    after = pipe.unet.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], tensor) for key, tensor in state.items())
    for module in pipe.unet.modules():
        assert not {"forward", "set_processor", "get_processor"} & set(vars(module))
        assert not [*module._forward_hooks, *module._forward_pre_hooks]
        assert not module._state_dict_hooks
