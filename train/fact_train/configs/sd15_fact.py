"""FACT on Stable Diffusion 1.5 at 512 x 512: the paper's setting, as far as it is public.

fact-train run sd15_fact --out runs/sd15_fact

Public are the models, FAIR's weight (0.01, on the face), face shuffling, dropped faces and texts,
masked head crops, gates of zero at the start and 290,000 steps (arXiv 2410.12312). Batch, learning
rate and the curriculum's numbers are not: these are ours, and no run at this size stands behind
them; the rate is what two narrower widths carry on to (`docs/recipe.md`). On the miniature gates of
zero hardly opened and FAIR from the first step closed the adapter at a high rate
(`miniature/README.md`, `docs/recipe.md`), so it starts from zero output projections here, which are
the base bit for bit too, and FAIR is ramped in with the shuffling. The start of the release, with
FAIR from the first step:

    fact-train run sd15_fact options.start=zero_gates options.stages.0.fair_weight=0.01,0.01 \
        options.stages.1.fair_weight=0.01,0.01

Needs: `models/stable-diffusion-v1-5` (a diffusers folder), `models/ms1mv2_model_TransFace_S.pt`,
and two folders of records, `data/faces` and, for pictures of people who are not trained on,
`data/faces_validation` (`fact-train data build`). Frozen models run within the step; with
`fact-train cache sd15_fact` and options.cache=... they have run once before.

Hardware: one node of 8 GPUs with 80 GB, 32 photos each; on fewer, accumulate=... keeps the batch.
Compiled for 8 H100, never run on one, in ten minutes of one CPU core:

    fact-train plan sd15_fact --gpu h100:8 --global-batch 256 --json

says 29.8 of 79 GB a GPU, cuDNN's attention forwards and backwards, 0.154 s of arithmetic at peak,
0.176 s of memory traffic and 0.006 s of collectives a step: MFU at most 70 %, 37 % if none of them
overlap. The whole answer is `plans/sd15_fact-h100-8-256.json`.
"""

from fact_jax.curriculum import Stage
from fact_jax.models.resampler import ResamplerConfig
from fact_train.config import CheckpointConfig, EMAConfig, LogConfig, OptimizerConfig, TrainConfig
from fact_train.tasks.adapter import AdapterOptions

config = TrainConfig(
    task="adapter",
    steps=290_000,
    batch_size=256,
    precision="bfloat16",
    remat="block",
    optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=1e-2, warmup_steps=1000),
    ema=EMAConfig(decay=0.9999),
    checkpoint=CheckpointConfig(every=1000, keep=3, keep_every=20_000, best=1),
    log=LogConfig(every=50, samples_every=1000),
    options=AdapterOptions(
        base="models/stable-diffusion-v1-5",
        encoder="models/ms1mv2_model_TransFace_S.pt",
        resampler=ResamplerConfig.sd15(),
        records="data/faces",
        validation="data/faces_validation",
        stages=(
            Stage(steps=20_000),
            Stage(steps=70_000, shuffle=(0.0, 0.9), fair_weight=(0.0, 0.01), ramp="cosine"),
            Stage(steps=200_000, shuffle=(0.9, 0.9), fair_weight=(0.01, 0.01)),
        ),
        start="zero_projections",
        region="face",
    ),
)
