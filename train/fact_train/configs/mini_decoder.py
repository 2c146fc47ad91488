"""A sharper decoder for the miniature: against a discriminator, from what the base predicts.

fact-train run mini_decoder --out runs/mini_decoder

Latents stay what they are, and with them all that was trained on them. Its pictures are sharper
(miniature/README.md has the figures), but the shipped decoder is not this one: of 96 pictures
three were read as of another expression.
"""

import math
from dataclasses import replace

from fact_train.config import CheckpointConfig
from fact_train.configs.mini_vae import config as mini_vae
from fact_train.tasks.vae import VAEOptions

config = replace(
    mini_vae,
    seed=3,
    steps=2000,
    optimizer=replace(
        mini_vae.optimizer,
        learning_rate=3e-4,
        b1=0.5,
        b2=0.99,
        clip_norm=math.inf,
        multipliers=(("^discriminator/", 1.7),),
    ),
    checkpoint=CheckpointConfig(every=500),
    options=VAEOptions(
        people=5000,
        decoder_of="miniature/base/vae",
        predicted_by="miniature/base",
        noise_steps=400,
        adversarial=0.05,
    ),
)
