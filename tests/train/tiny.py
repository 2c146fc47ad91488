"""A random miniature, small enough to train in a test: written and read by the real converters."""

import dataclasses
from pathlib import Path

from fact_convert import Pipeline, Tokenizer, save_encoder, save_pipeline
from fact_jax.curriculum import Stage
from fact_jax.diffusion.noise_schedules import NoiseSchedule
from fact_jax.models.clip_text import CLIPTextConfig
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.models.transface import TransFaceConfig
from fact_jax.models.unet import UNetConfig
from fact_jax.models.vae import VAEConfig
from fact_jax.portraits.vocabulary import caption_vocabulary
from fact_train.config import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig
from fact_train.tasks.adapter import AdapterOptions
from tests.models import random_model

RESAMPLER = ResamplerConfig(
    dim=16, depth=1, dim_head=8, heads=2, num_queries=4, embedding_dim=16, output_dim=12
)


def write_tiny_miniature(folder: Path) -> None:
    """``base/`` (16 x 16 pictures, 8 x 8 latents, two adapted blocks) and ``encoder/``."""
    vocab, merges = caption_vocabulary()
    text = dataclasses.replace(
        CLIPTextConfig.mini(len(vocab)),
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    unet = UNetConfig(
        sample_size=8,
        block_out_channels=(8,),
        down_attention=(True,),
        up_attention=(False,),
        layers_per_block=1,
        cross_attention_dim=12,
        heads=(2,),
        norm_num_groups=4,
    )
    vae = VAEConfig(
        sample_size=16, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2
    )
    encoder = TransFaceConfig(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=8
    )
    pipeline = Pipeline(
        unet=random_model("unet", unet),
        vae=random_model("vae", vae),
        text_encoder=random_model("clip_text", text),
        tokenizer=Tokenizer(vocab=vocab, merges=merges, model_max_length=32),
        schedule=NoiseSchedule.mini(),
    )
    save_pipeline(pipeline, folder / "base")
    save_encoder(random_model("transface", encoder), folder / "encoder")


def tiny_config(folder: Path, **options) -> TrainConfig:
    """The adapter task on that miniature: a few steps, every loss term and drop at work."""
    stages = (
        Stage(steps=4, shuffle=(0.0, 0.5), fair_weight=(0.01, 0.02)),
        Stage(steps=4, shuffle=(0.5, 0.9), fair_weight=(0.02, 0.02), ramp="cosine"),
    )
    return TrainConfig(
        task="adapter",
        steps=8,
        batch_size=4,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=4),
        log=LogConfig(samples_every=None),  # pictures take longer to compile than the step
        options=AdapterOptions(
            base=str(folder / "base"),
            encoder=str(folder / "encoder"),
            resampler=RESAMPLER,
            people=5,
            photos=3,
            stages=stages,
            **options,
        ),
    )
