"""The miniature's autoencoder: 128 x 128 portraits to 16 x 16 x 12 latents.

fact-train run mini_vae --out runs/mini_vae

With ``options.decoder_of=miniature/base/vae`` the shipped one's decoder alone learns on, and the
latents stay what they are.
"""

from fact_train.config import CheckpointConfig, EMAConfig, LogConfig, OptimizerConfig, TrainConfig
from fact_train.tasks.vae import VAEOptions

config = TrainConfig(
    task="vae",
    steps=3000,
    batch_size=8,
    optimizer=OptimizerConfig(
        learning_rate=2e-3, weight_decay=1e-4, warmup_steps=100, schedule="cosine"
    ),
    ema=EMAConfig(decay=0.998),
    checkpoint=CheckpointConfig(every=1000),
    log=LogConfig(every=50, samples_every=500),
    options=VAEOptions(),
)
