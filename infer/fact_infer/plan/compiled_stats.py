"""Memory, FLOPs and traffic of the programs of a generation, in a process of its own."""

import dataclasses
import math
import sys
import time
from typing import Any

import jax
from jaxtyping import PyTree

from fact_infer.plan.abstract_pipeline import (
    AbstractPipeline,
    PlannedGeneration,
    TracedProgram,
    build,
    inputs_of,
)
from fact_infer.plan.report import BatchStats, PlanStats, ProgramStats, second_batch
from fact_jax.diffusion.samplers import num_model_calls
from fact_jax.plan.compilation import serve_request
from fact_jax.plan.compiled_program import compile_program, target_devices
from fact_jax.plan.jaxpr_costs import (
    argument_bytes,
    flops_by_product,
    model_flops,
    without_dead_code,
)
from fact_jax.plan.targets import Target


def read_compiled(request: PlannedGeneration, usable: float, target: Target) -> PlanStats:
    """Stats of the programs compiled for a chip that is not here, at one or two sizes of batch."""
    start, device = time.monotonic(), target_devices(target)[0]
    pipeline, notes = build(request)
    size = pipeline.base.picture_size(request.params())
    weights = {name: _bytes(state) for name, state in pipeline.states.items()}
    batches = [_batch_stats(request, pipeline, target, device)]
    other = second_batch(batches[0], sum(weights.values()), usable)
    if other is not None:
        request = dataclasses.replace(request, batch=other)
        batches.append(_batch_stats(request, pipeline, target, device))
    return {
        "notes": notes,
        "parameters": {name: _count(state) for name, state in pipeline.states.items()},
        "weights": weights,
        "size": list(size),
        "calls": num_model_calls(request.sampler, request.steps),
        "batches": batches,
        "seconds": time.monotonic() - start,
    }


def _batch_stats(
    request: PlannedGeneration, pipeline: AbstractPipeline, target: Target, device: Any
) -> BatchStats:
    programs = pipeline.trace(inputs_of(request, pipeline), device)
    conditions = _bytes(programs["prepare"].traced.out_info)
    found = {name: _program_stats(program, target) for name, program in programs.items()}
    found["decode"]["needed"] += conditions  # no argument of it, but still there
    return {"batch": request.batch, "conditions": conditions, "programs": found}


def _program_stats(program: TracedProgram, target: Target) -> ProgramStats:
    jaxpr = without_dead_code(program.traced.jaxpr.jaxpr)
    compiled = compile_program(program.traced.lower())
    # Weights that a program does not look at are no arguments of it.
    weights = argument_bytes(jaxpr) - _bytes(program.arguments[1:])
    return {
        "flops": dict(flops_by_product(jaxpr, target.platform)),
        "model_flops": model_flops(program.function, *program.arguments),
        "needed": compiled.used - weights,
        "usable": compiled.usable,
        "accessed": compiled.accessed,
        "kernels": compiled.kernels,
    }


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _count(tree: PyTree) -> int:
    return sum(math.prod(a.shape) for a in jax.tree.leaves(tree))


def respond(request: tuple[dict[str, Any], float], target: Target) -> PlanStats:
    """Stats for a request: the generation of one chip, and the bytes that it may use."""
    generation, usable = request
    return read_compiled(PlannedGeneration(**generation), usable, target)


if __name__ == "__main__":
    serve_request(respond, *sys.argv[1:])
