"""FACT on Stable Diffusion 1.5 at 512 x 512, on a TPU pod: 2,048 photos a step.

fact-train run sd15_fact_pod --out runs/sd15_fact_pod --coordinator auto     (on every host)

As many photos as `sd15_fact` sees, in an eighth of its steps, at a rate that grows with the square
root of the batch. Data parallel, the optimizer's state spread over all chips; models and records
are those of `sd15_fact`.

Hardware: v5e-256 (256 chips of 16 GB, 8 photos each), or v5p-128 (64 chips of 95 GB, 32 photos
each, remat=none if that fits); the mesh takes the chips that are there.
Compiled for 256 chips of v5e with 32 photos each, in eight rounds of 4, never run on one, in half
an hour of one CPU core:

    fact-train plan sd15_fact_pod --topology v5e:16x16 --global-batch 8192 accumulate=8 --json

says 8.1 of 16.9 GB a chip, splash attention forwards and backwards, 0.81 s of arithmetic at peak,
0.87 s of memory traffic and 0.018 s of collectives a step: MFU at most 71 %, 36 % if none of them
overlap. The whole answer is `plans/sd15_fact_pod-v5e-16x16-8192.json`. With accumulate=2 it
takes as long and 13.6 GB.
"""

from dataclasses import replace

from fact_train.config import CheckpointConfig, LogConfig
from fact_train.configs.sd15_fact import config as sd15_fact

FACTOR = 8

config = replace(
    sd15_fact,
    steps=sd15_fact.steps // FACTOR,
    batch_size=sd15_fact.batch_size * FACTOR,
    optimizer=replace(
        sd15_fact.optimizer,
        learning_rate=sd15_fact.optimizer.learning_rate * FACTOR**0.5,
        warmup_steps=500,
    ),
    ema=replace(sd15_fact.ema, decay=1 - FACTOR * (1 - sd15_fact.ema.decay)),
    checkpoint=CheckpointConfig(every=250, keep=3, keep_every=2500, best=1),
    log=LogConfig(every=10, samples_every=250),
    options=replace(
        sd15_fact.options,
        stages=tuple(
            replace(stage, steps=stage.steps // FACTOR) for stage in sd15_fact.options.stages
        ),
    ),
)
