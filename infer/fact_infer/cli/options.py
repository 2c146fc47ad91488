"""Options that ``generate`` and ``redraw`` share, and their parsing."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fact_jax.utils.errors import UserError

if TYPE_CHECKING:
    from fact_infer.request import Photo
    from fact_jax.fact import Guidance

# What SAMPLERS holds, which would be slow to import for a --help.
_SAMPLERS = "ddim, pndm, euler, euler_ancestral, dpmpp_2m, dpmpp_2m_karras, lcm"
_PRECISIONS = ("float32", "tf32", "bfloat16", "float16")


def add_models(models: argparse._ActionsContainer) -> None:
    """Options of the models: files, backend, precision, LoRAs and ControlNet."""
    add_model_files(models)
    models.add_argument(
        "--backend", choices=("flax", "torch"), default="flax", help="who computes (default flax)"
    )
    models.add_argument(
        "--safety-checker",
        action="store_true",
        help="run the base's own over the pictures: what it marks comes out black (needs PyTorch)",
    )
    models.add_argument(
        "--lora",
        type=_pair,
        action="append",
        default=[],
        metavar="FILE=X",
        help="a LoRA's file, or peft's folder, added to the base X times; may be repeated",
    )


def add_model_files(models: argparse._ActionsContainer) -> None:
    """Options of what a model's programs depend on."""
    models.add_argument(
        "--base", required=True, metavar="DIR", help="diffusers folder of a Stable Diffusion 1.5"
    )
    models.add_argument(
        "--adapter",
        metavar="FILE",
        help="FACT adapter, .safetensors or .ckpt, or the folder of one with its own encoder/",
    )
    models.add_argument(
        "--encoder",
        metavar="DIR",
        help="TransFace: folder, or released .pt (default: encoder/ beside the adapter)",
    )
    models.add_argument(
        "--precision",
        choices=_PRECISIONS,
        default="float32",
        help="numbers in which UNet, text encoder and, in PyTorch, the autoencoder compute "
        "(default float32); tf32: float32 numbers, multiplied faster and less exactly on GPUs",
    )
    models.add_argument("--controlnet", metavar="DIR", help="folder of a ControlNet")


def add_sampling(group: argparse._ActionsContainer) -> None:
    """Options of sampling."""
    group.add_argument("--negative", default="", metavar="TEXT", help="negative prompt")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="first seed (default 0)")
    add_steps(group)


def add_steps(group: argparse._ActionsContainer) -> None:
    """Options of what sampling costs."""
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
    group.add_argument(
        "--batch", type=int, default=4, metavar="N", help="pictures at a time (default 4)"
    )


def add_size(group: argparse._ActionsContainer) -> None:
    """Options of the pictures' size."""
    group.add_argument("--height", type=int, metavar="PX", help="default: the base's own")
    group.add_argument("--width", type=int, metavar="PX", help="default: the base's own")


def add_files(group: argparse._ActionsContainer, folder: str) -> None:
    """Options of the files that are written."""
    group.add_argument(
        "--format",
        choices=("png", "jpg"),
        default="png",
        help="of the files (default png, which keeps every pixel; jpg rounds)",
    )
    group.add_argument(
        "--out", type=Path, default=Path(folder), metavar="DIR", help=f"default {folder}/"
    )


def add_photo_options(group: argparse._ActionsContainer, *, several: bool) -> None:
    each: dict[str, Any] = {"action": "append", "default": []} if several else {}
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


def add_guidance_options(group: argparse._ActionsContainer) -> None:
    """Add what :func:`read_guidance` reads to a group of options."""
    _add_strength(group)
    add_face_guidance(group)
    group.add_argument(
        "--negative-face",
        choices=("null", "same"),
        default="null",
        help="what the negative branch sees: no face, or the same (default null)",
    )
    group.add_argument(
        "--combine",
        choices=("concat", "average", "normalized"),
        default="concat",
        help="photos of one person: all their tokens, or the tokens' means, plain or of their "
        "directions (default concat)",
    )
    group.add_argument(
        "--face-cap",
        type=float,
        metavar="X",
        help="the adapter adds to a block at most X times what is there (default: no limit)",
    )
    group.add_argument(
        "--adain",
        action="store_true",
        help="move the face's keys and values to the picture's mean: more of the prompt's style",
    )


def add_face_guidance(group: argparse._ActionsContainer) -> None:
    """``--face-guidance``: a third branch."""
    group.add_argument(
        "--face-guidance",
        type=float,
        metavar="X",
        help="guidance of the face apart from the text's, by a third branch (default: none)",
    )


