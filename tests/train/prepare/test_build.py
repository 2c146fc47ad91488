"""A folder of people: what is usable becomes records, what is not is a line with its reason."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from fact_jax.face import ARCFACE_TEMPLATE, Face, face_mask, prepare_photo
from fact_jax.portraits import GENERIC_CAPTION
from fact_jax.utils.errors import UserError
from fact_train.cli.main import main
from fact_train.data.records import Records, data_libraries, decode
from fact_train.prepare.build import build
from fact_train.prepare.models.provider import Photo
from fact_train.prepare.photos.photo import cut_out
from fact_train.prepare.product import dataset
from fact_train.prepare.product.dataset import plan_shards
from fact_train.prepare.settings import BuildSettings, Gates
from fact_train.prepare.sources import Item
from fact_train.prepare.store import Store
from tests.train.prepare.conftest import POINTS, rejected, write_photo

SIZES = ["--size", "64", "--crop", "48"]


def icc_profile() -> bytes:
    """Pillow's sRGB profile under another name, its red and green primaries swapped."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"-two").replace(b"gXYZ", b"rXYZ").replace(b"-two", b"gXYZ")
    return swapped.replace(b"s\0R\0G\0B", b"o\0w\0n\0 ")


@pytest.fixture
def people(tmp_path):
    """Two usable people, and one of each thing that can be wrong."""
    source = tmp_path / "people"
    write_photo(source / "anna" / "1.png", seed=1)
    write_photo(source / "anna" / "2.png", seed=2, mask=False)
    (source / "anna" / "2.txt").write_bytes(b"\xef\xbb\xbfa woman\n in a garden ")
    (source / "anna" / "notes.md").write_text("not a photo")
    (source / "anna" / "cut.png").write_bytes((source / "anna" / "1.png").read_bytes()[:5000])
    write_photo(source / "anna" / "bare.jpg")
    (source / "anna" / "bare.json").unlink()
    write_photo(source / "anna" / "mute.png")
    (source / "anna" / "mute.txt").write_text(" ")
    write_photo(source / "bo" / "1.jpg", seed=3)
    write_photo(source / "cy" / "1.jpg", points=POINTS + 90)
    return source


def run(people, out, **more):
    settings = BuildSettings(source=str(people), size=64, crop=48, **more)
    return build(settings, str(out)).summary


def test_every_photo_is_a_record_or_has_its_reason(people, tmp_path, capsys):
    os.mkfifo(people / "anna" / "pipe.png")  # never waited for
    (people / "bo" / "README.md").touch()
    (people / "bo" / "Makefile").touch()
    (people / "bo" / ".DS_Store").touch()
    (people / "bo" / "9.points.json").write_text("[]")  # of no photo
    (people / "dan.jpg").mkdir()
    write_photo(people / "dan.jpg" / "1.png", seed=7)
    (people / ".thumbnails").mkdir()
    write_photo(people / ".thumbnails" / "1.jpg", seed=6)
    write_photo(people / "loose.jpg", seed=4)
    write_photo(people / "bo" / "old" / "2.jpg", seed=5)
    out = tmp_path / "out"
    command = ["data", "build", str(people), str(out), *SIZES]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"{out}: 11 photos in, 4 records of 2 people, 7 rejected",
        "rejected: 2 no file, 1 no points, 1 not readable, 1 caption, 1 points, 1 no identity",
        "ignored files: 1 .json, 2 .md, 2 hidden, 1 without ending",
    ]
    found = rejected(out)
    wanted = {
        "anna/bare.jpg": ("no points", "no face points"),
        "anna/cut.png": ("not readable", "truncated or damaged"),
        "anna/mute.png": ("caption", "a caption has 1 to 2000 characters"),
        "anna/pipe.png": ("no file", "is no file"),
        "dan.jpg": ("no file", "is no file"),
        "cy/1.jpg": ("points", "lies outside the photo"),
        "loose.jpg": ("no identity", "lies beside the people's folders"),
    }
    assert found.keys() == wanted.keys()
    for name, (reason, text) in wanted.items():
        assert found[name][0] == reason
        assert name in found[name][1]
        assert text in found[name][1]
    records = Records(out)
    np.testing.assert_array_equal(records.identities, [0, 0, 1, 1])
    rows = [records[i] for i in range(4)]
    names = [row["name"].decode() for row in rows]
    assert names == ["anna/1.png", "anna/2.png", "bo/1.jpg", "bo/old/2.jpg"]
    captions = [row["caption"].decode() for row in rows]
    assert captions == [GENERIC_CAPTION, "a woman in a garden", GENERIC_CAPTION, GENERIC_CAPTION]
    assert decode(rows[2]["photo"]).shape == (64, 64, 3)
    # The crop is the one that generation sees.
    for row, mask in ((rows[0], "1.mask.png"), (rows[1], None)):
        photo = people / row["name"].decode()
        mask_file = mask and photo.with_name(mask)
        face = prepare_photo(photo, mask_file=mask_file, crop_size=48)
        np.testing.assert_array_equal(decode(row["crop"]), face.crop)
    tfds = data_libraries().tfds
    assert len(tfds.data_source("face_records", split="train", data_dir=out)) == 4
    # Again: nothing is done, nothing changes.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(command) == 0
    assert "it was there already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    # Other settings: refused, or by force.
    other = ["data", "build", str(people), str(out), "--size", "32", "--crop", "48"]
    assert main(other) == 2
    assert "with other settings" in capsys.readouterr().err
    assert main([*other, "--force"]) == 0
    assert Records(out).size == 32


