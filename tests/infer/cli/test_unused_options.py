"""Options that change nothing are said."""

import re

import jax
import numpy as np
import pytest

from fact_infer.cli.main import _parser
from fact_infer.cli.unused_options import _RULES, without_effect
from fact_jax.fact import combine_photos

FACE = ["face", "a.png", "--out", "b.png"]
GENERATE = ["generate", "--base", "b", "--prompt", "p"]
ONE = [*GENERATE, "--photo", "a", "--adapter", "x", "--encoder", "y"]
TWO = [*ONE, "--photo", "b"]
REDRAW = ["redraw", "t.png", *ONE[1:3], *ONE[5:]]
PLAN = ["plan", "--gpu", "h100", "--base", "b"]
EVALUATE = ["evaluate", "--pictures", "p", "--out", "o"]
REPORT = ["report", "--training", "t", "--evaluation", "e", "--out", "o"]


@pytest.mark.parametrize(
    ("words", "options", "line"),
    [
        (GENERATE, ["--strength", "0.6"], "--strength has no effect without --image"),
        (GENERATE, ["--strength=0.6", "--image", "i"], None),
        (GENERATE, ["--strength", "1", "--image", "i"], "--image has no effect at --strength 1"),
        (GENERATE, ["--strength", "1", "--image", "i", "--image-mask", "m"], None),
        (GENERATE, ["--control-scale", "1"], "--control-scale has no effect without --controlnet"),
        (REDRAW, ["--control-scale", "1"], "--control-scale has no effect without --controlnet"),
        (REDRAW, ["--controlnet", "n", "--control-scale", "1"], None),
        (ONE, ["--mask", "m", "--parsing", "p"], "--mask has no effect beside --parsing"),
        (REDRAW, ["--mask", "m", "--parsing", "p"], "--mask has no effect beside --parsing"),
        (FACE, ["--mask", "m", "--parsing", "p"], "--mask has no effect beside --parsing"),
        (FACE, ["--detector", "d", "--points", "p"], "--detector has no effect beside --points"),
        (ONE, ["--detector", "d", "--points", "p"], "--detector has no effect beside --points"),
        (ONE, ["--detector", "d", "--points", "p", "--best", "1"], None),
        (REDRAW, ["--detector", "d", "--points", "p"], None),
        (REDRAW, ["--detector", "d", "--points", "p", "--area", "a"], "beside --points and --area"),
        (GENERATE, ["--negative", "n", "--guidance", "1"], "--negative has no effect at --guid"),
        (ONE, ["--negative-face", "same", "--guidance", "1"], "--negative-face has no effect at"),
        (ONE, ["--combine", "average"], "--combine has no effect with one photo of each person"),
        (TWO, ["--combine", "average"], None),
        (
            [*TWO, "--person", "0", "--person", "1"],
            ["--combine", "average"],
            "--combine has no effect with one photo of each person",
        ),
        (
            GENERATE,
            ["--adain", "--face-scale", "0.5"],
            "--face-scale, --adain have no effect without --photo",
        ),
        (PLAN, ["--photos", "2"], "--photos has no effect without --adapter"),
        (PLAN, ["--adapter", "a", "--photos", "2", "--encoder", "e"], None),
        (EVALUATE, ["--steps", "5"], "--steps has no effect beside --pictures"),
        (EVALUATE, ["--recogniser", "r", "--judge", "j"], "--judge has no effect beside --recog"),
        (EVALUATE, ["--recogniser", "r", "--recogniser", "judge", "--judge", "j"], None),
        (REPORT, ["--points", "p"], "--points has no effect without --photo"),
        (REPORT, ["--flax", "f"], "--flax has no effect without --torch"),
        (REPORT, ["--torch", "f"], "--torch has no effect without --flax"),
        (REPORT, ["--flax", "f", "--torch", "f"], None),
    ],
)
def test_said_where_it_is_so(words, options, line):
    words = [*words, *options]
    said = list(without_effect(_parser().parse_args(words), words))
    assert len(said) == (line is not None)
    assert line is None or line in said[0]


def test_every_rule_names_options_that_there_are():
    help_of = {}
    for action in _parser()._actions:
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            help_of = {name: command.format_help() for name, command in action.choices.items()}
    for rule in _RULES:
        for command in rule.commands:
            for option in rule.options:
                assert re.search(rf"--{option}\b", help_of[command]), (command, option)


def test_one_photo_is_combined_to_itself():
    tokens = jax.random.normal(jax.random.key(0), (2, 1, 4, 8))
    for how in ("concat", "average", "normalized"):
        np.testing.assert_allclose(combine_photos(tokens, how), tokens[:, 0], rtol=1e-5)
