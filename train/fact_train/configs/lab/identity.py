"""Does an identity loss on the predicted picture give more of the person, and does it copy?

PortraitBooth (arXiv 2312.06354) adds 1 - cosine of identity embeddings where there is little noise.
Here the predicted latents are decoded and embedded by a network that is neither the condition's
encoder nor the judge. Claim 1: similarity to another photo of the person is above FACT's; refuted
if it is below. Claim 2 (WithAnyone, arXiv 2510.14975, of such losses on the photo itself): it
copies more; refuted if the copy-paste score is below FACT's. ``contrastive`` adds negatives.

The network: fact-train run mini_identity --out runs/mini_identity
"""

from dataclasses import replace

from fact_train.configs.lab.fact import variant
from fact_train.lab.question import Claim, Question
from fact_train.tasks.identity_loss import IdentityOptions

_loss = IdentityOptions(encoder="runs/mini_identity/export/encoder", weight=0.5)

question = Question(
    variants={
        "identity loss": variant(identity=_loss),
        "contrastive": variant(identity=replace(_loss, contrastive=0.05)),
    },
    claims=(
        Claim(
            variant="identity loss",
            measure="another",
            difference="above",
            source="PortraitBooth: an identity loss at low noise",
        ),
        Claim(
            variant="identity loss",
            measure="copy_paste",
            difference="above",
            source="WithAnyone: identity losses copy",
        ),
        Claim(
            variant="contrastive",
            measure="another",
            difference="above",
            source="WithAnyone: negatives tell people apart",
        ),
    ),
)