def test_shards_end_where_the_next_record_is_too_much():
    """Also beyond the 2 GiB that 32 bits count."""
    sizes = np.full(80, 2**27, np.intc)
    assert plan_shards(sizes, 256.0) == list(range(2, 80, 2))
    assert plan_shards(sizes, 4096.0) == [32, 64]
    assert plan_shards(sizes, 1.0) == list(range(1, 80))  # each is larger than that


def test_a_photo_that_is_a_strip_once_shrunk_is_too_small(tmp_path):
    """Of 40 x 3000, as generation shrinks it, 13 px would become 64."""
    source = tmp_path / "people"
    write_photo(source / "anna" / "1.png", seed=1)
    points = (ARCFACE_TEMPLATE / 3).tolist()
    for name, length in (("strip", 3000), ("long", 1100)):
        pixels = np.zeros((40, length, 3), np.uint8)
        path = source / "anna" / f"{name}.png"
        Image.fromarray(pixels).save(path)
        path.with_suffix(".json").write_text(json.dumps({"points": points}))
    run(source, tmp_path / "out", buckets=16, gates=Gates(face=8))
    ((name, (reason, line)),) = rejected(tmp_path / "out").items()
    assert (name, reason) == ("anna/strip.png", "too small")
    assert "of 3000 x 40, shrunk to 1000 px, 13 px are left for 64" in line


