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


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 if the step fits, 1 if it does not."""
    name, overrides, topology = arguments.config, arguments.override, arguments.topology
    chip, chips = read_topology(topology) if topology else read_gpu(arguments.gpu)
    if arguments.global_batch is not None:
        overrides = [*overrides, f"batch_size={arguments.global_batch}"]
    config = override(load_config(name)[1], overrides)
    stats = compiled_stats(name, overrides, topology, chips)
    report = make_report(config, chip, chips, stats)
    report = {"config": name, "overrides": overrides, **report}
    print(json.dumps(report, indent=1) if arguments.json else "\n".join(format_report(report)))
    return 0 if report["memory"]["fits"] else 1


def read_topology(text: str) -> tuple[Chip, int]:
    """``v5e:16x16`` -> the chip and how many; of chips that JAX shows as several, their parts."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text)
    if match is None:
        raise UserError(f"--topology {text}: expected a TPU and its shape, as v5e:16x16")
    chip, count = _chip(match[1], "TPU"), math.prod(map(int, match[2].split("x")))
    return per_device(chip), count * chip.devices


def read_gpu(text: str) -> tuple[Chip, int]:
    """``h100:64`` -> the chip, and how many (8 if it does not say)."""
    match = re.fullmatch(r"(\w+)(?::([1-9]\d*))?", text)
    if match is None:
        raise UserError(f"--gpu {text}: expected a GPU and how many, as h100:64")
    return _chip(match[1], "NVIDIA"), int(match[2] or 8)


def _chip(name: str, maker: str) -> Chip:
    known = [chip.name for chip in CHIPS.values() if chip.kinds[0].startswith(maker)]
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
        raise UserError(
            f"no data on a chip {name!r} (known: {', '.join(known)}); the nearest is {near!r}"
        )
    return CHIPS[name.lower()]
