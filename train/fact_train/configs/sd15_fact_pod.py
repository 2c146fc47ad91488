"""FACT on Stable Diffusion 1.5 at 512 x 512, on a TPU pod: 2,048 photos a step.

fact-train run sd15_fact_pod --out runs/sd15_fact_pod --coordinator auto     (on every host)

As many photos as `sd15_fact` sees, in an eighth of its steps, at a rate that grows with the square
root of the batch. Data parallel, the optimizer's state spread over all chips; models and records
are those of `sd15_fact`.

Hardware: v5e-256 (256 chips of 16 GB, 8 photos each), or v5p-128 (64 chips of 95 GB, 32 photos
each, remat=none if that fits); the mesh takes the chips that are there.
Expected step time and memory, never measured: compiled for 256 chips of v5e, which takes half an
hour of one CPU core,

    fact-train plan sd15_fact_pod --topology v5e:16x16 --global-batch 8192 accumulate=2 --json

says 8.9 of 16.9 GB a chip for 32 photos each, in two rounds of 16; 1.5 GB of all-reduces and 0.5 GB
of all-gathers a chip, over the trained parameters alone; 0.8 s if all arithmetic ran at peak. Its
whole answer is `plans/sd15_fact_pod-v5e-16x16-8192.json`, made before attention was fused and
gradients were summed once a step: it says itself which of its numbers are stale.
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
