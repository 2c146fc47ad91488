"""The full-size models: their parameters counted, and the adapted UNet against its peer (slow)."""

import types

import jax
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from flax import nnx

from fact_convert.weights import abstract_state
from fact_jax.models.clip_text import CLIPTextConfig
from fact_jax.models.controlnet import ControlNetConfig
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.models.transface import TransFaceConfig
from fact_jax.models.unet import UNetConfig
from fact_jax.models.vae import VAEConfig
from tests.parity.peers import (
    assert_close,
    channels_last,
    convert,
    normal,
    randomize,
    to_torch,
)
from tests.parity.reference import adapted, random_adapters

pytestmark = pytest.mark.heavy


def count(kind: str, config, mark: str = "") -> int:
    """Trainable numbers of the layers whose path contains ``mark``; nothing is computed."""
    _, variables = abstract_state(kind, config)
    return sum(
        int(np.prod(var.get_value().shape))
        for path, var in variables.items()
        if mark in path and isinstance(var, nnx.Param)
    )


@pytest.mark.parametrize(
    ("kind", "config", "millions"),
    [
        ("unet", UNetConfig.sd15(), 859.52),
        ("controlnet", ControlNetConfig.sd15(), 361.28),
        ("vae", VAEConfig.sd15(), 83.65),
        ("clip_text", CLIPTextConfig.sd15(), 123.06),
        ("transface", TransFaceConfig.vit_s(), 86.66),
        ("resampler", ResamplerConfig.sd15(), 47.49),
    ],
)
def test_parameters_by_kind(kind, config, millions):
    assert count(kind, config) == pytest.approx(1e6 * millions, abs=5e3)


def test_parameters_of_the_adapters():
    config = UNetConfig.sd15(face_dim=768)
    assert count("unet", config, ".face.") == pytest.approx(208.02e6, abs=5e3)
    assert count("unet", config, ".face.alpha_attn") == 16
    assert count("unet", config) - count("unet", config, ".face.") == count(
        "unet", UNetConfig.sd15()
    )


@pytest.fixture(scope="module")
def full():
    """A peer of diffusers' own default size, 16 adapters, and what they answer; needs 12 GB."""
    torch.manual_seed(0)
    peer = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    randomize(peer, seed=1)
    adapters = random_adapters(peer, 768, seed=2)
    assert sum(key.endswith("alpha_attn") for key in adapters) == 16
    # So large that the upper levels are computed by minimal filtering and by tiled attention.
    inputs = normal(3, 2, 64, 72, 4), np.array([801, 37]), normal(4, 2, 77, 768)
    face = normal(5, 2, 48, 768)
    with torch.no_grad():
        base = channels_last(peer(*map(to_torch, inputs)).sample)
        with adapted(peer, adapters, torch.from_numpy(face), 0.7):
            with_face = channels_last(peer(*map(to_torch, inputs)).sample)
    unet = convert("unet", peer, adapters)
    return types.SimpleNamespace(
        unet=nnx.split(unet), inputs=inputs, face=face, base=base, with_face=with_face
    )


@pytest.mark.slow
def test_plain_unet_as_diffusers(full):
    graph, state = full.unet
    run = jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))
    assert_close(run(state, *full.inputs), full.base)


@pytest.mark.slow
def test_adapted_unet_as_the_equations(full):
    """Three photos at scale 0.7; at scale 0 nothing of them is left."""
    graph, state = full.unet

    @jax.jit
    def run(state, scale, face, *inputs):
        return nnx.merge(graph, state)(*inputs, face=face, face_scale=scale)

    assert_close(run(state, 0.7, full.face, *full.inputs), full.with_face)
    assert np.abs(full.with_face - full.base).max() > 0.1
    assert_close(run(state, 0.0, full.face, *full.inputs), full.base)
