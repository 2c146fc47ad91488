"""Captions of scenes, from a closed vocabulary; they never describe the identity."""

import numpy as np

from fact_jax.portraits.scene import BACKGROUNDS, EXPRESSIONS, GLASSES, PATTERNS, SHIRTS, Scene

GENERIC_CAPTION = "a portrait of a person"

# With and without glasses, a line for each phrasing.
_PHRASINGS = (
    "a portrait of a {expression} person{glasses} wearing {shirt} shirt"
    " on {background} {pattern} background",
    "a {expression} person{glasses} in {shirt} shirt, {background} {pattern} background",
    "portrait of a person in {shirt} shirt{glasses}, {expression},"
    " on {background} {pattern} background",
)
_FRAME_WORDS = (
    "a", "an", "of", "on", "in", "with", "wearing", "portrait", "person", "shirt", "glasses",
    "background", ",",
)  # fmt: skip
_ATTRIBUTES = {*EXPRESSIONS, *GLASSES[1:], *SHIRTS, *BACKGROUNDS, *PATTERNS}

# Every word (and the comma) that a caption can hold.
VOCABULARY: tuple[str, ...] = tuple(sorted({*_FRAME_WORDS, *_ATTRIBUTES}))


def _with_article(colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"


def captions(scene: Scene) -> list[str]:
    """One caption a row of the scene."""
    fields = {
        name: np.asarray(getattr(scene, name))
        for name in ("expression", "glasses", "shirt", "background", "pattern", "phrasing")
    }
    lines = []
    for i in range(len(fields["phrasing"])):
        glasses = GLASSES[fields["glasses"][i]]
        lines.append(
            _PHRASINGS[fields["phrasing"][i]].format(
                expression=EXPRESSIONS[fields["expression"][i]],
                glasses="" if glasses == "none" else f" with {glasses} glasses",
                shirt=_with_article(SHIRTS[fields["shirt"][i]]),
                background=_with_article(BACKGROUNDS[fields["background"][i]]),
                pattern=PATTERNS[fields["pattern"][i]],
            )
        )
    return lines
