"""The command ``plan``."""

import argparse

from fact_infer.cli.options import add_face_guidance, add_model_files, add_size, add_steps
from fact_jax.utils.errors import UserError

_GENERATION = (
    *("base", "adapter", "encoder", "controlnet", "precision", "photos", "sampler", "steps"),
    *("guidance", "face_guidance", "height", "width"),
)
"""Options that are fields of a planned generation under the same name."""


def add_plan(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "plan",
        help="what generating costs on a chip that is not here",
        description="Compile the programs of `generate --backend flax` for TPUs or GPUs that are "
        "not here: memory, kernels, the largest batch, and bounds of a picture's time. It takes "
        "their compiler: jax[tpu] or jax[cuda13] must be installed. No weights are read: where a "
        "folder is not here, the released shapes are taken. The exit status is 0 if the batch "
        "fits into memory, 1 if it does not.",
    )
    command.set_defaults(run=_plan)
    chips = command.add_mutually_exclusive_group(required=True)
    chips.add_argument("--topology", metavar="TPU:SHAPE", help="as v5e:1x1, v6e:2x4")
    chips.add_argument("--gpu", metavar="GPU[:COUNT]", help="as h200, h100:8 (1 if not said)")
    add_model_files(command.add_argument_group("models"))
    picture = command.add_argument_group("picture")
    add_steps(picture)
    add_size(picture)
    picture.add_argument(
        "--photos", type=int, default=1, metavar="N", help="of the one person (default 1)"
    )
    add_face_guidance(picture)
    command.add_argument("--json", action="store_true", help="print JSON")


def _plan(arguments: argparse.Namespace) -> int:
    import json

    from fact_infer.plan.report import format_report, make_report
    from fact_jax.plan.compilation import compile_for
    from fact_jax.plan.roofline import usable_bytes
    from fact_jax.plan.targets import read_gpu, read_topology

    if arguments.topology:
        chip, chips, target = read_topology(arguments.topology)
    else:
        chip, chips, target = read_gpu(arguments.gpu, usual=1)
    for name in ("batch", "photos"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.batch % chips:
        raise UserError(f"--batch {arguments.batch} does not divide over {chips} chips")
    generation = {name: getattr(arguments, name) for name in _GENERATION}
    generation["batch"] = arguments.batch // chips
    stats = compile_for("fact_infer.plan.compiled_stats", [generation, usable_bytes(chip)], target)
    report = {**generation, **make_report(chip, chips, stats)}
    print(json.dumps(report, indent=1) if arguments.json else "\n".join(format_report(report)))
    return 0 if report["memory"]["fits"] else 1
