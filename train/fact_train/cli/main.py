"""fact-train: train what FACT is made of."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fact_jax.utils.command_line import ArgumentParser, add_version, silence_loggers
from fact_jax.utils.errors import run_program
from fact_jax.utils.files import require_local
from fact_train.cli import data as data_cli
from fact_train.cli import lab as lab_cli
from fact_train.cli import prepare as prepare_cli


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit status (0 done, 2 bad input, 128 + signal when stopped)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    # argparse gives up on positionals that follow an option: take them as overrides.
    arguments, rest = parser.parse_known_args(argv)
    takes_settings = hasattr(arguments, "override")
    unknown = [text for text in rest if text.startswith("-") or not takes_settings]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if takes_settings:
        arguments.override = arguments.override + rest
    command = shlex.join(["fact-train", *argv])
    return run_program(lambda: _dispatch(arguments, command))


def _dispatch(arguments: argparse.Namespace, command: str) -> int:
    if isinstance(getattr(arguments, "out", None), Path):
        require_local(arguments.out)
    if arguments.command == "configs":
        return _configs()
    if arguments.command == "plan":
        from fact_train.cli.plan import plan

        return plan(arguments)
    if arguments.command == "records":
        return data_cli.run_records(arguments)
    if arguments.command == "data":
        return prepare_cli.run_data(arguments)
    if arguments.command == "lab":
        return lab_cli.run_lab(arguments)
    if arguments.command == "cache":
        return data_cli.run_cache(arguments)
    return _run(arguments, command)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="fact-train", description=__doc__)
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="train an experiment, or go on with it",
        description="Train an experiment. Started again with the same folder it goes on from the "
        "newest checkpoint, as if it had never stopped.",
    )
    _add_experiment(run)
    run.add_argument(
        "--out", metavar="DIR", help="the run's folder, or s3://, gs:// URL (default runs/NAME)"
    )
    run.add_argument(
        "--dry-run", action="store_true", help="load, compile, run one step, and write nothing"
    )
    several = run.add_argument_group("several processes")
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 listens; or auto: as SLURM, Open MPI, Kubernetes or a TPU pod say",
    )
    several.add_argument("--processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process", type=int, metavar="I", help="which this is, from 0")
    plan = commands.add_parser(
        "plan",
        help="what a step costs on chips that are not here",
        description="Compile the real training step for TPUs or GPUs that are not here: memory, "
        "arithmetic, memory traffic, kernels, collectives, and bounds of the step's time. It takes "
        "their compiler: jax[tpu] or jax[cuda13] must be installed. "
        "The exit status is 0 if the step fits into memory, 1 if it does not.",
    )
    _add_experiment(plan)
    chips = plan.add_mutually_exclusive_group(required=True)
    chips.add_argument("--topology", metavar="TPU:SHAPE", help="as v5e:16x16, v5p:4x4x4, v6e:2x4")
    plan.add_argument("--slices", type=int, default=1, metavar="N", help="so many TPU slices")
    chips.add_argument("--gpu", metavar="GPU[:COUNT]", help="as h100:64 (8 if it does not say)")
    plan.add_argument("--global-batch", type=int, metavar="N", help="instead of batch_size")
    plan.add_argument("--json", action="store_true", help="print JSON")
    prepare_cli.add_data(commands)
    data_cli.add_records(commands)
    _add_experiment(data_cli.add_cache(commands))
    lab_cli.add_lab(commands)
    commands.add_parser("configs", help="list the experiments", description="List the experiments.")
    return parser


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help="a name from `fact-train configs`, or a .py file"
    )
    parser.add_argument(
        "override",
        metavar="key=value",
        nargs="*",
        help="a setting, as optimizer.learning_rate=3e-4",
    )


def _configs() -> int:
    from fact_train.config import list_configs

    for name, line in list_configs():
        print(f"{name:20s} {line}")
    return 0


def _run(arguments: argparse.Namespace, command: str) -> int:
    from fact_train.config import load_config
    from fact_train.overrides import override

    short, config = load_config(arguments.config)
    config = override(config, arguments.override)

    from fact_train.tasks import task_class

    task_class(config)  # before anything is loaded or written

    from fact_train.multihost.processes import initialize

    initialize(arguments.coordinator, arguments.processes, arguments.process)

    from fact_jax.ops.precision import matmul_precision

    if arguments.dry_run:
        from fact_train.run.dry_run import dry_run

        with matmul_precision(config.precision):
            dry_run(config)
        return 0

    from fact_train.run.loop import run

    # Orbax and the object stores report there what the loop says in one line.
    silence_loggers("absl", "gcsfs", "s3fs", "fsspec")
    with matmul_precision(config.precision):
        outcome = run(config, arguments.out or Path("runs") / short, command)
    return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by
