"""A tiny base folder that diffusers itself wrote, and a random face adapter that fits it."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

POINTS = [[24.0, 28.0], [41.0, 27.0], [33.0, 38.0], [26.0, 46.0], [40.0, 45.0]]
FACE_TOKENS, FACE_DIM = 5, 20


class Files(NamedTuple):
    """What a generation is given on the command line."""

    base: Path
    adapter: Path
    encoder: Path
    photo: Path
    other_photo: Path


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """UNet of two levels, VAE that halves once, text encoder and tokenizer; 32 x 32 pictures."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from converters.tokenizer import Tokenizer, write_tokenizer
    from fact_jax.portraits.tokens import caption_vocabulary

    torch.manual_seed(0)
    vocab, merges = caption_vocabulary()
    words = tmp_path_factory.mktemp("words")
    write_tokenizer(Tokenizer(vocab=vocab, merges=merges), words)
    pipe = StableDiffusionPipeline(
        unet=UNet(
            sample_size=16,
            in_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=24,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocab),
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=len(vocab) - 2,
                eos_token_id=len(vocab) - 1,
                pad_token_id=len(vocab) - 1,
            )
        ),
        tokenizer=CLIPTokenizer.from_pretrained(words),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            set_alpha_to_one=False,
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("base")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def files(base_folder, tmp_path_factory) -> Files:
    """The base with a random adapter, its gates open, an encoder, and two photos with points."""
    import dataclasses

    from flax import nnx

    from converters.adapter import save_adapter
    from converters.encoder import save_encoder
    from converters.readers import read_json
    from fact_jax.models.resampler import Resampler, ResamplerConfig
    from fact_jax.models.transface import TransFace, TransFaceConfig
    from fact_jax.models.unet import UNet, UNetConfig

    folder = tmp_path_factory.mktemp("face")
    config = UNetConfig.from_dict(read_json(base_folder / "unet" / "config.json"))
    unet = UNet(dataclasses.replace(config, face_dim=FACE_DIM), rngs=nnx.Rngs(1))
    for i, (_, block) in enumerate(unet.transformer_blocks()):
        block.face.alpha_attn[...] = 1.0 - 0.1 * i
        block.face.alpha_dense[...] = 0.8 + 0.1 * i
    resampler = ResamplerConfig(
        dim=16,
        depth=2,
        dim_head=8,
        heads=2,
        num_queries=FACE_TOKENS,
        embedding_dim=16,
        output_dim=FACE_DIM,
    )
    save_adapter(unet, Resampler(resampler, rngs=nnx.Rngs(2)), folder / "adapter.safetensors")
    encoder = TransFaceConfig(
        img_size=32, patch_size=9, embed_dim=16, depth=2, num_heads=2, num_classes=8
    )
    save_encoder(TransFace(encoder, rngs=nnx.Rngs(3)), folder / "encoder")
    photos = []
    for name, seed in (("one", 0), ("two", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
        photos.append(folder / f"{name}.png")
        Image.fromarray(pixels).resize((64, 72), Image.Resampling.BICUBIC).save(photos[-1])
        sidecar = photos[-1].with_suffix(".points.json")
        sidecar.write_text(json.dumps({"points": POINTS}))
    return Files(base_folder, folder / "adapter.safetensors", folder / "encoder", *photos)
