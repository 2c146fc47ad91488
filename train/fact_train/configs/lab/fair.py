"""Does FAIR keep the rest of the picture as the base draws it, and at what price?

Claim (FACT, arXiv 2410.12312): without FAIR the adapter changes what is outside the face. Refuted
if without it the change of pixels outside the head is below FACT's, the 95 % interval of the
difference without 0. Weights from 0.001 to 1 tell where identity is lost: at 1 similarity to
another photo of the person is claimed to be below FACT's.
"""

from fact_train.configs.lab.fact import stages, variant
from fact_train.lab.question import Claim, Question

WEIGHTS = {"fair 0": 0.0, "fair 0.001": 0.001, "fair 0.1": 0.1, "fair 1": 1.0}

question = Question(
    variants={name: variant(stages=stages(fair=weight)) for name, weight in WEIGHTS.items()},
    claims=(
        Claim(
            variant="fair 0",
            measure="head/outside",
            difference="above",
            source="FACT: FAIR keeps the rest of the picture",
        ),
        Claim(
            variant="fair 1",
            measure="another",
            difference="below",
            source="ours: too much of FAIR closes the adapter",
        ),
    ),
)
