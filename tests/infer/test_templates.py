"""Templates: which face is meant, what the mask covers, and that nothing else changes."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from fact_infer.img2img import Img2ImgInput
from fact_infer.parts import read_base
from fact_infer.request import GenerationParams
from fact_infer.templates import (
    FaceTarget,
    InpaintParams,
    InpaintRequest,
    cut_square,
    find_template,
    inpaint_faces,
    paste,
    square_around,
    widen,
)
from fact_jax.fact import Guidance
from fact_jax.utils.errors import UserError

POINTS = np.array([[24.0, 28.0], [41.0, 27.0], [33.0, 38.0], [26.0, 46.0], [40.0, 45.0]])


class Inverter:
    """Stands for a backend: gives back its input inverted, and remembers what it was asked."""

    def __init__(self, base):
        self.base, self.asked = base, []

    def generate(self, prompts, seeds, crops, params, *, img2img=None, bar=None, **control):
        img2img.check(self.base, params, len(prompts))
        self.asked.append((list(prompts), list(seeds), crops[:, 0, 0, 0, 0].tolist(), img2img))
        return 255 - img2img.images


@pytest.fixture(scope="module")
def base(base_folder):
    return read_base(base_folder)


@pytest.fixture
def template(tmp_path):
    """180 x 100, with three faces that its file names in another order than from the left."""
    noise = np.random.default_rng(0).integers(0, 256, (100, 180, 3), np.uint8)
    path = tmp_path / "group.png"
    Image.fromarray(noise).save(path)
    half = POINTS / 2 + (130, 40)
    faces = [{"points": (POINTS + (x, 10)).tolist()} for x in (70, -5)]
    (tmp_path / "group.points.json").write_text(
        json.dumps({"faces": [*faces, {"points": half.tolist()}]})
    )
    return find_template(path)[0]


def crops(value: int, photos: int = 1) -> np.ndarray:
    return np.full((photos, 32, 32, 3), value, np.uint8)


def test_faces_are_counted_from_the_left_and_chosen_by_number_or_box(template):
    middles = [face.points[:, 0].mean() for face in template.faces]
    assert middles == sorted(middles)
    assert len(middles) == 3
    assert template.face_in((85, 20, 130, 70)) == 1
    template.check_face(2)
    with pytest.raises(UserError, match=re.escape("no face 3 in group.png: 3 found")):
        template.check_face(3)
    with pytest.raises(UserError, match="lies in the box 170, 0, 175, 4"):
        template.face_in((170, 0, 175, 4))
    with pytest.raises(UserError, match="there are faces at no place"):
        dataclasses.replace(template, faces=()).face_in((0, 0, 9, 9))


def test_large_templates_keep_their_size(tmp_path):
    path = tmp_path / "large.jpg"
    Image.new("RGB", (2500, 1250), "grey").save(path)
    (tmp_path / "large.points.json").write_text(json.dumps({"points": (POINTS * 10).tolist()}))
    found, _ = find_template(path)
    assert found.image.shape == (1250, 2500, 3)
    np.testing.assert_allclose(found.faces[0].points, POINTS * 10, atol=1e-3)


def test_mask_grows_and_fades_by_distance():
    mask = np.zeros((12, 15), np.float32)
    mask[4, 5] = 1.0
    wide = widen(mask, 2.0, 2.0)
    assert wide[4, 5] == wide[4, 7] == wide[2, 5] == wide[5, 6] == 1.0
    assert wide[4, 8] == 0.5
    np.testing.assert_allclose(wide[5, 7], 1 - (5**0.5 - 2) / 2, atol=1e-6)
    assert wide[4, 9] == wide[8, 5] == wide[4, 0] == 0.0
    assert (widen(mask, 0.0, 0.0) == mask).all()
    assert not widen(np.zeros_like(mask), 2.0, 2.0).any()
    # Grey stays where it is; what is below a half all over is left as it is.
    mask[4, 4], mask[9, 9] = 0.4, 0.3
    assert (widen(mask, 0.0, 0.0) == mask).all()
    assert (widen(mask, 2.0, 2.0) == np.maximum(wide, mask)).all()
    assert (widen(mask / 3, 2.0, 2.0) == mask / 3).all()


def test_square_that_reaches_over_the_edges_is_pasted_back_where_it_was():
    mask = np.zeros((20, 30), np.float32)
    mask[1:9, 22:30] = 1.0
    left, top, side = square_around(mask, 0.5)
    assert (left, top, side) == (18, -3, 16)
    image = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    cut = cut_square(image, (left, top, side), mode="edge")
    assert cut.shape == (16, 16, 3)
    np.testing.assert_array_equal(cut[3:, :12], image[:13, 18:])
    np.testing.assert_array_equal(cut[0], cut[3])
    np.testing.assert_array_equal(cut[:, 15], cut[:, 11])
    inside = cut_square(mask, (left, top, side), mode="constant")
    pasted = paste(image, 255 - cut, inside, (left, top, side))
    np.testing.assert_array_equal(pasted, np.where(mask[..., None] > 0, 255 - image, image))


def test_half_of_the_mask_is_half_of_both():
    image, drawn = np.full((8, 8, 3), 10, np.uint8), np.full((4, 4, 3), 201, np.uint8)
    mask = np.zeros((4, 4), np.float32)
    mask[1, 1], mask[2, 2] = 0.5, 1.0
    pasted = paste(image, drawn, mask, (2, 2, 4))
    assert pasted[3, 3].tolist() == [106, 106, 106]
    assert pasted[4, 4].tolist() == [201, 201, 201]
    assert (pasted != 10).sum() == 6


def test_only_what_the_masks_cover_changes(base, template, tmp_path):
    other = Image.fromarray(template.image[:80, :90])
    other.save(tmp_path / "small.png")
    (tmp_path / "small.points.json").write_text(json.dumps({"points": POINTS.tolist()}))
    small, _ = find_template(tmp_path / "small.png")
    mask = np.zeros(template.image.shape[:2], np.float32)
    mask[20:70, 0:40] = 1.0
    requests = [
        InpaintRequest(
            template=template,
            targets=(FaceTarget(crops=crops(1), mask=mask), FaceTarget(index=2, crops=crops(2))),
            prompt="a man",
            seed=5,
        ),
        InpaintRequest(template=small, targets=(), prompt="nobody"),
        InpaintRequest(
            template=small, targets=(FaceTarget(index=0, crops=crops(3)),), prompt="a woman", seed=6
        ),
    ]
    pipeline = Inverter(base)
    how = InpaintParams(strength=0.5, grow=0.0, soften=0.0)
    group, same, one = inpaint_faces(pipeline, requests, GenerationParams(steps=4), how, batch=2)
    (prompts, seeds, people, img2img), second = pipeline.asked
    assert (prompts, seeds, people) == (["a man", "a man"], [5, 5], [1, 2])
    assert second[:3] == (["a woman"] * 2, [6] * 2, [3] * 2)
    assert img2img.images.shape == (2, 32, 32, 3)
    assert img2img.latent_mask.any()
    assert not img2img.latent_mask.all()
    np.testing.assert_array_equal(same, small.image)
    changed = (group != template.image).any(-1)
    by_points = changed & (mask == 0)
    assert by_points[:, :100].sum() == 0
    assert 200 < by_points.sum() < 2000
    assert changed[mask > 0].mean() > 0.9
    assert one.shape == small.image.shape
    assert 0 < (one != small.image).any(-1).mean() < 0.5


def test_a_job_twice_is_done_twice(base, template):
    request = InpaintRequest(
        template=template, targets=(FaceTarget(index=1, crops=crops(1)),), prompt=""
    )
    one, other = inpaint_faces(
        Inverter(base), [request, request], GenerationParams(steps=4), InpaintParams()
    )
    assert (one != template.image).any()
    np.testing.assert_array_equal(one, other)


def test_a_place_is_a_face_or_a_mask():
    for where in ({}, {"index": 0, "mask": np.ones((5, 7), np.float32)}):
        with pytest.raises(UserError, match="either the number of a face or a mask"):
            FaceTarget(crops=crops(1), **where)


def test_what_cannot_be_done_is_said_before_anything_is_drawn(base, template):
    target = FaceTarget(index=0, crops=crops(1))
    with pytest.raises(UserError, match="is 7 x 5, the template is 180 x 100"):
        InpaintRequest(
            template=template,
            targets=(FaceTarget(crops=crops(1), mask=np.ones((5, 7), np.float32)),),
            prompt="",
        )
    with pytest.raises(UserError, match="no face 4 in"):
        InpaintRequest(template=template, targets=(FaceTarget(index=4, crops=crops(1)),), prompt="")

    def redraw(*targets, params=None, how=None):
        request = InpaintRequest(template=template, targets=targets, prompt="")
        inpaint_faces(
            Inverter(base), [request], params or GenerationParams(steps=4), how or InpaintParams()
        )

    for error, arguments in {
        "the same number of photos": {"targets": (target, FaceTarget(index=1, crops=crops(2, 2)))},
        "drawn in squares": {"params": GenerationParams(width=64, height=32)},
        "multiple of": {"params": GenerationParams(width=20, height=20)},
        "group.png: the mask is empty": {
            "targets": (FaceTarget(crops=crops(1), mask=np.zeros((100, 180), np.float32)),)
        },
    }.items():
        with pytest.raises(UserError, match=error):
            redraw(*arguments.pop("targets", (target,)), **arguments)
    with pytest.raises(UserError, match="fill must lie in"):
        InpaintParams(fill=0.0)
    with pytest.raises(UserError, match="strength must lie above 0"):
        InpaintParams(strength=1.5)
    with pytest.raises(UserError, match="leaves none of 4 steps"):
        redraw(target, how=InpaintParams(strength=0.2))


@pytest.mark.heavy
def test_torch_masked_image_to_image(files, base):
    from fact_infer.photos import prepare_crops
    from fact_infer.request import Photo
    from fact_infer.torch.pipeline import TorchPipeline
    from fact_jax.diffusion.samplers import model_calls

    torch = TorchPipeline.load(base, files.adapter, files.encoder)
    face = prepare_crops([Photo(path=files.photo)], 32)[0][None]
    image = np.asarray(Image.open(files.photo).convert("RGB").resize((40, 32)))[None]
    calls, latents = [], []
    torch.pipe.vae.post_quant_conv.register_forward_pre_hook(lambda _, args: latents.append(*args))
    torch.pipe.unet.register_forward_pre_hook(lambda _, args: calls.append(float(args[1])))

    def draw(img2img, sampler="ddim", steps=4):
        calls.clear()
        params = GenerationParams(
            sampler=sampler, steps=steps, guidance=Guidance(text=3.0), height=32, width=40
        )
        return torch.generate(["a man"], [3], face, params, img2img=img2img)[0].astype(float)

    plain = draw(None)
    np.testing.assert_array_equal(draw(Img2ImgInput.whole(image, 1.0, base)), plain)
    start = draw(Img2ImgInput.whole(image, 0.25, base))
    assert len(calls) == 1
    nothing = Img2ImgInput(images=image, latent_mask=np.zeros((1, 16, 20), bool), strength=0.8)
    decoded = draw(nothing)
    assert np.abs(start - decoded).mean() < np.abs(plain - decoded).mean()
    own = latents.pop()
    half = nothing.latent_mask.copy()
    half[:, :, 10:] = True
    draw(Img2ImgInput(images=image, latent_mask=half, strength=1.0))
    assert (latents[-1][..., :10] == own[..., :10]).all()
    assert (latents[-1][..., 10:] != own[..., 10:]).all()
    for sampler in ("pndm", "euler", "dpmpp_2m_karras"):
        draw(Img2ImgInput.whole(image, 0.6, base), sampler, 5)
        assert calls == model_calls(sampler, base.schedule, 5, 2)[1].tolist(), sampler