def _add_strength(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--face-scale",
        type=_numbers,
        default=1.0,
        metavar="X[,X...]",
        help="strength of the adapter, 0 to 2 (default 1; released code 0.5); several: a schedule "
        "from the first step to the last",
    )
    group.add_argument(
        "--block-scale",
        type=_pair,
        action="append",
        default=[],
        metavar="PATTERN=X",
        help="factor of the strength in blocks in whose path the regular expression is found, as "
        "up_blocks=0.5; may be repeated, the first that is found counts",
    )
    group.add_argument(
        "--face-start", type=float, default=0.0, metavar="X", help="fraction of the steps before it"
    )
    group.add_argument(
        "--face-stop", type=float, default=1.0, metavar="X", help="fraction of the steps up to it"
    )


def add_people_options(group: argparse._ActionsContainer) -> None:
    """Options for several people in one picture."""
    add_person_option(group, "whose photo it is of several people in one picture")
    group.add_argument(
        "--region",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="grey mask of where a person is drawn, scaled to the picture; once for each person",
    )


def add_person_option(group: argparse._ActionsContainer, meaning: str) -> None:
    """``--person``: whose photo it is."""
    group.add_argument(
        "--person",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help=f"{meaning}, from 0; once for each photo",
    )


def add_input_options(group: argparse._ActionsContainer) -> None:
    """Options of image-to-image and ControlNet."""
    group.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="a picture to draw over, scaled and cut to the size drawn",
    )
    group.add_argument(
        "--image-mask",
        type=Path,
        metavar="FILE",
        help="grey mask, of the shape of --image, of what is drawn anew (default: all); where it "
        "is black every pixel stays as it is",
    )
    group.add_argument(
        "--strength",
        type=float,
        default=0.6,
        metavar="X",
        help="of --image: share of the steps that are taken, 1 forgets it (default 0.6)",
    )
    group.add_argument(
        "--control",
        type=Path,
        metavar="FILE",
        help="what the ControlNet looks at (a pose, edges), scaled and cut to the size drawn",
    )
    add_control_scale(group)


def add_control_scale(group: argparse._ActionsContainer) -> None:
    """``--control-scale``: the strength of a ControlNet."""
    group.add_argument(
        "--control-scale", type=float, default=1.0, metavar="X", help="how much it steers, 0 to 2"
    )


def check_control(arguments: argparse.Namespace) -> None:
    """UserError for a ControlNet without a picture, or a picture without a ControlNet."""
    if bool(arguments.control) != bool(arguments.controlnet):
        raise UserError("--control and --controlnet belong together: give both or neither")


def read_guidance(arguments: argparse.Namespace) -> "Guidance":
    """The ``Guidance`` of the command line."""
    from fact_jax.fact import Guidance

    return Guidance(
        text=arguments.guidance,
        face=arguments.face_guidance,
        negative_face=arguments.negative_face,
        face_scale=arguments.face_scale,
        block_scales=tuple(arguments.block_scale),
        start=arguments.face_start,
        stop=arguments.face_stop,
        cap=arguments.face_cap,
        adain=arguments.adain,
        combine=arguments.combine,
    )


def read_photos(arguments: argparse.Namespace) -> list["Photo"]:
    """The photos of the command line, each with its points, mask and so on."""
    from fact_infer.request import Photo

    columns = [arguments.photo]
    for name in ("points", "mask", "parsing", "face_index", "person"):
        column = getattr(arguments, name, [])
        if column and len(column) != len(arguments.photo):
            raise UserError(
                f"--{name.replace('_', '-')} was given {len(column)} times for "
                f"{len(arguments.photo)} photos: "
                "give it once for each, in their order, or not at all"
            )
        columns.append(column or [None] * len(arguments.photo))
    return [
        Photo(
            path=path,
            points=points,
            mask=mask,
            parsing=parsing,
            index=index,
            pack=arguments.detector,
            person=person or 0,
        )
        for path, points, mask, parsing, index, person in zip(*columns, strict=True)
    ]


def _numbers(text: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or several: X,X") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _pair(text: str) -> tuple[str, float]:
    name, _, factor = text.rpartition("=")
    try:
        found = name, float(factor)
    except ValueError:
        found = "", 0.0
    if not found[0] or not math.isfinite(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: a name, = and a number are wanted")
    return found
