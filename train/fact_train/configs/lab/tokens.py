"""Do several face tokens carry more of a person than one vector?

Claim (FACT, arXiv 2410.12312): tokens of the face transformer hold details that one embedding has
lost. Here the resampler gives one token in place of 16, so that all goes through one vector.
Refuted if with one token similarity to another photo of the person is above FACT's.
"""

from dataclasses import replace

from fact_train.configs.lab.fact import variant
from fact_train.configs.mini import config as mini
from fact_train.lab.question import Claim, Question

question = Question(
    variants={"one token": variant(resampler=replace(mini.options.resampler, num_queries=1))},
    claims=(
        Claim(
            variant="one token",
            measure="another",
            difference="below",
            source="FACT: tokens, not one embedding",
        ),
    ),
)
