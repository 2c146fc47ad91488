"""Model FLOPs of a step: without what is recomputed to save memory."""

import copy
import dataclasses
import sys
from typing import Any

from fact_jax.ops import attention
from fact_train.engine.jaxpr_costs import count_flops, trace
from fact_train.engine.step import TrainStep


def model_flops(step: TrainStep, state: Any, frozen: Any, batch: Any) -> int:
    """Operations of one step on all devices, without recomputed blocks and tiles of attention.

    Arrays or ShapeDtypeStructs will do. ValueError if the step has a loop of no known length.
    """
    config = dataclasses.replace(step.config, remat="none")
    task = copy.copy(step.task)
    task.config = config
    plain = TrainStep(task, step.optimizer, config, step.mesh)
    limit = attention.KEPT_MATRIX_LIMIT
    attention.KEPT_MATRIX_LIMIT = sys.maxsize  # no tiles
    try:
        return count_flops(trace(plain.compute, state, frozen, batch))
    finally:
        attention.KEPT_MATRIX_LIMIT = limit
