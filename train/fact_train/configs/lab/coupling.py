"""Is an adapter of its own, before the text and on a frozen base, better than a closer coupling?

Claim 1 (FACT, arXiv 2410.12312): an adapter of its own before text cross-attention keeps face and
text apart better than attention added beside it, IP-Adapter's way (arXiv 2308.06721): likeness
without loss of the caption. Refuted if the parallel adapter's similarity to another photo of the
person is above FACT's, or if more captions are followed. Both have as many tokens, steps and
losses; the parallel one has no feed-forward, and its queries are its own.

Claim 2 (the same, which leaves the text to the base): at the coupled extreme, where the base's text
cross-attention learns together with the adapter, fewer captions are followed; refuted if more are.
And more changes outside the head, against the base as it was; refuted if less does.
"""

from fact_train.configs.lab.fact import variant
from fact_train.lab.question import Claim, Question

question = Question(
    variants={"parallel": variant(form="parallel"), "coupled": variant(form="coupled")},
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
        Claim(
            variant="coupled",
            measure="caption/all",
            difference="below",
            source="FACT: the text is left to the base",
        ),
        Claim(
            variant="coupled",
            measure="head/outside",
            difference="above",
            source="FACT: a frozen base keeps the rest of the picture",
        ),
    ),
)
