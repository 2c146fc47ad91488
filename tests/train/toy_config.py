"""The toy experiment of the engine's tests."""

from tests.train.toy import ToyOptions
from train.config import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig
from train.tasks import TASKS

TASKS["toy"] = ("tests.train.toy", "ToyTask")

config = TrainConfig(
    task="toy",
    steps=60,
    batch_size=8,
    seed=3,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
    checkpoint=CheckpointConfig(every=7, keep=3),
    log=LogConfig(every=10),
    options=ToyOptions(),
)
