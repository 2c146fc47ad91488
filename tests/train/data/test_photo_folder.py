"""A folder of people: what is usable becomes records, what is not is one line each."""

import json
import os

import numpy as np
import pytest
from PIL import Image, ImageCms

from fact_jax.face import ARCFACE_TEMPLATE, PreparedFace, face_mask, prepare_photo
from fact_jax.portraits import GENERIC_CAPTION
from fact_jax.utils.errors import UserError
from fact_train.cli.main import main
from fact_train.data.photo_folder import Totals, folder_examples, square_up
from fact_train.data.records import Records, decode

POINTS = ARCFACE_TEMPLATE / 2 + (40, 10)


def write_photo(path, *, points=POINTS, mask=True, seed=0):
    """A landscape photo, 120 x 80, with a face to the right of the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.with_suffix(".json").write_text(json.dumps({"points": points.tolist()}))
    if mask:
        head = np.zeros((80, 120), np.uint8)
        head[5:75, 40:100] = 255
        Image.fromarray(head).save(path.with_suffix(".mask.png"))


def icc_profile() -> bytes:
    """Pillow's sRGB profile under another name, its red and green primaries swapped."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"-two").replace(b"gXYZ", b"rXYZ").replace(b"-two", b"gXYZ")
    return swapped.replace(b"s\0R\0G\0B", b"o\0w\0n\0 ")


@pytest.fixture
def people(tmp_path, monkeypatch):
    """Two usable people, and one of each thing that can be wrong."""
    monkeypatch.setenv("HOME", str(tmp_path))  # no face detector there
    source = tmp_path / "people"
    write_photo(source / "anna" / "1.png", seed=1)
    write_photo(source / "anna" / "2.png", seed=2, mask=False)
    (source / "anna" / "2.txt").write_text("a woman\n in a garden ")
    (source / "anna" / "notes.md").write_text("not a photo")
    (source / "anna" / "cut.png").write_bytes((source / "anna" / "1.png").read_bytes()[:5000])
    write_photo(source / "anna" / "bare.jpg")
    (source / "anna" / "bare.json").unlink()
    write_photo(source / "anna" / "mute.png")
    (source / "anna" / "mute.txt").write_text(" ")
    write_photo(source / "bo" / "1.jpg", seed=3)
    write_photo(source / "cy" / "1.jpg", points=POINTS + 90)
    return source


def test_bad_photos_are_one_line_each_and_skipped(people):
    os.mkfifo(people / "anna" / "pipe.png")  # not a photo, and never waited for
    lines = []
    examples = list(folder_examples(people, size=64, crop_size=48, warn=lines.append))
    assert [example.name for example in examples] == ["anna/1.png", "anna/2.png", "bo/1.jpg"]
    assert [example.caption for example in examples] == [
        GENERIC_CAPTION,
        "a woman in a garden",
        GENERIC_CAPTION,
    ]
    wanted = [
        ("anna/bare.jpg", "no face points"),
        ("anna/cut.png", "truncated or damaged"),
        ("anna/mute.txt", "a caption has 1 to 2000 characters"),
        ("bo", "only one usable photo"),
        ("cy/1.json", "lies outside the photo"),
        ("cy", "skipped, it has no usable photo"),
    ]
    assert len(lines) == len(wanted)
    for line, (name, reason) in zip(lines, wanted, strict=True):
        assert str(people / name) in line
        assert reason in line
        assert "\n" not in line


def test_the_same_picture_is_no_partner_of_itself(people):
    """Copied, or saved again in another format without loss; of another person it is told of."""
    first = people / "anna" / "1.png"
    for name in ("anna/9.png", "anna/8.tiff", "bo/2.png", "bo/3.png"):
        copy = people / name
        Image.open(first).save(copy)
        copy.with_suffix(".json").write_bytes(first.with_suffix(".json").read_bytes())
    lines, totals = [], Totals()
    sizes = {"size": 64, "crop_size": 48}
    examples = list(folder_examples(people, warn=lines.append, totals=totals, **sizes))
    names = [example.name for example in examples]
    assert names == ["anna/1.png", "anna/2.png", "bo/1.jpg", "bo/2.png"]
    assert [line for line in lines if "same picture" in line] == [
        f"skipped: {people / 'anna' / '8.tiff'} is the same picture as 1.png",
        f"skipped: {people / 'anna' / '9.png'} is the same picture as 1.png",
        f"{people / 'bo' / '2.png'}: the same picture as {first}, of another person",
        f"skipped: {people / 'bo' / '3.png'} is the same picture as 2.png",
    ]
    assert totals.skipped["duplicate"] == 3


def test_a_skipped_photo_makes_no_duplicate_of_a_usable_one(people):
    """``mute.png`` has a bad caption; the same picture beside it has none."""
    mute = people / "anna" / "mute.png"
    for suffix in (".png", ".json", ".mask.png"):
        beside = people / "anna" / f"same{suffix}"
        beside.write_bytes(mute.with_suffix(suffix).read_bytes())
    examples = folder_examples(people, size=64, crop_size=48, warn=lambda line: None)
    assert "anna/same.png" in [example.name for example in examples]


