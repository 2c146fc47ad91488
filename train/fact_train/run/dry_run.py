"""`fact-train run --dry-run`: one step of an experiment; nothing is written."""

import sys
import time

import jax

from fact_jax.sharding import global_batch, make_mesh, rows_of_process
from fact_jax.utils.errors import UserError
from fact_train.config import TrainConfig
from fact_train.engine.step import TrainStep, check_batch
from fact_train.multihost.processes import check_alike
from fact_train.run.logger import stage
from fact_train.run.prepare import placement, prepare, sizes


def dry_run(config: TrainConfig) -> dict[str, float]:
    """Load everything, compile the step and run it once; its metrics. Writes nothing.

    On several processes, each of them calls this. UserError where the run itself would raise one,
    and if the step's loss or gradient is not finite.
    """
    check_alike(config)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    ready = prepare(config, mesh, _say, "dry run")
    _say(sizes(ready.state, ready.frozen))
    _say(placement(mesh, config.precision))
    rows = rows_of_process(mesh, config.batch_size)
    batch = global_batch(mesh, config.batch_size, rows, next(ready.source.batches(0, rows)))
    step = TrainStep(ready.task, ready.optimizer, config, mesh)
    with stage(_say, "compiling the training step"):
        compiled = step.lower(ready.state, ready.frozen, batch).compile()
    began = time.monotonic()
    _, metrics = compiled(ready.state, ready.frozen, batch, step.key)
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    spent = time.monotonic() - began
    if metrics["skipped"]:
        raise UserError(
            f"the first step is not finite (loss {metrics['loss']:g}, gradient norm "
            f"{metrics['gradient_norm']:g}): look at the data, or lower optimizer.learning_rate"
        )
    _say(
        f"dry run: one step in {spent:.3g} s, loss {metrics['loss']:.4g}, gradient norm "
        f"{metrics['gradient_norm']:.4g}; nothing was written"
    )
    return metrics


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
