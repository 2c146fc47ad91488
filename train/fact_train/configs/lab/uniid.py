"""Do UniID's neutral captions and its strength schedule help?

UniID (arXiv 2512.03964) trains identity under "a photo of a person" alone, rescales the adapter's
increment and lets it grow over the steps. Here: neutral captions in all samples; an increment of at
most 0.3 of what it is added to, with strength from 0.8 to 1.2, at drawing alone. Claim 1: neutral
captions give more similarity to another photo of the person; refuted if it is below FACT's.
Claim 2: the schedule changes less outside the head; refuted if it changes more.
"""

from fact_train.configs.lab.fact import variant
from fact_train.lab.question import Claim, Question

question = Question(
    variants={
        "neutral captions": variant(generic_caption_probability=1.0),
        "cap and schedule": variant(),
    },
    evaluate={"cap and schedule": ("--face-cap", "0.3", "--face-scale", "0.8,1.2")},
    claims=(
        Claim(
            variant="neutral captions",
            measure="another",
            difference="above",
            source="UniID: identity under neutral captions",
        ),
        Claim(
            variant="cap and schedule",
            measure="head/outside",
            difference="below",
            source="UniID: rescaled increments in a schedule",
        ),
    ),
)
