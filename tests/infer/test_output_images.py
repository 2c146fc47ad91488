"""Picture files: their names, and what they say of themselves."""

import json

import numpy as np
from PIL import Image

from fact_infer.output_images import describe, parameters, picture_path, save_picture
from fact_infer.parts import read_base
from fact_infer.request import GenerationRequest, Photo
from fact_jax.fact import Guidance

IMAGE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def test_metadata_in_both_forms(base_folder, tmp_path):
    asked = GenerationRequest(
        prompts=("Zoë, smiling",),
        negative="blurred",
        photos=(Photo(path=tmp_path / "one.png"), Photo(path=tmp_path / "two.png")),
        guidance=Guidance(text=3.0, face_scale=0.7),
        width=40,
    )
    values = parameters(asked, "Zoë, smiling", 9, read_base(base_folder), backend="flax")
    path = save_picture(IMAGE, tmp_path / "new" / "folder", values)
    assert path.name == "zoë-smiling-seed9.png"
    with Image.open(path) as opened:
        np.testing.assert_array_equal(np.asarray(opened), IMAGE)
        text = dict(opened.text)
    assert json.loads(text["fact_jax"]) == values
    assert values["face"]["photos"] == ["one.png", "two.png"]
    assert (values["height"], values["width"]) == (32, 40)
    first, second, rest = text["parameters"].split("\n")
    assert (first, second) == ("Zoë, smiling", "Negative prompt: blurred")
    for part in ("seed: 9", "steps: 50", "face photos: one.png + two.png", "face face_scale: 0.7"):
        assert part in rest.split(", ")


def test_nothing_is_overwritten(tmp_path):
    values = {"prompt": "A man!", "negative": "", "seed": 1}
    names = [save_picture(IMAGE, tmp_path, values).name for _ in range(3)]
    assert names == ["a-man-seed1.png", "a-man-seed1-2.png", "a-man-seed1-3.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    assert save_picture(IMAGE, tmp_path, values | {"prompt": "///"}).name == "picture-seed1.png"
    long = save_picture(IMAGE, tmp_path, values | {"prompt": "word " * 100}).name
    assert len(long) < 80
    # Letters of four bytes, and a template's long name.
    letters = save_picture(IMAGE, tmp_path, values | {"prompt": "\U00020000" * 100, "seed": 2**31})
    assert letters.exists()
    assert len(picture_path(tmp_path, "n" * 250, ".png").name) == 204
    assert describe(values) == "A man!\nseed: 1"
