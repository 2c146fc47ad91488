"""Warnings of options that have no effect beside the others."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

_DRAWING = ("generate", "redraw")
_FACES = ("face", *_DRAWING)


class _Rule(NamedTuple):
    commands: Sequence[str]
    options: Sequence[str]
    idle: Callable[[argparse.Namespace], object]
    why: str


_RULES = (
    _Rule(("generate",), ("strength",), lambda a: not a.image, "without --image"),
    _Rule(
        ("generate",),
        ("image",),
        lambda a: a.strength == 1 and not a.image_mask,
        "at --strength 1 without --image-mask",
    ),
    _Rule(_DRAWING, ("control-scale",), lambda a: not a.controlnet, "without --controlnet"),
    _Rule(_DRAWING, ("negative",), lambda a: a.guidance == 1, "at --guidance 1"),
    _Rule(_DRAWING, ("negative-face",), lambda a: a.guidance == 1, "at --guidance 1"),
    _Rule(
        _DRAWING,
        ("combine",),
        lambda a: a.photo and len(a.photo) == len(set(a.person) or {0}),
        "with one photo of each person",
    ),
    _Rule(_FACES, ("mask",), lambda a: a.parsing, "beside --parsing, which is taken"),
    _Rule(("face",), ("detector",), lambda a: a.points, "beside --points"),
    _Rule(("generate",), ("detector",), lambda a: a.points and a.best is None, "beside --points"),
    _Rule(("redraw",), ("detector",), lambda a: a.points and a.area, "beside --points and --area"),
    _Rule(
        ("generate",),
        (
            *("face-scale", "block-scale", "face-start", "face-stop", "face-guidance"),
            *("negative-face", "combine", "face-cap", "adain", "detector"),
        ),
        lambda a: not a.photo,
        "without --photo",
    ),
    _Rule(
        ("plan",),
        ("encoder", "photos", "face-guidance"),
        lambda a: not a.adapter,
        "without --adapter",
    ),
    _Rule(
        ("evaluate",),
        (
            *("base", "encoder", "people", "photos", "seeds", "seed", "batch", "sampler", "steps"),
            *("guidance", "height", "width", "face-scale", "block-scale", "face-start"),
            *("face-stop", "face-guidance", "negative-face", "combine", "face-cap", "adain"),
        ),
        lambda a: a.pictures,
        "beside --pictures, which are there already",
    ),
    _Rule(
        ("evaluate",),
        ("detector",),
        lambda a: not a.pictures and not a.folder,
        "in the portrait world, whose points the judge finds",
    ),
    _Rule(
        ("evaluate",),
        ("judge",),
        lambda a: (a.pictures or a.folder) and a.recogniser and "judge" not in a.recogniser,
        "beside --recogniser, unless one of them is 'judge'",
    ),
    _Rule(("report",), ("points",), lambda a: not a.photo, "without --photo"),
    _Rule(("report",), ("flax",), lambda a: not a.torch, "without --torch"),
    _Rule(("report",), ("torch",), lambda a: not a.flax, "without --flax"),
)


def without_effect(arguments: argparse.Namespace, words: Sequence[str]) -> Iterator[str]:
    """A line for each option in ``words`` that has no effect; abbreviations are not taken."""
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    for rule in _RULES:
        if arguments.command not in rule.commands:
            continue
        named = [f"--{option}" for option in rule.options if f"--{option}" in given]
        if named and rule.idle(arguments):
            verb = "has" if len(named) == 1 else "have"
            yield f"{', '.join(named)} {verb} no effect {rule.why}"
