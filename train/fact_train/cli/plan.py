"""The command `fact-train plan`."""

import argparse
import difflib
import json
import math
import re

from fact_jax.utils.errors import UserError
from fact_train.chips import CHIPS, Chip, per_device
from fact_train.config import load_config
from fact_train.overrides import override
from fact_train.plan.compilation import compiled_stats
from fact_train.plan.report import format_report, make_report
from fact_train.plan.targets import GPUS_A_NODE, Target, gpu_target, tpu_target


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 if the step fits, 1 if it does not."""
    name, overrides, slices = arguments.config, arguments.override, arguments.slices
    if arguments.topology:
        chip, chips, target = read_topology(arguments.topology, slices)
    else:
        chip, chips, target = read_gpu(arguments.gpu)
    if slices > 1:
        overrides = [*overrides, f"mesh.slices={slices}"]
    if arguments.global_batch is not None:
        overrides = [*overrides, f"batch_size={arguments.global_batch}"]
    config = override(load_config(name)[1], overrides)
    stats = compiled_stats(name, overrides, target)
    report = make_report(config, chip, chips, stats)
    report = {"config": name, "overrides": overrides, **report}
    print(json.dumps(report, indent=1) if arguments.json else "\n".join(format_report(report)))
    return 0 if report["memory"]["fits"] else 1


def read_topology(text: str, slices: int = 1) -> tuple[Chip, int, Target]:
    """``v5e:16x16`` -> the chip and how many; of chips that JAX shows as several, their parts."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text)
    if match is None:
        raise UserError(f"--topology {text}: expected a TPU and its shape, as v5e:16x16")
    if slices < 1:
        raise UserError(f"--slices {slices}: expected at least 1")
    chip = _chip(match[1], "TPU")
    count = math.prod(map(int, match[2].split("x"))) * chip.devices * slices
    return per_device(chip), count, tpu_target(text, slices)


def read_gpu(text: str) -> tuple[Chip, int, Target]:
    """``h100:64`` -> the chip, and how many (8 if it does not say)."""
    match = re.fullmatch(r"(\w+)(?::([1-9]\d*))?", text)
    if match is None:
        raise UserError(f"--gpu {text}: expected a GPU and how many, as h100:64")
    chip, count = _chip(match[1], "NVIDIA"), int(match[2] or GPUS_A_NODE)
    return chip, count, gpu_target(chip.name, count)


def _chip(name: str, maker: str) -> Chip:
    known = [chip.name for chip in CHIPS.values() if chip.kinds[0].startswith(maker)]
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
        raise UserError(
            f"no data on a chip {name!r} (known: {', '.join(known)}); the nearest is {near!r}"
        )
    return CHIPS[name.lower()]
