"""Do features of several scales, and pairs that the base draws itself, help?

DreamIdentity (arXiv 2307.00300) takes features of several blocks of the face transformer, and
trains on pairs of a face and the base's own edit of its picture. Here: the tokens of encoder blocks
0 and 2 (of 0 to 3) before those of the last; and a quarter of the photos, noised and drawn again by
the base under the caption of the person's next photo (it knows no names to draw people by; 0.72 of
the likeness is left). Claim 1: more blocks give more similarity to another photo of the person;
refuted if it is below FACT's. Claim 2: with edits more captions are followed; refuted if fewer are.
"""

from dataclasses import replace

from fact_train.configs.lab.fact import variant
from fact_train.configs.mini import config as mini
from fact_train.lab.question import Claim, Question

question = Question(
    variants={
        "several blocks": variant(
            resampler=replace(mini.options.resampler, encoder_blocks=(0, 2)),
        ),
        "edited pairs": variant(edited=0.25),
    },
    claims=(
        Claim(
            variant="several blocks",
            measure="another",
            difference="above",
            source="DreamIdentity: features of several scales",
        ),
        Claim(
            variant="edited pairs",
            measure="caption/all",
            difference="above",
            source="DreamIdentity: self-augmented pairs keep the text",
        ),
    ),
)
