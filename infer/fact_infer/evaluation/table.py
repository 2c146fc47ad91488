"""The table of an evaluation: which measures in which rows, as text."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fact_jax.metrics.intervals import Estimate


class Row(NamedTuple):
    """A line of the table; its cells are the measures ``<key>/fact``, ``/base`` and ``/true``."""

    key: str
    label: str
    share: bool = False


COLUMNS = {"fact": "FACT", "base": "base model", "true": "true photo"}
# Section -> rows that stand in it where they were measured.
SECTIONS: dict[str, tuple[Row, ...]] = {
    "Identity (cosine of the independent recogniser's embeddings)": (
        Row("reference", "similarity to the reference photo"),
        Row("another", "similarity to another photo of the person"),
        Row("wrong", "similarity to the next person's reference photo"),
        Row("over_base", "FACT minus base model, to the reference"),
        Row("over_wrong", "right minus wrong person"),
        Row("rank_one", "rank-1: nearest of all people's other photos", share=True),
        Row("found", "faces found", share=True),
    ),
    "Copied from the reference photo (1: all of it, 0: as without the photo)": (
        Row("copy_paste", "copy-paste score (-1: the other photo)"),
        Row("copied/expression", "expression, where it is not the caption's"),
        Row("copied/roll", "pose: roll"),
        Row("copied/yaw", "pose: yaw"),
        Row("copied/pitch", "pose: pitch"),
        Row("copied/mouth", "width of the mouth"),
        Row("copied/light", "side of the light"),
    ),
    "Change of pixels, FACT against base model (mean absolute, 1 = full scale)": (
        Row("head/inside", "inside the head"),
        Row("head/outside", "outside the head"),
        Row("head/ratio", "outside / inside the head"),
        Row("face/inside", "inside the face"),
        Row("face/outside", "outside the face"),
        Row("face/ratio", "outside / inside the face"),
    ),
    "Leakage inside the model (0: none)": (
        Row("latents", "latents outside the head, of the base's"),
        Row("fair", "FAIR, mean of all blocks"),
    ),
    "Colours (mean absolute error over RGB, 1 = full scale)": (
        Row("hair", "hair"),
        Row("skin", "skin"),
        Row("iris", "eyes"),
        Row("lips", "lips"),
    ),
    "Shape of the face (mean absolute error, in standard deviations over people)": (
        Row("brow_thickness", "brows: thickness"),
        Row("brow_tilt", "brows: tilt"),
        Row("brow_height", "brows: height"),
        Row("mouth_width", "mouth: width"),
        Row("lip_fullness", "mouth: fullness of the lips"),
    ),
    "Captions followed, by the parser": (
        Row("caption/expression", "expression", share=True),
        Row("caption/glasses", "glasses", share=True),
        Row("caption/shirt", "shirt", share=True),
        Row("caption/background", "background", share=True),
        Row("caption/pattern", "pattern", share=True),
        Row("caption/all", "mean of the five", share=True),
    ),
    "Text and variety": (
        Row("clip", "CLIP cosine of picture and prompt"),
        Row("diversity/pixels", "over seeds: mean difference of pixels"),
        Row("diversity/features", "over seeds: 1 - cosine of features"),
    ),
    "Distance of the set from true photos": (
        Row("kid", "KID"),
        Row("fid", "FID (biased: compare equal numbers only)"),
    ),
}


def cell(estimate: Estimate, share: bool) -> str:
    """``0.512 [0.480, 0.544]``, a share in percent; without its interval where there is none."""
    if not estimate.n:
        return "-"
    numbers = [100 * x for x in estimate[:3]] if share else list(estimate[:3])
    form = "{:.0f}" if share else "{:.3f}"
    texts = [form.format(x) for x in numbers]
    value = texts[0] + (" %" if share else "")
    return value if texts[1] == "nan" else f"{value} [{texts[1]}, {texts[2]}]"


def table(
    measures: Mapping[str, Estimate], columns: Mapping[str, str] = COLUMNS
) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Section by section: its title, and its lines as label and one text a column.

    Rows and sections of which nothing was measured are left out.
    """
    sections = []
    for title, rows in SECTIONS.items():
        lines = []
        for row in (*rows, *_blocks(measures, rows)):
            found = [measures.get(f"{row.key}/{column}") for column in columns]
            if any(one is not None for one in found):
                texts = ["" if one is None else cell(one, row.share) for one in found]
                lines.append((row.label, texts))
        if lines:
            sections.append((title, lines))
    return sections


def _blocks(measures: Mapping[str, Estimate], rows: Sequence[Row]) -> list[Row]:
    """FAIR by block, whichever blocks the model has."""
    if not any(row.key == "fair" for row in rows):
        return []
    names = [
        key.split("/")[1] for key in measures if key.startswith("fair/") and key.count("/") > 1
    ]
    return [Row(f"fair/{name}", f"FAIR, {name}") for name in dict.fromkeys(names)]


def plain_table(
    measures: Mapping[str, Estimate], notes: Sequence[str], columns: Mapping[str, str] = COLUMNS
) -> str:
    """The table as text, with lines of explanation under it."""
    text = [f"{'':50s}" + "".join(f"{name:>25s}" for name in columns.values())]
    for title, lines in table(measures, columns):
        text += ["", title]
        text += [f"  {label:48s}" + "".join(f"{c:>25s}" for c in cells) for label, cells in lines]
    return "\n".join([*text, "", *notes]).rstrip() + "\n"
