"""The miniature's metric networks, which only evaluation uses.

fact-train run mini_judge --out runs/mini_judge

The shipped recogniser and parser were trained so; facial features take more people, with fewer
photos of each.

fact-train run mini_judge --out runs/mini_features "options.networks=('features',)" \
    options.people=9000 options.photos=2 steps=1500
"""

from fact_train.config import CheckpointConfig, EMAConfig, LogConfig, OptimizerConfig, TrainConfig
from fact_train.tasks.metric_networks import MetricNetworksOptions

config = TrainConfig(
    task="judge",
    steps=1000,
    batch_size=64,
    optimizer=OptimizerConfig(
        learning_rate=2e-3, weight_decay=1e-2, warmup_steps=100, schedule="cosine", clip_norm=5.0
    ),
    ema=EMAConfig(decay=0.99),
    checkpoint=CheckpointConfig(every=500),
    log=LogConfig(every=25),
    options=MetricNetworksOptions(),
)
