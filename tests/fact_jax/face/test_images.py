"""Reading photos: what is accepted, and one clear line for what is not."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from fact_jax.face import images
from fact_jax.face.images import read_image
from fact_jax.utils.errors import UserError


def gradient(height=20, width=30):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 10, columns * 8, rows + columns], -1).astype(np.uint8)


def one_line(error):
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def test_a_png_comes_back_as_it_is(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, gradient())


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (6, lambda a: np.rot90(a, -1)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient()).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), upright(gradient()))


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.zeros((16, 17, 4), np.uint8)
    pixels[:8, ..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert (read[:8] == 0).all()
    assert (read[8:] == 255).all()


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    Image.fromarray(np.full((16, 17), 0x40FF, np.uint16)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 0x40).all()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (18, 16), 0).save(path)
    assert read_image(path).shape == (16, 18, 3)


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="floating-point") as error:
        read_image(tmp_path / "a.tiff")
    one_line(error)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .*gone.png") as error:
        read_image(tmp_path / "gone.png")
    one_line(error)


def test_a_folder(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        read_image(tmp_path)


def test_not_an_image(tmp_path):
    (tmp_path / "a.png").write_text("hello\nworld")
    with pytest.raises(UserError, match=r"a.png is not an image") as error:
        read_image(tmp_path / "a.png")
    one_line(error)


def test_an_empty_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="not an image"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated(tmp_path, kind, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, kind)
    whole = data.getvalue()
    (tmp_path / "a").write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UserError, match=r"truncated or damaged|not an image") as error:
        read_image(tmp_path / "a")
    one_line(error)


def test_a_cut_png_is_refused_or_whole(tmp_path):
    """Cut in its closing checksums a PNG still holds every pixel; half a picture never comes."""
    data = io.BytesIO()
    Image.fromarray(gradient()).save(data, "PNG")
    whole = data.getvalue()
    refusals = []
    for length in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:length])
        try:
            np.testing.assert_array_equal(read_image(tmp_path / "a"), gradient())
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > len(whole) - 30
    assert not any("\n" in text for text in refusals)


def test_too_large_is_refused_before_decoding(tmp_path, monkeypatch):
    Image.fromarray(gradient()).save(tmp_path / "a.bmp")
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match="too large: 30 x 20, at most 599 pixels"):
        read_image(tmp_path / "a.bmp")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow raises from twice as many
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="too large"):
        read_image(tmp_path / "a.png")


def test_too_small(tmp_path):
    Image.new("RGB", (15, 40)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="too small: 15 x 40, at least 16 px"):
        read_image(tmp_path / "a.png")


@pytest.fixture
def heic(tmp_path):
    """Lying, with a turn in its metadata, as a telephone saves it."""
    from pillow_heif import from_pillow

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    lying = Image.fromarray(np.rot90(gradient(64, 96), 1))
    from_pillow(lying).save(tmp_path / "a.heic", quality=100, chroma=444, exif=exif.tobytes())
    return tmp_path / "a.heic"


def test_heic_is_read_upright(heic):
    difference = np.abs(read_image(heic).astype(int) - gradient(64, 96))
    # HEVC is lossy, and the gradient's bytes wrap.
    assert np.median(difference) <= 2
    heic.write_bytes(heic.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"truncated or damaged|not an image") as error:
        read_image(heic)
    one_line(error)


def test_heic_without_its_package_is_named(heic, monkeypatch):
    monkeypatch.setattr(images, "_register_heif", lambda: False)
    heic.write_bytes(heic.read_bytes()[:20])
    with pytest.raises(UserError, match=r"a.heic is a HEIC picture: pip install pillow-heif"):
        read_image(heic)
