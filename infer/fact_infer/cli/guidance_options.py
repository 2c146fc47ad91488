"""The options that steer a face: how strongly, where, when and in which manner."""

import argparse
import math
from pathlib import Path

from fact_jax.utils.errors import UserError


def add_steering_options(group: argparse._ActionsContainer) -> None:
    """Add what :func:`read_guidance` reads to a group of options."""
    _add_strength(group)
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


def add_people_options(group: argparse._ActionsContainer) -> None:
    """Several people in one picture."""
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
    """Which photos are of one person."""
    group.add_argument(
        "--person",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help=f"{meaning}, from 0; once for each photo",
    )


def add_base_options(group: argparse._ActionsContainer) -> None:
    """What is added to a base."""
    group.add_argument(
        "--lora",
        type=_pair,
        action="append",
        default=[],
        metavar="FILE=X",
        help="a LoRA's file, or peft's folder, added to the base X times; may be repeated",
    )
    group.add_argument("--controlnet", metavar="DIR", help="folder of a ControlNet")


def add_input_options(group: argparse._ActionsContainer) -> None:
    """Pictures to draw over or to be steered by."""
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
    """The strength of a ControlNet."""
    group.add_argument(
        "--control-scale", type=float, default=1.0, metavar="X", help="how much it steers, 0 to 2"
    )


def check_control(arguments: argparse.Namespace) -> None:
    """UserError for a ControlNet without a picture, or a picture without a ControlNet."""
    if bool(arguments.control) != bool(arguments.controlnet):
        raise UserError("--control and --controlnet belong together: give both or neither")


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


def read_guidance(arguments: argparse.Namespace):
    """The guidance that was asked for."""
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
