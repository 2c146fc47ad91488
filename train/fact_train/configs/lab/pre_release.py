"""What did FAIR, shuffle and the curriculum add to the recipe that was public before the paper?

The pre-release of February 2024 (facechain's branch ``competition``): no FAIR, no shuffle, the face
dropped with probability 0.1, a constant rate after a long warm-up, decay 0, no EMA. Its linear map
of tokens in the resampler's place is not in this comparison. Claim (FACT, arXiv 2410.12312): it
changes more outside the head, and copies more. Refuted where one of the two is below FACT's.
"""

from dataclasses import replace

from fact_jax.curriculum import Drop
from fact_train.config import EMAConfig
from fact_train.configs.lab.fact import STEPS, stages, variant
from fact_train.lab.question import Claim, Question

_plain = variant(stages=stages(shuffle=0.0, fair=0.0), drop=Drop(face=0.1, text=0.0, both=0.0))

question = Question(
    variants={
        "pre-release": replace(
            _plain,
            ema=EMAConfig(decay=0.0),
            # 10,000 of 312,500 iterations, at the rate that all variants here have.
            optimizer=replace(
                _plain.optimizer, schedule="constant", weight_decay=0.0, warmup_steps=STEPS // 31
            ),
        )
    },
    claims=(
        Claim(
            variant="pre-release",
            measure="head/outside",
            difference="above",
            source="FACT over its pre-release: locality",
        ),
        Claim(
            variant="pre-release",
            measure="copy_paste",
            difference="above",
            source="FACT over its pre-release: no copying",
        ),
    ),
)
