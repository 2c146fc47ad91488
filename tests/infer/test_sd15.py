"""The programs once at Stable Diffusion 1.5's full size, on random weights (slow)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipelines import pndm_scheduler, save_pipeline, small_parts

ROOT = Path(__file__).parents[2]
SIDE = 256  # pixels; the weights are full size, the picture a quarter of the usual
FULL_SIZE = {
    "unet": {
        "sample_size": SIDE // 8,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "sample_size": SIDE,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "text": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}


def program(*words) -> str:
    """Run ``python -m`` with these words; its standard error must come with exit code 0."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """``base/``, saved by diffusers itself, and ``encoder/`` (vit_s); 4.5 GB on disk."""
    import torch
    from flax import nnx
    from transformers import CLIPTokenizer

    from fact_convert import Tokenizer, save_encoder
    from fact_convert.models.tokenizer import write_tokenizer
    from fact_jax.models.transface import TransFace, TransFaceConfig
    from fact_jax.portraits.vocabulary import caption_vocabulary

    folder = tmp_path_factory.mktemp("sd15")
    torch.manual_seed(0)
    vocab, merges = caption_vocabulary()
    write_tokenizer(Tokenizer(vocab=vocab, merges=merges), folder / "words")
    parts = small_parts(vocab_size=49408, special=(len(vocab) - 2, len(vocab) - 1), **FULL_SIZE)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    save_pipeline(folder / "base", parts, tokenizer, pndm_scheduler())
    del parts
    save_encoder(TransFace(TransFaceConfig.vit_s(), rngs=nnx.Rngs(0)), folder / "encoder")
    return folder


@pytest.mark.slow
def test_one_training_step_and_one_picture(models, tmp_path):
    run, pictures = tmp_path / "run", tmp_path / "pictures"
    base, encoder = models / "base", models / "encoder"
    program(
        *["fact_train", "run", ROOT / "tests" / "train" / "sd15.py", "--out", run],
        *[f"options.base={base}", f"options.encoder={encoder}"],
    )
    (row,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert row["step"] == 1
    assert np.isfinite([row["loss"], row["gradient_norm"]]).all()
    assert row["skipped"] == 0
    assert row["gradient_norm"] > 0

    program("fact_infer", "portraits", "--people", 1, "--out", tmp_path / "photos")
    (photo,) = (p for p in (tmp_path / "photos").glob("*-0.png"))
    program(
        *[
            "fact_infer",
            "generate",
            "--base",
            base,
            "--encoder",
            encoder,
            "--photo",
            photo,
        ],
        *["--adapter", run / "export" / "adapter.safetensors", "--prompt", "a portrait"],
        *["--sampler", "ddim", "--steps", 2, "--guidance", 5, "--out", pictures],
    )
    (picture,) = pictures.glob("*.png")
    assert Image.open(picture).size == (SIDE, SIDE)
