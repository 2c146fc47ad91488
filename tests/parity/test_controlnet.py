"""ControlNet and the UNet that it steers, against diffusers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from flax import nnx

from fact_convert.models.controlnet import load_controlnet, save_controlnet
from fact_jax.models.controlnet import ControlNetConfig
from fact_jax.utils.errors import UserError
from tests.parity.peers import assert_close, channels_last, convert, normal, randomize, to_torch

pytestmark = pytest.mark.heavy

CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
CASES = {
    "two levels, 1 x 1 convolutions, pictures 4 times as large": {
        "shared": {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "down_block_types": (CROSS[0],) * 2,
        },
        "own": {"conditioning_embedding_out_channels": (4, 6, 8), "conditioning_channels": 3},
        "size": (12, 20),
        "timesteps": np.array([999, 1, 500]),
        "scale": np.array([1.0, 0.5, 0.25], np.float32),
    },
    "two layers a level, linear layers, odd sizes, heads by level, one channel": {
        "shared": {
            "block_out_channels": (8, 16),
            "layers_per_block": 2,
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "down_block_types": (CROSS[0], "DownBlock2D"),
        },
        "own": {"conditioning_embedding_out_channels": (5, 8), "conditioning_channels": 1},
        "size": (5, 7),
        "timesteps": np.array([998.9, 0.25, 499.5], np.float32),
        "scale": np.array([0.7, 0.7, 0.7], np.float32),
    },
}


def not_zero(peer: ControlNetModel) -> ControlNetModel:
    """Convolutions that start at zero would hide everything before them."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for weight in peer.parameters():
            if weight.ndim == 4 and not weight.any():
                fan_in = weight[0].numel()
                weight += torch.randn(weight.shape, generator=generator) / fan_in**0.5
    return peer


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request):
    """Peers, ours of the same weights, and inputs."""
    case = types.SimpleNamespace(**request.param)
    sizes = {"norm_num_groups": 4, "cross_attention_dim": 24, **case.shared}
    case.peer = not_zero(randomize(ControlNetModel(**sizes, **case.own), seed=2))
    case.ours = convert("controlnet", case.peer)
    case.inputs = normal(4, 3, *case.size, 4), case.timesteps, normal(5, 3, 11, 24)
    stride = case.ours.config.stride
    channels = case.own["conditioning_channels"]
    case.picture = np.abs(normal(6, 3, *(stride * n for n in case.size), channels))
    return case


def test_residuals_as_diffusers(case):
    scale = torch.from_numpy(case.scale)[:, None, None, None]
    with torch.no_grad():
        down, middle = case.peer(
            *map(to_torch, case.inputs),
            to_torch(case.picture),
            conditioning_scale=scale,
            return_dict=False,
        )
    graph, state = nnx.split(case.ours)

    @jax.jit
    def run(state, picture, scale, *inputs):
        model = nnx.merge(graph, state)
        return model(*inputs, model.embed(picture), scale)

    ours = run(state, case.picture, case.scale, *case.inputs)
    assert len(ours[0]) == len(down)
    for one, other in zip((*ours[0], ours[1]), (*down, middle), strict=True):
        assert_close(one, channels_last(other))


def test_steered_unet_as_diffusers():
    """Skips of 5 x 7 and 3 x 4, each with a residual of its own."""
    peer = UNet2DConditionModel(
        sample_size=16,
        norm_num_groups=4,
        cross_attention_dim=24,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=2,
        down_block_types=(CROSS[0], "DownBlock2D"),
        up_block_types=("UpBlock2D", CROSS[1]),
    )
    peer = randomize(peer, seed=1)
    inputs = normal(4, 3, 5, 7, 4), np.array([999, 1, 500]), normal(5, 3, 11, 24)
    sizes = [(5, 7, 8)] * 2 + [(3, 4, 8), (3, 4, 16)]
    down = tuple(normal(10 + i, 3, *size) for i, size in enumerate(sizes))
    middle = normal(20, 3, 3, 4, 16)
    with torch.no_grad():
        steered = peer(
            *map(to_torch, inputs),
            down_block_additional_residuals=tuple(map(to_torch, down)),
            mid_block_additional_residual=to_torch(middle),
        ).sample
    graph, state = nnx.split(convert("unet", peer))

    @jax.jit
    def run(state, residuals, *inputs):
        return nnx.merge(graph, state)(*inputs, residuals=residuals)

    assert_close(run(state, (down, middle), *inputs), channels_last(steered))
    with pytest.raises(UserError, match="another UNet or for other latents: 4 of them, 5 wanted"):
        run(state, (down[1:], middle), *inputs)


def test_folders_of_diffusers(case, tmp_path):
    """Opened as diffusers wrote it, written so that diffusers opens it: the same bits."""
    case.peer.save_pretrained(tmp_path / "theirs")
    ours = load_controlnet(tmp_path / "theirs")
    assert ours.config == case.ours.config
    save_controlnet(ours, tmp_path / "ours")
    again = ControlNetModel.from_pretrained(tmp_path / "ours").state_dict()
    state = case.peer.state_dict()
    assert list(again) == list(state)
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_what_does_not_fit_is_said(case):
    with pytest.raises(UserError, match="must be multiples of"):
        case.ours.embed(jnp.ones((1, 9, 8, case.own["conditioning_channels"])))
    small = jnp.ones((1, 4, 4, case.shared["block_out_channels"][0]))
    with pytest.raises(UserError, match="another size than the portrait"):
        case.ours(*map(jnp.asarray, case.inputs), small)
    with pytest.raises(UserError, match="controlnet_conditioning_channel_order='bgr'"):
        ControlNetConfig.from_dict({"controlnet_conditioning_channel_order": "bgr"})
