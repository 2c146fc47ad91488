"""The network of the miniature's identity loss: other people and another start than the encoder's.

fact-train run mini_identity --out runs/mini_identity
"""

from dataclasses import replace

from fact_train.configs.mini_encoder import config as mini_encoder

config = replace(
    mini_encoder,
    seed=1,
    steps=1000,
    # Blurred, for it looks at predicted pictures, which are less sharp than drawn ones.
    options=replace(mini_encoder.options, split="base", people=3000, blur=0.7),
)