def test_the_same_picture_is_no_partner_of_itself(people, tmp_path):
    """Copied, or saved again in another format; of another person it is told of."""
    first = people / "anna" / "1.png"
    for name in ("anna/9.png", "anna/8.tiff", "bo/2.png", "bo/3.png"):
        copy = people / name
        Image.open(first).save(copy)
        copy.with_suffix(".json").write_bytes(first.with_suffix(".json").read_bytes())
    out = tmp_path / "out"
    summary = run(people, out)
    found = rejected(out)
    assert {name: why for name, why in found.items() if why[0] == "duplicate"} == {
        "anna/8.tiff": ("duplicate", "anna/8.tiff is the same picture as anna/1.png"),
        "anna/9.png": ("duplicate", "anna/9.png is the same picture as anna/1.png"),
        "bo/3.png": ("duplicate", "bo/3.png is the same picture as bo/2.png"),
    }
    assert summary["suspects"] == {"same picture": 6}  # three of anna's, two of bo's
    lines = [json.loads(line) for line in (out / "suspects.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "kind": "same picture",
        "photos": ["anna/1.png", "bo/2.png"],
        "people": ["anna", "bo"],
        "splits": ["train"],
        "alarm": False,
    }
    assert "anna/mute.png" in found  # a rejected photo makes no duplicate of a usable one


def test_colours_of_another_profile_become_srgb(people, tmp_path):
    """A profile whose red and green are swapped: what it calls red is green."""
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[..., 0] = 255
    Image.fromarray(pixels).save(people / "anna" / "1.png", icc_profile=icc_profile())
    run(people, tmp_path / "out")
    row = Records(tmp_path / "out")[0]
    np.testing.assert_allclose(decode(row["photo"])[32, 32], [0, 255, 0], atol=4)
    np.testing.assert_allclose(decode(row["crop"])[24, 24], [0, 255, 0], atol=1)


def test_the_square_lies_around_the_head_and_takes_the_points_along():
    """A bright dot at the nose, and the mask, are where the points say after the change of size."""
    image = np.zeros((80, 120, 3), np.uint8)
    nose = POINTS[2].round().astype(int)
    image[nose[1] - 1 : nose[1] + 2, nose[0] - 1 : nose[0] + 2] = 255
    mask = np.zeros((80, 120), np.float32)
    mask[5:75, 40:100] = 1
    points = POINTS.astype(np.float32)
    points[2] = nose
    face = Face(points, np.array([40, 5, 100, 75], np.float32))
    photo = Photo(Item("a"), image, (80, 120), face=face, mask=mask)
    picture, moved, head = cut_out(photo, [(160, 160)])
    # The square is 80 wide; the head's middle is 70, so it runs from 30 to 110.
    np.testing.assert_allclose(moved, (points - (30, 0) + 0.5) * 2 - 0.5, atol=1e-4)
    pixels = decode(picture).astype(np.float32).mean(-1)
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


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["SRC/nobody", "OUT"], "SRC/nobody does not exist"),
        (["SRC/anna", "OUT"], "no usable photo is left, so no records were written"),
        (["EMPTY", "OUT"], "EMPTY holds no photo"),
        (["", "OUT"], "is empty: name a folder or URL"),
        (["SRC", " "], "is empty: name a folder or URL"),
        (["SRC/anna/notes.md", "OUT"], "is not a folder, a table"),
        (["SRC", "SRC"], "which no build wrote"),
        (["SRC", "SRC/out"], "SRC/out lies within SRC"),
        (["SRC", "OUT", "--gate", "beauty=1"], "--gate beauty: known are face"),
        (["SRC", "OUT", "--gate", "yaw"], "--gate yaw: give NAME=VALUE"),
        (["SRC", "OUT", "--gate", "yaw=x"], "--gate: x is no number"),
        (["SRC", "OUT", "--gate", "yaw=-3"], "yaw must be"),
        (["SRC", "OUT", "--column", "who=id"], "column who: known are image"),
        (["SRC", "OUT", "--split", "train=0.5"], "split train=0.5"),
        (["SRC", "OUT", "--split", "a=0.5", "--split", "b=0.5"], "leave no people to train on"),
        (["SRC", "OUT", "--duplicates", "2"], "duplicates must be"),
        (["SRC", "OUT", "--embedder", "x.onnx"], "--embedder x.onnx does not exist"),
        (["SRC", "OUT", "--parser", "SRC/anna/notes.md"], "is no ONNX model that loads"),
        (["SRC", "OUT", "--beam", "'"], "--beam ': No closing quotation"),
        (["SRC", "OUT", "--captioner", "nowhere"], "--captioner nowhere is not a folder"),
        (["nosuch://bucket/x", "OUT"], "nosuch"),
    ],
)
def test_wrong_input_is_one_line(people, tmp_path, capsys, arguments, line):
    (tmp_path / "empty").mkdir()
    places = {"SRC": str(people), "OUT": str(tmp_path / "out"), "EMPTY": str(tmp_path / "empty")}
    for name, path in places.items():
        arguments = [text.replace(name, path) for text in arguments]
        line = line.replace(name, path)
    # Of anna alone without points, so that nobody is usable.
    for path in (people / "anna").glob("*.json"):
        path.unlink()
    assert main(["data", "build", *arguments, *SIZES]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert line in said.err


def test_a_set_without_people_to_train_on_is_said_to_be_one(people, tmp_path, capsys):
    out = str(tmp_path / "out")
    command = ["data", "build", str(people), out, *SIZES, "--split", "a=1e-9"]
    assert main([*command, "--split", "validation=0.999"]) == 0
    assert "warning: nobody is in train and a: give other shares" in capsys.readouterr().err
    with pytest.raises(UserError, match="has no split train, only validation"):
        Records(tmp_path / "out")


def whole(out):
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("finished", [False, True])
def test_a_set_is_replaced_when_the_new_one_is_ready(people, tmp_path, monkeypatch, finished):
    """What cannot be built replaces nothing; a killed replacement goes on, at its end too."""
    out, fresh, empty = tmp_path / "out", tmp_path / "fresh", tmp_path / "empty"
    run(people, out)
    (out / "log.jsonl").write_text("{}\n")
    before = whole(out)
    write_photo(empty / "anna" / "1.png")
    (empty / "anna" / "1.png").write_bytes(b"nothing")
    replace = ["data", "build", "SRC", str(out), *SIZES, "--shard-mb", "0.001", "--force"]
    replace[2] = str(empty)
    assert main(replace) == 2
    assert rejected(out / "work").keys() == {"anna/1.png"}
    assert whole(out).items() >= before.items()
    write_photo(people / "bo" / "new.png", seed=9)
    finish = dataset.finish

    def die(*arguments):
        if finished:
            finish(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "finish", die)
    replace[2] = str(people)
    assert main(replace) == 130
    monkeypatch.undo()
    removed, remove = [], Store.remove

    def die_after_four(store, name):
        remove(store, name)
        removed.append(name)
        if len(removed) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "remove", die_after_four)
    assert main(replace) == (130 if finished else 0)
    monkeypatch.undo()
    assert main(replace) == 0
    run(people, fresh, shard_megabytes=0.001)
    assert whole(out) == whole(fresh) | {"log.jsonl": b"{}\n"}


