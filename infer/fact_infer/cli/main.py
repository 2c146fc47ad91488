"""fact-infer: portraits of a person from a few photos and a prompt."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fact_infer.cli.evaluate import add_evaluate
from fact_infer.cli.generate import add_generate
from fact_infer.cli.options import add_photo_options
from fact_infer.cli.plan import add_plan
from fact_infer.cli.redraw import add_redraw
from fact_infer.cli.report import add_commands
from fact_infer.cli.serve import add_serve, add_ui
from fact_infer.cli.unused_options import without_effect
from fact_infer.provenance.options import add_provenance, use_provenance
from fact_jax.utils.command_line import ArgumentParser, add_version
from fact_jax.utils.errors import UserError, run_program

_NO_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory")


class _Parser(ArgumentParser):
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit status.

    0: done, 1: a plan that does not fit, 2: bad input, 130: interrupted.
    """

    def run() -> int | None:
        words = sys.argv[1:] if argv is None else argv
        arguments = _parser().parse_args(words)
        for line in without_effect(arguments, words):
            print(f"warning: {line}", file=sys.stderr)
        if getattr(arguments, "backend", None) == "torch":
            from fact_infer.jax_config import pin_jax_to_cpu

            pin_jax_to_cpu()
        use_provenance(arguments)
        try:
            return arguments.run(arguments)
        except RuntimeError as error:
            # XLA and PyTorch have no MemoryError.
            if not any(sign in str(error) for sign in _NO_MEMORY):
                raise
            raise MemoryError(
                "draw fewer pictures at a time (--batch) or smaller ones (--width, --height)"
            ) from error

    return run_program(run)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fact-infer", description=__doc__)
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    add_generate(commands)
    add_redraw(commands)
    _add_face(commands)
    add_serve(commands)
    add_ui(commands)
    add_plan(commands)
    add_evaluate(commands)
    add_commands(commands)
    for name in ("generate", "redraw", "serve", "ui"):
        add_provenance(commands.choices[name])
    return parser


def _add_face(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "face",
        help="show what is found in a photo: points, head mask, aligned crop",
        description="Draw what the face path finds in a photo: the five points and the head's "
        "mask, and beside them the aligned crop that the encoder sees.",
    )
    command.set_defaults(run=_face)
    command.add_argument("photo", type=Path, metavar="PHOTO")
    add_photo_options(command, several=False)
    command.add_argument("--size", type=int, default=112, metavar="PX", help="crop (default 112)")
    command.add_argument("--out", type=Path, required=True, metavar="PNG")


def _face(arguments: argparse.Namespace) -> None:
    from fact_infer.output_images import check_folder, save_image
    from fact_infer.photos import prepare_face, visualize_face
    from fact_infer.request import Photo

    if arguments.out.suffix.lower() != ".png":
        raise UserError(f"{arguments.out}: the picture is a PNG, name it so")
    if arguments.out.is_dir():
        raise UserError(f"{arguments.out} is a folder: name a file")
    if not 16 <= arguments.size <= 1024:
        raise UserError(f"--size must lie in 16..1024, got {arguments.size}")
    check_folder(arguments.out.parent)
    photo = Photo(
        path=arguments.photo,
        points=arguments.points,
        mask=arguments.mask,
        parsing=arguments.parsing,
        pack=arguments.detector,
        index=arguments.face_index,
    )
    found = prepare_face(photo, arguments.size)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    print(save_image(visualize_face(found), arguments.out, {"photo": arguments.photo.name}, None))
