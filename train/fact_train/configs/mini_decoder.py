"""The miniature's decoder, trained on by itself once its encoder and the latents are settled.

fact-train run mini_decoder --out runs/mini_decoder

What ships was made without it.
"""

from dataclasses import replace

from fact_train.configs.mini_vae import config as mini_vae

config = replace(
    mini_vae,
    steps=1200,
    optimizer=replace(mini_vae.optimizer, learning_rate=1e-3),
    ema=replace(mini_vae.ema, decay=0.999),
    options=replace(mini_vae.options, decoder_of="miniature/base/vae"),
)
