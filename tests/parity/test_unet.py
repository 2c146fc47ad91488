"""The UNet, plain and adapted, against diffusers and the adapter's equations."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from flax import nnx

from tests.parity.peers import (
    assert_close,
    channels_last,
    convert,
    normal,
    randomize,
    to_torch,
)
from tests.parity.reference import SHAPES, adapted, face_adapter, random_adapters, weights_under

pytestmark = pytest.mark.heavy

FACE_DIM = 20
CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
CASES = {
    "two levels, 1 x 1 convolutions, 3 photos": {
        "config": {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "use_linear_projection": False,
            "down_block_types": (CROSS[0],) * 2,
            "up_block_types": (CROSS[1],) * 2,
        },
        "size": (12, 20),
        "timesteps": np.array([999, 1, 500]),
        "photos": 3,
        "scale": np.array([1.0, 0.5, 0.25], np.float32),
    },
    # The skips are 9 x 11, 5 x 6 and 3 x 3: nearest neighbours of sizes that do not double.
    "three levels, linear layers, odd sizes, heads by level, 1 photo": {
        "config": {
            "block_out_channels": (8, 16, 24),
            "layers_per_block": 2,
            "attention_head_dim": (2, 4, 3),
            "use_linear_projection": True,
            "down_block_types": (CROSS[0], "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", CROSS[1]),
        },
        "size": (9, 11),
        "timesteps": np.array([998.9, 0.25, 499.5], np.float32),
        "photos": 1,
        "scale": np.array([0.7, 0.7, 0.7], np.float32),
    },
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request):
    """A peer, adapters for it, both in our UNet, and inputs."""
    case = types.SimpleNamespace(**request.param)
    peer = UNet2DConditionModel(
        sample_size=16, norm_num_groups=4, cross_attention_dim=24, **case.config
    )
    case.peer = randomize(peer, seed=1)
    case.adapters = random_adapters(peer, FACE_DIM, seed=2)
    case.unet = convert("unet", peer, case.adapters)
    case.inputs = normal(3, 3, *case.size, 4), case.timesteps, normal(4, 3, 11, 24)
    case.face = normal(5, 3, 16 * case.photos, FACE_DIM)
    return case


def run_peer(case) -> np.ndarray:
    with torch.no_grad():
        return channels_last(case.peer(*map(to_torch, case.inputs)).sample)


def test_plain_as_diffusers(case):
    graph, state = nnx.split(case.unet)

    @jax.jit
    def run(state, latents, timesteps, text):
        return nnx.merge(graph, state)(latents, timesteps, text)

    assert_close(run(state, *case.inputs), run_peer(case))


def test_adapted_as_the_equations(case):
    """The prediction, and what FAIR sees of every block: its input, its increment, its size."""
    graph, state = nnx.split(case.unet)
    sizes = []

    def keep(x, increment, size):
        sizes.append(size)
        return x, increment

    @jax.jit
    def run(state, latents, timesteps, text, face, scale):
        unet = nnx.merge(graph, state)
        return unet(latents, timesteps, text, face, face_scale=scale, on_increment=keep)

    ours, seen = run(state, *case.inputs, case.face, case.scale)
    scale = torch.from_numpy(case.scale)[:, None, None]
    with adapted(case.peer, case.adapters, torch.from_numpy(case.face), scale) as passed:
        theirs = run_peer(case)
    assert_close(ours, theirs)
    assert np.abs(theirs - run_peer(case)).max() > 0.1
    assert len(seen) == len(passed) == len(case.adapters) // len(SHAPES)
    for (x, increment), (before, after), (h, w) in zip(seen, passed, sizes, strict=True):
        assert x.shape[1] == h * w
        assert_close(x, before.numpy())
        assert_close(increment, (after - before).numpy())
    assert sizes[0] == case.size


def test_one_adapter_as_its_equations(case):
    """Face tokens and their keys are the same condition; 5 x 7 visual tokens, heads of width 4."""
    name, block = next(iter(case.unet.transformer_blocks()))
    weights = weights_under(case.adapters, name)
    x = normal(6, 3, 35, weights["linear.bias"].shape[0])
    ours, increment = block.face(jnp.asarray(x), block.face.keys(jnp.asarray(case.face)), 0.8)
    face = torch.from_numpy(case.face)
    theirs = face_adapter(weights, torch.from_numpy(x), face, block.attn1.heads, 0.8).numpy()
    assert_close(ours, theirs)
    assert_close(increment, theirs - x)
