"""The autoencoder against diffusers."""

import jax
import pytest
import torch
from diffusers import AutoencoderKL
from flax import nnx

from tests.parity.peers import (
    assert_close,
    channels_last,
    convert,
    normal,
    randomize,
    to_torch,
)

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def peer():
    return randomize(
        AutoencoderKL(
            block_out_channels=(8, 16, 24),
            layers_per_block=2,
            latent_channels=5,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        ),
        seed=1,
    )


@pytest.fixture(scope="module")
def vae(peer):
    return nnx.split(convert("vae", peer))


def test_encode_as_diffusers(peer, vae):
    """28 x 20 pixels are 7 x 5 latents: an odd level in both directions."""
    images = normal(2, 3, 28, 20, 3)
    graph, state = vae
    mean, log_variance = jax.jit(lambda s, x: nnx.merge(graph, s).encode(x))(state, images)
    with torch.no_grad():
        theirs = peer.encode(to_torch(images)).latent_dist
    assert mean.shape == (3, 7, 5, 5)
    assert_close(mean, channels_last(theirs.mean))
    assert_close(log_variance, channels_last(theirs.logvar))


def test_decode_as_diffusers(peer, vae):
    latents = normal(3, 3, 7, 4, 5)
    graph, state = vae
    images = jax.jit(lambda s, x: nnx.merge(graph, s).decode(x))(state, latents)
    with torch.no_grad():
        theirs = peer.decode(to_torch(latents)).sample
    assert images.shape == (3, 28, 16, 3)
    assert_close(images, channels_last(theirs))
