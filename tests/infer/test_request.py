"""Requests: what is refused, and in which order pictures come."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fact_convert import tokenize
from fact_infer.input_images import read_inputs, read_regions
from fact_infer.parts import Parts, read_base
from fact_infer.pipeline import Pipeline
from fact_infer.request import GenerationParams, GenerationRequest, Photo
from fact_jax.fact import Guidance
from fact_jax.utils.errors import UserError


def photos(*people: int) -> list[Photo]:
    return [Photo(path=Path("a.png"), person=person) for person in people]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "heun"}, "no sampler 'heun'; known are ddim, pndm"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"guidance": Guidance(text=0.5)}, "guidance must lie in 1..50, got 0.5"),
        ({"guidance": Guidance(text=float("nan"))}, "guidance must lie in 1..50, got nan"),
        ({"guidance": Guidance(face=-1.0)}, "face guidance must lie in 0..50, got -1"),
        ({"guidance": Guidance(face_scale=2.5)}, "face scale must lie in 0..2, got 2.5"),
        ({"guidance": Guidance(face_scale=(0.5, 2.5))}, "face scale must lie in 0..2, got 2.5"),
        (
            {"guidance": Guidance(block_scales=(("up", -1.0),))},
            "block scale 'up' must lie in 0..2, got -1",
        ),
        ({"photos": photos(1)}, r"photos must be of person 0, then 1 and so on, got \[1\]"),
        ({"photos": photos(0, 1, 0)}, r"got \[0, 1, 0\]"),
        ({"photos": photos(0, 0, 1)}, "there are 2 of person 0, 1 of person 1"),
        ({"photos": photos(0, 1)}, "2 people and 0 regions: each person needs one"),
        ({"photos": photos(0), "regions": [Path("a")] * 2}, "1 people and 2 regions"),
        ({"regions": [Path("a")]}, "0 people and 1 regions"),
        ({"height": 0}, "height must lie in 1..8192 pixels, got 0"),
        ({"width": 100_000}, "width must lie in 1..8192 pixels, got 100000"),
        ({"prompts": ()}, "at least one prompt and one seed"),
        ({"seeds": range(2_000_000)}, "at most 1,000,000 pictures"),
        ({"seeds": (-1,)}, "a seed must lie in 0..2147483647, got -1"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError, match=message):
        GenerationRequest(**({"prompts": ("a man",)} | changes))


def test_base_refuses_what_it_cannot_draw(base_folder):
    base = read_base(base_folder)
    assert base.latent_size(GenerationParams()) == (16, 16)
    assert base.latent_size(GenerationParams(height=16, width=40)) == (8, 20)
    for changes, message in (
        ({"width": 36}, "width 36: with this base it must be a multiple of 8"),
        ({"steps": 1001}, "steps must lie in 1..1000, got 1001"),
        ({"sampler": "lcm", "steps": 51}, "lcm takes at most 50 steps, got 51"),
        ({"guidance": Guidance(block_scales=(("top", 1.0),))}, "'top': found in the path of no"),
    ):
        with pytest.raises(UserError, match=message):
            base.check(GenerationParams(**changes))


class Recorder(Pipeline):
    """Draws the first letter of the prompt and the seed."""

    from_parts = _generate = None

    def __init__(self, base):
        super().__init__(Parts(base=base))
        self.batches = []

    def generate(self, prompts, seeds, crops, params, *, bar=None):
        assert crops is None
        self.batches.append(len(prompts))
        return np.array(
            [[[[ord(p[0]), s, 0]]] for p, s in zip(prompts, seeds, strict=True)], np.uint8
        )


def test_pictures_in_order_in_batches_of_one_shape(base_folder):
    pipeline = Recorder(read_base(base_folder))
    asked = GenerationRequest(prompts=("a", "b", "c"), seeds=range(5, 7))
    pictures = pipeline.generate_request(asked, batch=4)
    assert pipeline.batches == [4, 4]
    assert pictures[:, 0, 0, :2].tolist() == [
        [ord(prompt), seed] for prompt, seed in asked.pictures()
    ]
    with pytest.raises(UserError, match="a batch holds at least one"):
        pipeline.generate_request(asked, batch=0)


def test_files_are_fitted_to_the_picture(tmp_path):
    """A file twice as large is halved; of a wide one both ends are cut, and it is said."""
    large, wide = np.zeros((12, 16), np.uint8), np.zeros((6, 16), np.uint8)
    large[:, 8:] = wide[:, 4:12] = 255
    files = [tmp_path / "same.png", tmp_path / "large.png", tmp_path / "wide.png"]
    for file, pixels in zip(files, (large[::2, ::2], large, wide), strict=True):
        Image.fromarray(pixels).save(file)
    notes = []
    same, halved, cut = read_regions(files, (6, 8), notes.append)
    np.testing.assert_array_equal(same, large[::2, ::2] / 255)
    np.testing.assert_allclose(halved[:, [0, 1, 6, 7]], same[:, [0, 1, 6, 7]])
    np.testing.assert_allclose(cut, 1.0)
    assert notes == [
        f"{files[1]} is 16 x 12: scaled to 8 x 6, as what is drawn",
        f"{files[2]} is 16 x 6: scaled and cut to 8 x 6, as what is drawn",
    ]
    assert read_regions([], (6, 8)) is None


def test_a_base_keeps_its_added_tokens(base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "base")
    rows = json.loads((folder / "text_encoder" / "config.json").read_text())["vocab_size"]
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<cat-toy>": rows}))
    with pytest.raises(UserError, match="more tokens"):
        read_base(folder)
    config = {"vocab_size": rows + 1, "max_position_embeddings": 77}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    ids, _ = tokenize(read_base(folder).tokenizer, ["<cat-toy>"])
    assert ids[0, 1] == rows


def test_an_image_and_its_mask_are_fitted_alike(base_folder, tmp_path):
    """Both of another size than what is drawn; a mask of another shape belongs to nothing."""
    base = read_base(base_folder)
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, 32:64] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(image[::2, ::2, 0]).save(tmp_path / "mask.png")
    Image.fromarray(image[:, :64, 0]).save(tmp_path / "square.png")
    Image.fromarray(image[:, 20:28, 0]).save(tmp_path / "narrow.png")
    asked = {"prompts": ("a",), "image": tmp_path / "image.png", "steps": 4}
    mask = {"image_mask": tmp_path / "mask.png"}
    img2img = read_inputs(GenerationRequest(**asked, **mask), base, 2)["img2img"]
    assert img2img.images.shape == (2, 32, 32, 3)
    white = img2img.images[0, :, :, 0] > 200
    np.testing.assert_array_equal(img2img.masks[0] > 0.8, white)
    assert white[:, 9:23].all()
    assert not white[:, :7].any()
    with pytest.raises(UserError, match=r"narrow.png is 8 x 64, .*image.png is 96 x 64: they must"):
        read_inputs(GenerationRequest(**asked, image_mask=tmp_path / "narrow.png"), base, 1)
    # As large as what is drawn, whatever the image was.
    Image.new("L", (32, 32), 255).save(tmp_path / "drawn.png")
    whole = read_inputs(GenerationRequest(**asked, image_mask=tmp_path / "drawn.png"), base, 1)[
        "img2img"
    ]
    np.testing.assert_array_equal(whole.masks, 1.0)
    control = read_inputs(
        GenerationRequest(prompts=("a",), control=tmp_path / "image.png"), base, 1
    )
    np.testing.assert_array_equal(control["control"], whole.images)
