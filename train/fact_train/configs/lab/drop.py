"""Does dropping face and text in training help what guidance makes of them?

Claim (classifier-free guidance, arXiv 2207.12598, as FACT takes it over): without drops the null
face was never trained, and guidance away from it means less. Refuted if without drops similarity
to another photo of the person is above FACT's.
"""

from fact_jax.curriculum import Drop
from fact_train.configs.lab.fact import variant
from fact_train.lab.question import Claim, Question

question = Question(
    variants={"no drop": variant(drop=Drop(face=0.0, text=0.0, both=0.0))},
    claims=(
        Claim(
            variant="no drop",
            measure="another",
            difference="below",
            source="FACT: conditions are dropped for guidance",
        ),
    ),
)
