"""The whole face path, from a file; and on a real photo, scikit-image's astronaut."""

import json

import numpy as np
import pytest
from PIL import Image

from fact_jax.face.align import align_face, similarity_transform, template_points, transform_points
from fact_jax.face.landmarks import ASTRONAUT_POINTS
from fact_jax.face.photo import limit_side, prepare_photo
from fact_jax.face.visualization import draw_face
from fact_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def astronaut(tmp_path_factory):
    data = pytest.importorskip("skimage.data")
    path = tmp_path_factory.mktemp("photo") / "astronaut.png"
    Image.fromarray(data.astronaut()).save(path)
    return path


def smooth_photo(height, width):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 200 // height, columns * 200 // width, rows * 0 + 90], -1).astype("u1")


def test_limit_side_by_hand():
    image = np.zeros((300, 201, 3), np.uint8)
    points = np.array([[-0.5, -0.5], [200.5, 299.5], [100.0, 149.5], [1, 2], [3, 4]])
    same, kept = limit_side(image, points, 300)
    assert same is image
    np.testing.assert_allclose(kept, points)
    small, moved = limit_side(image, points, 100)
    assert small.shape == (100, 67, 3)  # 201 / 3, rounded down
    # Corners stay corners, the middle stays the middle.
    np.testing.assert_allclose(moved[:3], [[-0.5, -0.5], [66.5, 99.5], [33.0, 49.5]], atol=1e-5)
    assert moved.dtype == np.float32


def test_a_large_photo_gives_nearly_the_crop_of_the_small_one(tmp_path):
    points = template_points(60) + [20, 30]
    crops = []
    for factor in (1, 4):
        path = tmp_path / f"{factor}.png"
        Image.fromarray(smooth_photo(120 * factor, 100 * factor)).save(path)
        scaled = (points + 0.5) * factor - 0.5
        path.with_suffix(".json").write_text(json.dumps({"points": scaled.tolist()}))
        mask = np.zeros((120 * factor, 100 * factor), np.uint8)
        mask[: 80 * factor] = 255
        mask_file = tmp_path / f"mask{factor}.png"
        Image.fromarray(mask).save(mask_file)
        prepared = prepare_photo(path, mask_file=mask_file, longest=120, crop_size=48)
        assert prepared.image.shape == (120, 100, 3)
        assert prepared.mask.shape == (120, 100)
        assert isinstance(prepared.mask, np.ndarray)
        np.testing.assert_allclose(prepared.points, points, atol=1e-3)
        crops.append(prepared.crop.astype(int))
    # The two photos are the same gradient, sampled more finely; the mask's edge is a straight line.
    assert np.abs(crops[0] - crops[1]).max() <= 6


def test_the_crop_is_that_of_image_points_and_mask(astronaut):
    prepared = prepare_photo(astronaut, points_file=ASTRONAUT_POINTS, crop_size=48)
    again = align_face(prepared.image, prepared.points, 48, prepared.mask)
    np.testing.assert_array_equal(prepared.crop, again)
    assert prepared.notes == (f"{astronaut}: head from an ellipse fitted to the points",)


def test_notes_say_which_face_was_taken(tmp_path):
    Image.fromarray(smooth_photo(150, 200)).save(tmp_path / "two.png")
    faces = [{"points": (template_points(s) + [x, 20]).tolist()} for s, x in ((50, 5), (90, 100))]
    (tmp_path / "two.json").write_text(json.dumps({"faces": faces}))
    notes = prepare_photo(tmp_path / "two.png").notes
    assert "took the largest (face 1, " in notes[0]


def test_exif_orientation_and_points_agree(astronaut, tmp_path):
    """The same photo stored lying with an orientation tag gives the same crop."""
    upright = prepare_photo(astronaut, points_file=ASTRONAUT_POINTS)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    lying = np.rot90(np.asarray(Image.open(astronaut)), 1)
    Image.fromarray(lying).save(tmp_path / "lying.png", exif=exif)
    turned = prepare_photo(tmp_path / "lying.png", points_file=ASTRONAUT_POINTS)
    np.testing.assert_array_equal(turned.crop, upright.crop)


def test_astronaut_points_land_on_the_template(astronaut):
    prepared = prepare_photo(astronaut, points_file=ASTRONAUT_POINTS)
    assert prepared.crop.shape == (112, 112, 3)
    template = template_points(112)
    landed = transform_points(prepared.points, similarity_transform(prepared.points, template))
    # A real face is no template, and a smile pulls the mouth corners up and apart.
    away = np.linalg.norm(landed - template, axis=1)
    assert away[:3].max() < 4
    assert away[3:].max() < 6
    # And the picture agrees: the pupils are the darkest patch around where the eyes should be.
    grey = prepared.crop.mean(-1)
    patch = sum(grey[dy : 108 + dy, dx : 108 + dx] for dy in range(5) for dx in range(5)) / 25
    for x, y in np.rint(template[:2]).astype(int):
        around = patch[y - 2 - 7 : y - 2 + 8, x - 2 - 7 : x - 2 + 8]
        dy, dx = np.subtract(np.unravel_index(around.argmin(), around.shape), 7)
        assert np.hypot(dx, dy) < 4


def test_astronaut_mask_covers_the_head_and_not_the_flag(astronaut):
    mask = prepare_photo(astronaut, points_file=ASTRONAUT_POINTS).mask
    for x, y in ((224, 110), (224, 30), (224, 174), (185, 120), (265, 120)):  # face, hair, chin
        assert mask[y, x] > 0.9
    for x, y in ((60, 60), (224, 230), (420, 100), (130, 90)):  # flag, suit, shuttle, wall
        assert mask[y, x] == 0


def test_no_points_is_an_error_of_one_line(astronaut, monkeypatch, tmp_path):
    monkeypatch.setattr("fact_jax.face.landmarks._PACKS", tmp_path)
    with pytest.raises(UserError, match=r"no face points for .*astronaut.png"):
        prepare_photo(astronaut)


def test_drawing_marks_points_and_outline():
    image = np.full((60, 50, 3), 100, np.uint8)
    mask = np.zeros((60, 50), np.float32)
    mask[10:40, 5:45] = 1.0
    points = np.array([[15.0, 20], [30, 20], [22, 26], [16, 33], [29, 33]])
    drawn = draw_face(image, points, mask)
    assert drawn.dtype == np.uint8
    assert drawn[50, 25].tolist() == [55, 55, 55]  # darkened outside
    assert drawn[12, 8].tolist() == [100, 100, 100]  # untouched inside
    assert drawn[10, 20].tolist() == [255, 230, 0]  # the outline
    for x, y in points.astype(int):
        assert np.abs(drawn[y, x].astype(int) - 100).max() > 80
    assert (image == 100).all()
