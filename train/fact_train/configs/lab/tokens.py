"""Do the face transformer's tokens carry more of a person than one vector?

Claim (FACT, arXiv 2410.12312): tokens hold details that one embedding has lost. ``embedding``: the
resampler takes the encoder's last embedding, which ArcFace trained to tell people apart, in the
tokens' place, and makes as many face tokens of it. ``one token``: the resampler takes the tokens
and gives one face token in place of 16. Refuted where similarity to another photo of the person is
above FACT's with one of them.

``plus`` is FACT+, our proposal: the resampler is trained alone first, until its face tokens tell
the embedding, for trained with the adapter alone it keeps colours and loses shapes (of the eyes'
distance a linear map finds an R2 of 0.90 in the encoder's tokens, 0.45 in the face tokens of the
miniature after 17,000 steps). Claim: similarity to another photo is above FACT's; refuted if it is
below. And at no price: refuted if it copies more, changes more outside the head or follows fewer
captions. ``plus blocks`` takes tokens of several blocks besides (see ``dream_identity``): the first
claim again. Seen before these were written: 600 steps of ``plus`` (0.255 on 48 people), and the
shipped miniature.
"""

from dataclasses import replace

from fact_train.configs.lab.fact import variant
from fact_train.configs.mini import config as mini
from fact_train.lab.question import Claim, Question

_resampler = mini.options.resampler
_PLUS = "FACT-JAX: the resampler learns the embedding first"

question = Question(
    variants={
        "embedding": variant(resampler=replace(_resampler, embedding=True)),
        "one token": variant(resampler=replace(_resampler, num_queries=1)),
        "plus": variant(pretrain_resampler=3000),
        "plus blocks": variant(
            pretrain_resampler=3000, resampler=replace(_resampler, encoder_blocks=(0, 2))
        ),
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
        Claim(variant="plus", measure="another", difference="above", source=_PLUS),
        Claim(variant="plus", measure="copy_paste", difference="below", source=_PLUS),
        Claim(variant="plus", measure="head/outside", difference="below", source=_PLUS),
        Claim(variant="plus", measure="caption/all", difference="above", source=_PLUS),
        Claim(variant="plus blocks", measure="another", difference="above", source=_PLUS),
    ),
)
