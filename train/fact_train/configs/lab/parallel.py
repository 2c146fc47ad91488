"""Is a sequential adapter better than a parallel one?

Claim (FACT, arXiv 2410.12312): an adapter of its own before text cross-attention keeps face and
text apart better than attention added beside it, IP-Adapter's way (arXiv 2308.06721): likeness
without loss of the caption. Refuted if the parallel adapter's similarity to another photo of the
person is above FACT's, or if more captions are followed. Both have as many tokens, steps and
losses; the parallel one has no feed-forward, and its queries are its own.
"""

from fact_train.configs.lab.fact import variant
from fact_train.lab.question import Claim, Question

question = Question(
    variants={"parallel": variant(form="parallel")},
    claims=(
        Claim(
            variant="parallel",
            measure="another",
            difference="below",
            source="FACT: sequential beats parallel, likeness",
        ),
        Claim(
            variant="parallel",
            measure="caption/all",
            difference="below",
            source="FACT: sequential beats parallel, text",
        ),
    ),
)