def test_colours_of_another_profile_become_srgb(people):
    """A profile whose red and green are swapped: what it calls red is green."""
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[..., 0] = 255
    photo = people / "anna" / "1.png"
    swapped = icc_profile()
    Image.fromarray(pixels).save(photo, icc_profile=swapped)
    example = next(folder_examples(people, size=64, crop_size=48, warn=lambda line: None))
    np.testing.assert_allclose(decode(example.photo)[32, 32], [0, 255, 0], atol=4)
    inside = decode(example.crop)[24, 24]
    np.testing.assert_allclose(inside, [0, 255, 0], atol=1)


def test_a_caption_may_begin_with_a_byte_order_mark(people):
    (people / "anna" / "2.txt").write_bytes(b"\xef\xbb\xbfa woman")
    points = people / "anna" / "2.json"
    points.write_bytes(b"\xef\xbb\xbf" + points.read_bytes())
    captions = [e.caption for e in folder_examples(people, size=64, crop_size=48, warn=print)]
    assert captions[1] == "a woman"


def test_the_crop_is_the_one_that_generation_sees(people):
    example, bare, _ = folder_examples(people, size=64, crop_size=48, warn=lambda line: None)
    photo = people / "anna" / "1.png"
    face = prepare_photo(photo, mask_file=photo.with_suffix(".mask.png"), crop_size=48)
    np.testing.assert_array_equal(decode(example.crop), face.crop)
    without = prepare_photo(people / "anna" / "2.png", crop_size=48)
    np.testing.assert_array_equal(decode(bare.crop), without.crop)


def test_the_square_lies_around_the_head_and_takes_the_points_along():
    """A bright dot at the nose, and the mask, are where the points say after the change of size."""
    image = np.zeros((80, 120, 3), np.uint8)
    nose = POINTS[2].round().astype(int)
    image[nose[1] - 1 : nose[1] + 2, nose[0] - 1 : nose[0] + 2] = 255
    mask = np.zeros((80, 120), np.float32)
    mask[5:75, 40:100] = 1
    points = POINTS.astype(np.float32)
    points[2] = nose
    face = PreparedFace(image, points, mask, np.zeros((48, 48, 3), np.uint8), ())
    photo, moved, head = square_up(face, 160)
    # The square is 80 wide; the head's middle is 70, so it runs from 30 to 110.
    np.testing.assert_allclose(moved, (points - (30, 0) + 0.5) * 2 - 0.5, atol=1e-4)
    pixels = decode(photo).astype(np.float32).mean(-1)
    rows, columns = np.mgrid[:160, :160]
    centre = [(where * pixels).sum() / pixels.sum() for where in (columns, rows)]
    np.testing.assert_allclose(centre, moved[2], atol=0.1)
    expected = np.zeros((160, 160))
    expected[10:150, 20:140] = 1
    np.testing.assert_allclose(head, expected, atol=1e-6)


def test_the_face_lies_inside_the_head():
    points = (ARCFACE_TEMPLATE * 2).astype(np.float32)
    head = np.zeros((224, 224), np.float32)
    head[:, 40:] = 1
    face = face_mask(head, points)
    assert face[int(points[2, 1]), int(points[2, 0])] == 1  # the nose
    assert all(face[int(y), int(x)] == 1 for x, y in points)
    assert face[20, 112] == 0  # hair over the forehead
    assert face[:, :40].max() == 0  # not on the head
    # Half axes of 40 and 52 of the template, less what the head leaves out at the left.
    assert 0.9 * np.pi * 80 * 104 < face.sum() < np.pi * 80 * 104


def test_the_program_writes_what_is_usable_and_tells_of_the_rest(
    people, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("fact_jax.face.images._register_heif", lambda: False)
    out = tmp_path / "out"
    (people / "anna" / "live.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (people / "bo" / "README.md").touch()
    (people / "bo" / "Makefile").touch()
    write_photo(people / "loose.jpg")
    write_photo(people / "bo" / "old" / "1.jpg")
    write_photo(people / "bo" / "old" / "deep" / "2.png")
    command = ["records", "folder", str(people), "--out", str(out), "--size", "64", "--crop", "48"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"{out}: 3 photos of 2 people",
        "skipped 5 photos: 1 no points, 1 not readable, 1 HEIC, 1 caption, 1 points",
        "ignored 3 files: 2 .md, 1 without ending",
        "not looked at: 1 photos of nobody: put each into a person's folder",
        "not looked at: 2 photos in folders within a person's: move them up",
    ]
    assert sum(line.startswith("warning: ") for line in said.err.splitlines()) == 7
    assert "anna/live.HEIC is a HEIC picture: pip install pillow-heif" in said.err
    records = Records(out)
    np.testing.assert_array_equal(records.identities, [0, 0, 1])
    row = records[2]
    assert decode(row["photo"]).shape == (64, 64, 3)
    assert decode(row["crop"]).shape == (48, 48, 3)
    # Refused before a photo is read the second time.
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_no_usable_person_is_an_error(people, tmp_path, capsys):
    assert main(["records", "folder", str(people), "--out", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: {tmp_path / 'out'}: there is no usable photo, so nothing was written"
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="has no subfolder"):
        list(folder_examples(people / "anna", size=64, crop_size=48, warn=print))
    with pytest.raises(UserError, match="is not a folder"):
        list(folder_examples(people / "nobody", size=64, crop_size=48, warn=print))


def test_too_many_made_up_people(tmp_path, capsys):
    command = ["records", "portraits", "--people", "9999999", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "the split adapter has 20000 people" in capsys.readouterr().err
