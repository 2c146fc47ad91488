"""FACT with an identity loss on the miniature: goes on from the shipped adapter.

fact-train run mini_identity --out runs/mini_identity
fact-train run mini_plus --out runs/mini_plus

No better than the shipped adapter on this base: miniature/README.md has the figures.
"""

from dataclasses import replace

from fact_train.configs.mini import config as mini
from fact_train.tasks.identity_loss import IdentityOptions

STEPS = 2500

config = replace(
    mini,
    steps=STEPS,
    optimizer=replace(mini.optimizer, learning_rate=1e-3),
    options=replace(
        mini.options,
        weights="miniature/adapter/adapter.safetensors",
        stages=(replace(mini.options.stages[-1], steps=STEPS),),
        identity=IdentityOptions(
            encoder="runs/mini_identity/export/encoder", weight=0.5, contrastive=0.1
        ),
    ),
)
