"""Is FACT+ better than FACT, and at no price?

FACT's resampler starts at random and meets its task through a frozen UNet. In FACT+ it learns alone
first, 3,000 steps of 64 photos, to give face tokens of which a linear map tells the encoder's
embedding. Claim: more similarity to another photo of the person; refuted if it is below FACT's. And
at no price: refuted if it copies more, changes more outside the head or follows fewer captions.
``fact plus blocks`` also takes tokens of several blocks of the encoder (DreamIdentity's way), with
the same claim. Seen before these claims were written: a pilot of 600 steps (0.255 on 48 people),
and the shipped miniature, whose adapter went on training with such a resampler.
"""

from dataclasses import replace

from fact_train.configs.lab.fact import variant
from fact_train.configs.mini import config as mini
from fact_train.lab.question import Claim, Question

_ALONE = 3000
_SOURCE = "FACT+: the resampler learns alone first"
_blocks = replace(mini.options.resampler, encoder_blocks=(0, 2))

question = Question(
    variants={
        "fact plus": variant(pretrain_resampler=_ALONE),
        "fact plus blocks": variant(pretrain_resampler=_ALONE, resampler=_blocks),
    },
    claims=(
        Claim(variant="fact plus", measure="another", difference="above", source=_SOURCE),
        Claim(variant="fact plus", measure="copy_paste", difference="below", source=_SOURCE),
        Claim(variant="fact plus", measure="head/outside", difference="below", source=_SOURCE),
        Claim(variant="fact plus", measure="caption/all", difference="above", source=_SOURCE),
        Claim(
            variant="fact plus blocks",
            measure="another",
            difference="above",
            source=f"{_SOURCE}; tokens of several blocks",
        ),
    ),
)
