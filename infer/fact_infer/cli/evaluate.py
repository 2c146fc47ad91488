"""The commands ``portraits``, ``evaluate`` and ``report``."""

import argparse
import dataclasses
import sys
from pathlib import Path

from fact_jax.utils.errors import UserError


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the three to fact-infer's commands."""
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
    portraits.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_evaluate(commands)
    _add_report(commands)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    text = "measure an adapter of the miniature on made-up people whom nothing was trained on"
    evaluate = commands.add_parser("evaluate", help=text, description=f"{_sentence(text)}.")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("--base", type=Path, default=Path("miniature/base"), metavar="DIR")
    evaluate.add_argument("--adapter", type=Path, required=True, metavar="FILE")
    evaluate.add_argument(
        "--encoder",
        type=Path,
        metavar="DIR",
        help="(encoder/ beside the adapter, else miniature/encoder)",
    )
    evaluate.add_argument(
        "--judge",
        type=Path,
        default=Path("miniature/judge"),
        metavar="DIR",
        help="folder of recogniser.safetensors and parser.safetensors (miniature/judge)",
    )
    evaluate.add_argument("--people", type=int, default=96, metavar="N", help="how many (96)")
    evaluate.add_argument("--photos", type=int, default=1, metavar="N", help="of each (1)")
    evaluate.add_argument("--sampler", default="ddim", metavar="NAME")
    evaluate.add_argument("--steps", type=int, default=25, metavar="N")
    evaluate.add_argument("--guidance", type=float, default=3.0, metavar="G")
    evaluate.add_argument("--face-scale", type=float, default=1.0, metavar="S")
    evaluate.add_argument("--seed", type=int, default=0, metavar="N")
    evaluate.add_argument("--batch", type=int, default=16, metavar="N", help="at a time (16)")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR")


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
    for path in write_portraits(arguments.split, arguments.people, arguments.photos, arguments.out):
        print(path)


def _evaluate(arguments: argparse.Namespace) -> None:
    from fact_infer.evaluation import evaluate
    from fact_infer.jax.pipeline import FlaxPipeline
    from fact_infer.output_images import check_folder
    from fact_infer.parts import has_encoder
    from fact_infer.request import GenerationParams, check_seed
    from fact_jax.fact import Guidance
    from fact_jax.utils.miniature import require_miniature

    if arguments.batch < 1:
        raise UserError(f"--batch must be at least 1, got {arguments.batch}")
    check_seed(arguments.seed)
    out = evaluate.unused_folder(arguments.out)
    check_folder(out)
    if out != arguments.out:
        print(f"note: {arguments.out} is taken, this goes to {out}", file=sys.stderr)
    params = GenerationParams(
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance=Guidance(text=arguments.guidance, face_scale=arguments.face_scale),
    )
    encoder = arguments.encoder
    if encoder is None and not has_encoder(arguments.adapter):
        encoder = Path("miniature/encoder")
    paths = {"--base": arguments.base, "--encoder": encoder, "--judge": arguments.judge}
    require_miniature({option: path for option, path in paths.items() if path is not None})
    networks = evaluate.MetricNetworks(arguments.judge)
    pipeline = FlaxPipeline.load(arguments.base, arguments.adapter, encoder)
    pipeline.base.check(params)
    assert pipeline.face is not None  # --adapter is required
    crop_size = pipeline.face.encoder_config.img_size
    people = evaluate.render_people(arguments.people, arguments.photos, crop_size)
    print(f"drawing {2 * arguments.people} pictures", file=sys.stderr)
    pictures = evaluate.generate_pictures(
        pipeline, people, params, seed=arguments.seed, batch=arguments.batch
    )
    measures = evaluate.measure(networks, people, pictures)
    about = evaluate.describe(pipeline, people, params, arguments.seed)
    print(evaluate.save(out, about, measures, people, pictures), end="")


def _report(arguments: argparse.Namespace) -> None:
    from fact_infer.evaluation.report import ReportSources, write_report
    from fact_infer.output_images import check_folder

    check_folder(arguments.out)
    names = [field.name for field in dataclasses.fields(ReportSources)]
    sources = ReportSources(**{name: getattr(arguments, name) for name in names})
    for path in write_report(sources, arguments.out):
        print(path)
