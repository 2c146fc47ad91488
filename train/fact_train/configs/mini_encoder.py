"""The miniature's face encoder: a TransFace of four blocks, trained with ArcFace.

fact-train run mini_encoder --out runs/mini_encoder
"""

from fact_train.config import CheckpointConfig, EMAConfig, LogConfig, OptimizerConfig, TrainConfig
from fact_train.tasks.face_encoder import EncoderOptions

config = TrainConfig(
    task="encoder",
    steps=800,
    batch_size=64,
    optimizer=OptimizerConfig(
        learning_rate=1e-3, weight_decay=5e-2, warmup_steps=80, schedule="cosine", clip_norm=5.0
    ),
    ema=EMAConfig(decay=0.0),
    checkpoint=CheckpointConfig(every=200),
    log=LogConfig(every=20),
    options=EncoderOptions(),
)
