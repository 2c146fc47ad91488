"""Do shuffled photos keep the adapter from copying, and does it need the curriculum?

Claim 1 (FACT, arXiv 2410.12312): trained on the very photo that it is to draw, the adapter copies.
Refuted if without shuffle the copy-paste score is below FACT's. Claim 2 (the same): shuffle from
the first step is harder to learn from. Refuted if similarity to another photo of the person is
above FACT's with shuffle 0.9 from the first step.
"""

from dataclasses import replace

from fact_train.configs.lab.fact import STEPS, stages, variant
from fact_train.lab.question import Claim, Question

_full = stages()[-1]

question = Question(
    variants={
        "no shuffle": variant(stages=stages(shuffle=0.0)),
        # FAIR keeps its ramp: the shuffle's alone is taken away.
        "no curriculum": variant(
            stages=tuple(replace(stage, shuffle=_full.shuffle) for stage in stages())
        ),
    },
    claims=(
        Claim(
            variant="no shuffle",
            measure="copy_paste",
            difference="above",
            source="FACT: shuffle keeps the adapter from copying",
        ),
        Claim(
            variant="no curriculum",
            measure="another",
            difference="below",
            source="FACT: shuffle is brought in by a curriculum",
        ),
    ),
)

assert sum(stage.steps for stage in stages()) == STEPS
