"""The commands ``portraits`` and ``report``."""

import argparse
import dataclasses
from pathlib import Path


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the two to fact-infer's commands."""
    text = "draw photos of made-up people, with points and head masks beside them"
    portraits = commands.add_parser("portraits", help=text, description=f"{_sentence(text)}.")
    portraits.set_defaults(run=_portraits)
    portraits.add_argument(
        "--split",
        default="test",
        choices=("base", "encoder", "adapter", "judge", "test"),
        help="whose training they are for; nothing is trained on those of test, the default",
    )
    portraits.add_argument("--people", type=int, default=4, metavar="N", help="how many (4)")
    portraits.add_argument("--photos", type=int, default=1, metavar="N", help="of each (1)")
    portraits.add_argument("--size", type=int, default=128, metavar="N", help="pixels (128)")
    portraits.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_report(commands)


def _add_report(commands: argparse._SubParsersAction) -> None:
    text = "make report.html and grid.png of a training, its evaluation and its pictures"
    report = commands.add_parser("report", help=text, description=f"{_sentence(text)}.")
    report.set_defaults(run=_report)
    report.add_argument("--training", type=Path, required=True, metavar="DIR", help="of fact-train")
    report.add_argument(
        "--before",
        type=Path,
        metavar="FILE",
        help="metrics.jsonl of the training that this one went on from, drawn before it",
    )
    report.add_argument("--evaluation", type=Path, required=True, metavar="DIR")
    report.add_argument(
        "--flax", type=Path, metavar="DIR", help="pictures of `generate --backend flax`"
    )
    report.add_argument(
        "--torch", type=Path, metavar="DIR", help="the same pictures of `--backend torch`"
    )
    report.add_argument("--stages", type=Path, metavar="FILE", help="what each stage took (JSON)")
    report.add_argument("--photo", type=Path, metavar="FILE", help="(scikit-image's astronaut)")
    report.add_argument("--points", type=Path, metavar="FILE", help="of the face in --photo")
    report.add_argument("--out", type=Path, required=True, metavar="DIR")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _portraits(arguments: argparse.Namespace) -> None:
    from fact_infer.evaluation.portrait_files import write_portraits
    from fact_infer.output_images import check_folder

    check_folder(arguments.out)
    for path in write_portraits(
        arguments.split, arguments.people, arguments.photos, arguments.out, arguments.size
    ):
        print(path)


def _report(arguments: argparse.Namespace) -> None:
    from fact_infer.evaluation.report import ReportSources, write_report
    from fact_infer.output_images import check_folder

    check_folder(arguments.out)
    names = [field.name for field in dataclasses.fields(ReportSources)]
    sources = ReportSources(**{name: getattr(arguments, name) for name in names})
    for path in write_report(sources, arguments.out):
        print(path)
