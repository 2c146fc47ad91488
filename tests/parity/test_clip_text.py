"""The text model against transformers."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPTextConfig, CLIPTextModel

from tests.parity.peers import assert_close, convert, randomize

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_as_transformers(activation):
    peer = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=90,
            hidden_size=24,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act=activation,
            bos_token_id=88,
            eos_token_id=89,
            pad_token_id=89,
        )
    )
    peer = randomize(peer, seed=1)
    ids = np.random.default_rng(2).integers(0, 88, (3, 77))
    ids[:, 0], ids[0, 9:], ids[1, 40:], ids[2, 76] = 88, 89, 89, 89
    graph, state = nnx.split(convert("clip_text", peer))
    ours = jax.jit(lambda s, ids: nnx.merge(graph, s)(ids))(state, ids)
    with torch.no_grad():
        theirs = peer(torch.from_numpy(ids)).last_hidden_state.numpy()
    assert_close(ours, theirs)
