"""Do the face transformer's tokens carry more of a person than one vector?

Claim (FACT, arXiv 2410.12312): tokens hold details that one embedding has lost. ``embedding``: the
resampler takes the encoder's last embedding, which ArcFace trained to tell people apart, in the
tokens' place, and makes as many face tokens of it. ``one token``: the resampler takes the tokens
and gives one face token in place of 16. Refuted where similarity to another photo of the person is
above FACT's with one of them.
"""

from dataclasses import replace

from fact_train.configs.lab.fact import variant
from fact_train.configs.mini import config as mini
from fact_train.lab.question import Claim, Question

_resampler = mini.options.resampler

question = Question(
    variants={
        "embedding": variant(resampler=replace(_resampler, embedding=True)),
        "one token": variant(resampler=replace(_resampler, num_queries=1)),
    },
    claims=(
        Claim(
            variant="embedding",
            measure="another",
            difference="below",
            source="FACT: tokens, not the embedding",
        ),
        Claim(
            variant="one token",
            measure="another",
            difference="below",
            source="FACT: several face tokens, not one",
        ),
    ),
)