def test_a_build_that_was_killed_at_its_first_file_goes_on(people, tmp_path):
    left = tmp_path / "out" / "work" / ".build.json.0123abcd.tmp"
    left.parent.mkdir(parents=True)
    left.write_text("{")
    for out in ("out", "fresh"):
        run(people, tmp_path / out)
    assert whole(tmp_path / "out") == whole(tmp_path / "fresh")


def test_a_forced_build_that_was_killed_at_its_first_removal_goes_on(people, tmp_path, monkeypatch):
    """Of an unfinished build with other settings."""

    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        run(people, tmp_path / "out")
    monkeypatch.undo()
    command = ["data", "build", str(people), str(tmp_path / "out"), *SIZES, "--shard-mb", "0.001"]
    assert main(command) == 2
    remove = Store.remove

    def remove_and_die(store, name):
        remove(store, name)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "remove", remove_and_die)
    assert main([*command, "--force"]) == 130
    monkeypatch.undo()
    assert main([*command, "--force"]) == 0
    run(people, tmp_path / "fresh", shard_megabytes=0.001)
    assert whole(tmp_path / "out") == whole(tmp_path / "fresh")


def test_a_path_with_colons_is_a_path(people, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "build", "people", "x::y", *SIZES]) == 0
    assert main(["data", "verify", f"file://{tmp_path}/x::y"]) == 0
    assert not (tmp_path / "x:").exists()


def test_shards_of_a_killed_build_of_other_photos_go(people, tmp_path, monkeypatch):
    """The process dies when its records are written, and somebody leaves the source."""

    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        run(people, tmp_path / "out", shard_megabytes=0.001)
    monkeypatch.undo()
    shutil.rmtree(people / "anna")
    for out in ("out", "fresh"):
        run(people, tmp_path / out, shard_megabytes=0.001)
    files = [
        {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "out", tmp_path / "fresh")
    ]
    assert files[0] == files[1]


def test_a_folder_beside_the_source_is_beside_it_however_it_is_named(people, tmp_path, monkeypatch):
    monkeypatch.chdir(people)
    assert main(["data", "build", ".", "../set", *SIZES]) == 0
    (tmp_path / "link").symlink_to(people)
    within = str(people / "set")
    for source in ("../people", str(tmp_path / "link")):
        assert main(["data", "build", source, within, *SIZES]) == 2
    assert not Path(within).exists()
