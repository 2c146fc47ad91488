"""Does a first stage without text teach more of the person?

Infinite-ID (arXiv 2403.11781) trains identity with text cross-attention off; its AdaIN-mean moves
face keys and values to the picture's means when drawing. Claim 1: with a first stage without text
(a third of the steps) similarity to another photo of the person is above FACT's; refuted if it is
below. Claim 2: AdaIN-mean, at drawing alone, keeps more of the caption; refuted if fewer captions
are followed.
"""

from dataclasses import replace

from fact_train.configs.lab.fact import ALONE, RAMP, STEPS, stages, variant
from fact_train.lab.question import Claim, Question

_silent = STEPS // 3 - ALONE - RAMP
_alone, _ramp, _rest = stages()
_first = (
    replace(_alone, text="no_cross_attention"),
    replace(_ramp, text="no_cross_attention"),
    replace(_rest, steps=_silent, text="no_cross_attention"),
    replace(_rest, steps=_rest.steps - _silent),
)

question = Question(
    variants={"no text first": variant(stages=_first), "AdaIN-mean": variant()},
    evaluate={"AdaIN-mean": ("--adain",)},
    claims=(
        Claim(
            variant="no text first",
            measure="another",
            difference="above",
            source="Infinite-ID: identity is learned without text",
        ),
        Claim(
            variant="AdaIN-mean",
            measure="caption/all",
            difference="above",
            source="Infinite-ID: AdaIN-mean keeps the text",
        ),
    ),
)
