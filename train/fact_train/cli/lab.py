"""The command ``lab``."""

import argparse
from pathlib import Path

from fact_jax.utils.command_line import silence_loggers


def add_lab(commands: argparse._SubParsersAction) -> None:
    """Add ``lab`` to fact-train's commands."""
    lab = commands.add_parser(
        "lab",
        help="put claims of papers to the test on the miniature",
        description="Train every configuration of the named questions (all, without names) with "
        "several seeds, measure each by `fact-infer evaluate`, and write a report with a verdict "
        "on every claim. Questions are files in fact_train/configs/lab. Says beforehand how long "
        "it takes; stopped and started again it goes on.",
    )
    lab.add_argument("name", metavar="NAME", nargs="*", help="questions, as fair or shuffle")
    lab.add_argument("--out", type=Path, default=Path("runs/lab"), metavar="DIR", help="(runs/lab)")
    lab.add_argument(
        "--docs", type=Path, metavar="FILE", help="the report (laboratory.md in --out)"
    )
    lab.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each (3)")
    lab.add_argument("--people", type=int, default=96, metavar="N", help="who are drawn (96)")
    lab.add_argument("--steps", type=int, metavar="N", help="of every training, for a trial")
    lab.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="at a time, each on its share of the processors: more is done in all (1). Digits are "
        "the same for the same N",
    )
    lab.add_argument("--dry-run", action="store_true", help="say what it would do, and do nothing")


def run_lab(arguments: argparse.Namespace) -> int:
    """The exit status: 0 done, 128 + signal when stopped."""
    from fact_train.lab.run import laboratory, make_laboratory

    silence_loggers("absl", "gcsfs", "s3fs", "fsspec")
    lab = make_laboratory(
        arguments.name,
        arguments.out,
        arguments.docs,
        arguments.seeds,
        arguments.steps,
        arguments.people,
        arguments.jobs,
    )
    return laboratory(lab, dry_run=arguments.dry_run)
