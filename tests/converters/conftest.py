"""Tiny models saved by the real peers, built once."""

import json
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def released_checkpoint() -> Path:
    """A pickled checkpoint in the released layout, with ``.processor.ln.*``."""
    return GOLDEN / "fact_release_layout.ckpt"


@pytest.fixture(scope="session")
def peers():
    """diffusers and transformers models with random weights: unet, vae, clip_text."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=24,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=600,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    return {"unet": unet, "vae": vae, "clip_text": text}


@pytest.fixture(scope="session")
def peer_state(peers):
    """A peer's state dict as numpy, and its configuration as a dict."""

    def get(kind: str) -> tuple[dict[str, np.ndarray], dict]:
        peer = peers[kind]
        config = peer.config.to_dict() if kind == "clip_text" else dict(peer.config)
        return {key: tensor.numpy().copy() for key, tensor in peer.state_dict().items()}, config

    return get


@pytest.fixture(scope="session")
def vocabulary():
    """A small byte-pair vocabulary with a few merges."""
    from tokenizers import pre_tokenizers

    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
        vocab[f"{letter}</w>"] = len(vocab)
    merges = [("a", "n"), ("an", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    return vocab, merges


@pytest.fixture(scope="session")
def pipeline_folder(peers, vocabulary, tmp_path_factory) -> Path:
    """A pipeline folder that diffusers itself wrote."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    vocab, merges = vocabulary
    folder = tmp_path_factory.mktemp("base")
    StableDiffusionPipeline(
        unet=peers["unet"],
        vae=peers["vae"],
        text_encoder=peers["clip_text"],
        tokenizer=CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            skip_prk_steps=True,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def same_bits():
    """Assert that two states hold the same keys, shapes, dtypes and bits."""

    def check(one: dict, other: dict) -> None:
        assert set(one) == set(other)
        for key, array in one.items():
            assert (array.dtype, array.shape) == (other[key].dtype, other[key].shape), key
            assert array.tobytes() == other[key].tobytes(), key

    return check


@pytest.fixture
def resampler_config(golden) -> dict:
    return json.loads(golden("resampler", "state.")[1]["config"])


@pytest.fixture
def unet_config(golden) -> dict:
    return json.loads(golden("unet_adapter", "unet.")[1]["unet_config"])
