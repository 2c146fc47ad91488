"""What did FAIR, shuffle, curriculum and resampler add to what was public before the paper?

The pre-release of February 2024 (facechain's branch ``competition``): no FAIR, no shuffle, the face
dropped with probability 0.1, a constant rate after a long warm-up, decay 0, no EMA, and a linear
map over the encoder's tokens in the resampler's place, 1.36 times as many face tokens as it takes
(196 of 144; 49 of 36 here). Not as there: its map's batch normalisation (our input is whitened at
the start instead), faces dropped for a whole batch, flips. Claim 1 (FACT, arXiv 2410.12312): it
changes more outside the head. Claim 2: it copies more. Refuted where one is below FACT's. Claim 3:
the linear map alone, all else as FACT, gives less similarity to another photo of the person;
refuted if it gives more.
"""

from dataclasses import replace

from fact_jax.curriculum import Drop
from fact_jax.models.transface import TransFaceConfig
from fact_train.config import EMAConfig
from fact_train.configs.lab.fact import STEPS, stages, variant
from fact_train.configs.mini import config as mini
from fact_train.lab.question import Claim, Question

_tokens = TransFaceConfig.mini().tokens
_linear = replace(
    mini.options.resampler, input_tokens=_tokens, num_queries=round(_tokens * 196 / 144)
)
_plain = variant(
    stages=stages(shuffle=0.0, fair=0.0),
    drop=Drop(face=0.1, text=0.0, both=0.0),
    resampler=_linear,
)

question = Question(
    variants={
        "pre-release": replace(
            _plain,
            ema=EMAConfig(decay=0.0),
            # 10,000 of 312,500 iterations, at the rate that all variants here have.
            optimizer=replace(
                _plain.optimizer, schedule="constant", weight_decay=0.0, warmup_steps=STEPS // 31
            ),
        ),
        "linear map": variant(resampler=_linear),
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
        Claim(
            variant="linear map",
            measure="another",
            difference="below",
            source="FACT over its pre-release: a resampler",
        ),
    ),
)
