"""Head masks: their sources in order, the ellipse, and area averaging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fact_jax.face.align import ARCFACE_TEMPLATE, template_points
from fact_jax.face.mask import (
    crop_square,
    ellipse_mask,
    head_mask,
    near_points,
    read_mask,
    resize_area,
)
from fact_jax.utils.errors import UserError

SHAPE = (40, 30)
POINTS = template_points(30)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_order_of_the_sources(tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[:10] = 17
    grey = np.zeros(SHAPE, np.uint8)
    grey[:, :5] = 255
    mask_file = save(tmp_path / "m.png", grey)
    mask, source = head_mask((*SHAPE, 3), POINTS, parsing=labels, mask_file=mask_file)
    assert source == "the parsing map"
    np.testing.assert_array_equal(mask, labels == 17)
    mask, source = head_mask(SHAPE, POINTS, mask_file=mask_file)
    assert source.startswith("the mask file ")
    np.testing.assert_array_equal(mask, grey == 255)
    mask, source = head_mask(SHAPE, POINTS)
    assert source == "an ellipse fitted to the points"
    np.testing.assert_array_equal(mask, ellipse_mask(SHAPE, POINTS))
    assert mask.dtype == np.float32


def test_parsing_labels_of_the_head():
    labels = np.zeros(SHAPE, np.int64)
    labels.flat[:19] = np.arange(19)
    mask, _ = head_mask(SHAPE, POINTS, parsing=labels)
    # Background, earring, neck, necklace, cloth and hat are not the head.
    assert set(np.arange(19)[mask.flat[:19] == 0]) == {0, 9, 14, 15, 16, 18}
    mask, _ = head_mask(SHAPE, POINTS, parsing=labels, labels={14})
    assert mask.sum() == 1


def test_parsing_from_a_palette_png_reads_the_numbers(tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[3:9] = 1
    image = Image.fromarray(labels, "L").convert("P")
    image.putdata(labels.ravel())
    image.putpalette([0, 0, 0, 250, 120, 7])
    image.save(tmp_path / "p.png")
    mask, source = head_mask(SHAPE, POINTS, parsing=tmp_path / "p.png")
    np.testing.assert_array_equal(mask, labels)
    assert source == f"the parsing map {tmp_path / 'p.png'}"


def test_mask_files_may_be_soft_hard_deep_or_transparent(tmp_path):
    grey = np.zeros(SHAPE, np.uint8)
    grey[0, :3] = [51, 255, 102]
    np.testing.assert_allclose(read_mask(save(tmp_path / "a.png", grey))[0, :4], [0.2, 1, 0.4, 0])
    ones = (grey > 0).astype(np.uint8)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "b.png", ones)), ones)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "c.png", ones.astype(bool))), ones)
    deep = grey.astype(np.uint16) * 257
    np.testing.assert_allclose(read_mask(save(tmp_path / "d.png", deep))[0, :3], [0.2, 1, 0.4])
    white = np.full((*SHAPE, 4), 255, np.uint8)
    white[..., 3] = grey
    np.testing.assert_allclose(read_mask(save(tmp_path / "e.png", white))[0, :4], [0.2, 1, 0.4, 0])


@pytest.mark.parametrize("kind", ["parsing", "mask_file"])
def test_files_of_another_size_or_without_a_head(tmp_path, kind):
    small = save(tmp_path / "small.png", np.ones((10, 11), np.uint8))
    with pytest.raises(UserError, match=r"small.png is 11 x 10, the photo is 30 x 40"):
        head_mask(SHAPE, POINTS, **{kind: small})
    empty = save(tmp_path / "empty.png", np.zeros(SHAPE, np.uint8))
    with pytest.raises(UserError, match=r"empty.png marks no head"):
        head_mask(SHAPE, POINTS, **{kind: empty})
    colours = save(tmp_path / "colours.png", np.eye(40, 90, dtype=np.uint8).reshape(40, 30, 3))
    with pytest.raises(UserError, match=r"colours.png has colour"):
        head_mask(SHAPE, POINTS, **{kind: colours})
    with pytest.raises(UserError, match="no such file"):
        head_mask(SHAPE, POINTS, **{kind: tmp_path / "gone.png"})


def test_a_parsing_array_must_be_integers():
    with pytest.raises(UserError, match=r"float32.*must be \(h, w\) integers"):
        head_mask(SHAPE, POINTS, parsing=np.zeros(SHAPE, np.float32))
    with pytest.raises(UserError, match=r"\(40, 30, 3\)"):
        head_mask(SHAPE, POINTS, parsing=np.zeros((*SHAPE, 3), np.uint8))


def test_ellipse_extent_on_the_upright_template():
    # Points on the template, 40 px to the right and down: centre (96, 91), half axes 58 and 74.
    mask = ellipse_mask((200, 220), ARCFACE_TEMPLATE + 40)
    assert mask[91, 96] == 1
    np.testing.assert_allclose(mask[91, [38, 154]], 0.5, atol=1e-5)  # left and right ends
    np.testing.assert_allclose(mask[[17, 165], 96], 0.5, atol=1e-5)  # top and bottom
    assert mask[91, 36] == 0
    assert mask[91, 40] == 1
    # Its area, edge included, is pi a b.
    np.testing.assert_allclose(mask.sum(), np.pi * 58 * 74, rtol=1e-3)


def test_ellipse_turns_with_the_head():
    middle = np.array([150.0, 150.0])
    upright = ARCFACE_TEMPLATE - [56, 51] + middle
    turned = (upright - middle) @ np.array([[0.0, 1.0], [-1.0, 0.0]]) + middle  # a quarter turn
    expected = np.rot90(ellipse_mask((301, 301), upright), -1)
    np.testing.assert_allclose(ellipse_mask((301, 301), turned), expected, atol=1e-4)


def test_crop_square_of_the_template_is_the_crop():
    np.testing.assert_allclose(crop_square(ARCFACE_TEMPLATE * 2 + 7), [7, 7, 231, 231])


def test_area_averaging_by_hand():
    mask = jnp.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    # Three cells to two: the middle one goes half to each side.
    np.testing.assert_allclose(resize_area(mask, (2, 2)), [[1 / 3, 1], [2 / 3, 0]], atol=1e-6)
    np.testing.assert_allclose(resize_area(mask, (1, 1)), [[0.5]], atol=1e-6)
    np.testing.assert_allclose(resize_area(mask, (2, 3)), mask, atol=1e-6)
    # Enlarged 2 to 3: the middle cell straddles both.
    np.testing.assert_allclose(resize_area(mask[:, :1], (3, 1)), [[0], [0.5], [1]], atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (7, 13), (64, 3)])
def test_area_averaging_is_an_exact_integral(size):
    mask = np.random.default_rng(0).random((2, 21, 13)).astype(np.float32)
    # Repeat every pixel so often that the cells have whole numbers of them, then average.
    fine = mask.repeat(size[0], 1).repeat(size[1], 2)
    expected = fine.reshape(2, size[0], 21, size[1], 13).mean((2, 4))
    resized = jax.jit(resize_area, static_argnums=1)(mask, size)
    np.testing.assert_allclose(resized, expected, atol=1e-5)
    np.testing.assert_allclose(resize_area(np.ones((21, 13)), size), 1.0, atol=1e-6)


def test_a_mask_of_floating_point_numbers_keeps_its_greys(tmp_path):
    values = np.array([[0.0, 0.25], [0.5, 1.0]], np.float32).repeat(10, 0).repeat(10, 1)
    Image.fromarray(values).save(tmp_path / "m.tiff")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.tiff"), values)


def test_a_mask_is_turned_upright_as_its_photo_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    lying = np.zeros((20, 30), np.uint8)
    lying[:, :10] = 255
    Image.fromarray(lying).save(tmp_path / "m.png", exif=exif)
    mask = read_mask(tmp_path / "m.png")
    assert mask.shape == (30, 20)
    assert mask[:10].min() == 1.0
    assert mask[10:].max() == 0.0


def test_near_points_by_hand():
    """Eyes 8 pixels apart, a deviation of 2; squares of 2, centred at 0.5, 2.5, 4.5."""
    points = np.array([[4.5, 4.5], [12.5, 4.5], [8.5, 8.5], [4.5, 12.5], [12.5, 12.5]])
    found = near_points(points[None], (8, 10), 2)[0]
    assert found.shape == (8, 10)
    for x, y in (points - 0.5).astype(int) // 2:
        assert found[y, x] == 1.0
    assert found[2, 3] == pytest.approx(np.exp(-0.5), rel=1e-6)  # 2 pixels from one eye
    assert found[2, 4] == pytest.approx(np.exp(-2.0), rel=1e-6)  # 4 from the eyes and the nose
    assert found[3, 9] == pytest.approx(np.exp(-(6**2 + 2**2) / 8), rel=1e-6)
    wide = near_points(2 * points[None] + 0.5, (8, 10), 4)[0]
    np.testing.assert_allclose(wide, found, atol=1e-6)
