"""fact-infer: portraits of a person from a few photos and a prompt."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fact_jax.errors import UserError
from infer.cli_evaluate import add_commands

# What SAMPLERS holds, which would be slow to import for a --help.
_SAMPLERS = "ddim, pndm, euler, euler_ancestral, dpmpp_2m, dpmpp_2m_karras, lcm"
_PRECISIONS = ("float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit status (0 done, 2 bad input, 130 interrupted)."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fact-infer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    _add_generate(commands)
    _add_face(commands)
    add_commands(commands)
    return parser


def _add_generate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "generate",
        help="draw pictures of prompts, with the face of photos",
        description="Draw every prompt with every seed and write PNG files that hold their "
        "parameters. Without --adapter and --photo the base model draws alone. From the same "
        "request both backends start with the same noise and give the same picture, except with "
        "the samplers euler_ancestral and lcm: those draw noise on the way, each backend its own.",
    )
    command.set_defaults(run=_generate)
    models = command.add_argument_group("models")
    models.add_argument(
        "--base", required=True, metavar="DIR", help="diffusers folder of a Stable Diffusion 1.5"
    )
    models.add_argument("--adapter", metavar="FILE", help="FACT adapter, .safetensors or .ckpt")
    models.add_argument("--encoder", metavar="DIR", help="TransFace: folder, or released .pt")
    models.add_argument(
        "--backend", choices=("flax", "torch"), default="flax", help="who computes (default flax)"
    )
    models.add_argument(
        "--precision",
        choices=_PRECISIONS,
        default="float32",
        help="numbers in which UNet and text encoder compute (default float32)",
    )
    _add_face_options(command.add_argument_group("face"))
    _add_picture_options(command.add_argument_group("picture"))


def _add_face_options(group: argparse._ActionsContainer) -> None:
    _add_photo_options(group, several=True)
    group.add_argument(
        "--face-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="strength of the adapter, 0 to 2 (default 1; released code 0.5)",
    )
    group.add_argument(
        "--face-start", type=float, default=0.0, metavar="X", help="fraction of the steps before it"
    )
    group.add_argument(
        "--face-stop", type=float, default=1.0, metavar="X", help="fraction of the steps up to it"
    )
    group.add_argument(
        "--face-guidance",
        type=float,
        metavar="X",
        help="guidance of the face apart from the text's, by a third branch (default: none)",
    )
    group.add_argument(
        "--negative-face",
        choices=("null", "same"),
        default="null",
        help="what the negative branch sees: no face, or the same (default null)",
    )


def _add_picture_options(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="may be repeated"
    )
    group.add_argument("--negative", default="", metavar="TEXT", help="negative prompt")
    group.add_argument(
        "--sampler", default="pndm", metavar="NAME", help=f"one of {_SAMPLERS} (default pndm)"
    )
    group.add_argument("--steps", type=int, default=50, metavar="N", help="default 50")
    group.add_argument(
        "--guidance",
        type=float,
        default=5.0,
        metavar="X",
        help="of the text; 1 is none (default 5)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="first seed (default 0)")
    group.add_argument(
        "--count", type=int, default=1, metavar="N", help="seeds for each prompt (default 1)"
    )
    group.add_argument("--height", type=int, metavar="PX", help="default: the base's own")
    group.add_argument("--width", type=int, metavar="PX", help="default: the base's own")
    group.add_argument(
        "--batch", type=int, default=4, metavar="N", help="pictures at a time (default 4)"
    )
    group.add_argument(
        "--out", type=Path, default=Path("portraits"), metavar="DIR", help="default portraits/"
    )


def _add_face(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "face",
        help="show what is found in a photo: points, head mask, aligned crop",
        description="Draw what the face path finds in a photo: the five points and the head's "
        "mask, and beside them the aligned crop that the encoder sees.",
    )
    command.set_defaults(run=_face)
    command.add_argument("photo", type=Path, metavar="PHOTO")
    _add_photo_options(command, several=False)
    command.add_argument("--size", type=int, default=112, metavar="PX", help="crop (default 112)")
    command.add_argument("--out", type=Path, required=True, metavar="PNG")


def _add_photo_options(group: argparse._ActionsContainer, *, several: bool) -> None:
    each = {"action": "append", "default": []} if several else {}
    again = "; once for each photo, in their order" if several else ""
    if several:
        group.add_argument(
            "--photo",
            type=Path,
            metavar="FILE",
            help="may be repeated: one person's photos",
            **each,
        )
    group.add_argument(
        "--points",
        type=Path,
        metavar="FILE",
        help=f"five points as JSON (default: PHOTO.points.json, else the detector){again}",
        **each,
    )
    group.add_argument("--mask", type=Path, metavar="FILE", help=f"grey head mask{again}", **each)
    group.add_argument(
        "--parsing",
        type=Path,
        metavar="FILE",
        help=f"labels of a face-parsing model{again}",
        **each,
    )
    group.add_argument(
        "--face-index",
        type=int,
        metavar="N",
        help=f"which of several faces, from 0 at the left (default: the largest){again}",
        **each,
    )
    group.add_argument(
        "--detector", metavar="PACK", help="insightface model pack, a folder or a name"
    )


def _generate(arguments: argparse.Namespace) -> None:
    request = _request(arguments)

    from tqdm import tqdm

    from infer.base import check_faces, read_base, read_face_files
    from infer.images import check_folder, parameters, save_picture
    from infer.photos import prepare_crops
    from infer.pipeline import generate_batches

    check_folder(arguments.out)
    base = read_base(arguments.base)
    base.check(request)
    for line in base.cut_prompts(request):
        print(f"warning: {line}", file=sys.stderr)
    face = crops = None
    if arguments.adapter or arguments.encoder:
        if not (arguments.adapter and arguments.encoder):
            raise UserError("--adapter and --encoder belong together: give both or neither")
        face = read_face_files(arguments.adapter, arguments.encoder)
    check_faces(face, len(request.photos))
    if face is not None:
        crops, notes = prepare_crops(request.photos, face.encoder_config.img_size)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    drawer = _load(arguments.backend, arguments.precision, base, face)
    todo = iter(request.pictures())
    with _progress(request, arguments.batch) as bar:
        for pictures in generate_batches(drawer, request, crops, batch=arguments.batch, bar=bar):
            for image in pictures:
                prompt, seed = next(todo)
                values = parameters(
                    request,
                    prompt,
                    seed,
                    base,
                    adapter=arguments.adapter,
                    encoder=arguments.encoder,
                    backend=arguments.backend,
                    precision=arguments.precision,
                )
                tqdm.write(str(save_picture(image, arguments.out, values)))


def _request(arguments: argparse.Namespace):
    from fact_jax.fact import Guidance
    from infer.request import Photo, Request

    if arguments.count < 1:
        raise UserError(f"--count must be at least 1, got {arguments.count}")
    columns = [arguments.photo]
    for name in ("points", "mask", "parsing", "face_index"):
        column = getattr(arguments, name)
        if column and len(column) != len(arguments.photo):
            raise UserError(
                f"--{name.replace('_', '-')} was given {len(column)} times for "
                f"{len(arguments.photo)} photos: "
                "give it once for each, in their order, or not at all"
            )
        columns.append(column or [None] * len(arguments.photo))
    photos = [
        Photo(
            path=path,
            points=points,
            mask=mask,
            parsing=parsing,
            index=index,
            pack=arguments.detector,
        )
        for path, points, mask, parsing, index in zip(*columns, strict=True)
    ]
    return Request(
        prompts=arguments.prompt,
        seeds=range(arguments.seed, arguments.seed + arguments.count),
        photos=photos,
        negative=arguments.negative,
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance=Guidance(
            text=arguments.guidance,
            face=arguments.face_guidance,
            negative_face=arguments.negative_face,
            face_scale=arguments.face_scale,
            start=arguments.face_start,
            stop=arguments.face_stop,
        ),
        height=arguments.height,
        width=arguments.width,
    )


def _load(backend: str, precision: str, base, face):
    if backend == "flax":
        import jax.numpy as jnp

        from infer.flax_pipeline import FlaxPipeline

        return FlaxPipeline.load(base, face=face, dtype=jnp.dtype(precision))
    try:
        import torch
        import transformers

        # Its start tells a user of diffusers nothing that they could act on.
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
    except ImportError as error:
        raise UserError(
            f"--backend torch needs PyTorch and diffusers ({error}): pip install 'fact-jax[torch]'"
        ) from None
    from infer.torch_pipeline import TorchPipeline

    return TorchPipeline.load(base, face=face, dtype=getattr(torch, precision))


@contextlib.contextmanager
def _progress(request, batch: int):
    """A bar over all calls of the UNet; None where nobody watches."""
    from tqdm import tqdm

    from fact_jax.samplers import num_model_calls

    batches = -(-len(request.pictures()) // max(batch, 1))
    total = batches * num_model_calls(request.sampler, request.steps)
    with tqdm(total=total, desc="drawing", unit="step", disable=None) as bar:
        yield None if bar.disable else bar


def _face(arguments: argparse.Namespace) -> None:
    from infer.images import check_folder, save_image
    from infer.photos import prepare, show
    from infer.request import Photo

    if arguments.out.suffix.lower() != ".png":
        raise UserError(f"{arguments.out}: the picture is a PNG, name it so")
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
    found = prepare(photo, arguments.size)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    save_image(show(found), arguments.out, {"photo": arguments.photo.name}, None)
    print(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
