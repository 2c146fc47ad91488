"""The command `fact-train plan`."""

import argparse
import json

from fact_jax.plan.compilation import compile_for
from fact_jax.plan.targets import read_gpu, read_topology
from fact_jax.utils.errors import UserError
from fact_train.config import load_config
from fact_train.overrides import override
from fact_train.plan.report import format_report, make_report


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 if the step fits, 1 if it does not."""
    name, overrides, slices = arguments.config, arguments.override, arguments.slices
    if slices != 1 and arguments.gpu:
        raise UserError(f"--slices {slices} is of TPUs: --gpu says by its number how many nodes")
    if arguments.topology:
        chip, chips, target = read_topology(arguments.topology, slices)
    else:
        chip, chips, target = read_gpu(arguments.gpu)
    if slices > 1:
        overrides = [*overrides, f"mesh.slices={slices}"]
    if arguments.global_batch is not None:
        overrides = [*overrides, f"batch_size={arguments.global_batch}"]
    config = override(load_config(name)[1], overrides)
    stats = compile_for("fact_train.plan.compiled_stats", [name, overrides], target)
    report = make_report(config, chip, chips, stats)
    report = {"config": name, "overrides": overrides, **report}
    print(json.dumps(report, indent=1) if arguments.json else "\n".join(format_report(report)))
    return 0 if report["memory"]["fits"] else 1
