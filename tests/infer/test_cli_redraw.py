"""``fact-infer redraw`` as a person meets it."""

import json

import numpy as np
import pytest
from PIL import Image

from infer.cli import main
from infer.provenance import read_text
from tests.infer.conftest import POINTS


@pytest.fixture
def template(tmp_path):
    """140 x 90 of noise, with two faces."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 140, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "group.png")
    faces = [{"points": (np.asarray(POINTS) + (x, 10)).tolist()} for x in (0, 70)]
    (tmp_path / "group.points.json").write_text(json.dumps({"faces": faces}))
    return tmp_path / "group.png"


@pytest.fixture
def command(files, template, tmp_path):
    def words(*options):
        known = ["--base", files.base, "--adapter", files.adapter, "--encoder", files.encoder]
        known += ["--photo", files.photo, "--sampler", "ddim", "--steps", 2]
        known += ["--out", tmp_path / "out", "--backend", "torch"]
        return [str(word) for word in ("redraw", template, *known, *options)]

    return words


def changed(template, picture):
    """Columns in which the picture is not the template."""
    with Image.open(template) as before, Image.open(picture) as after:
        different = np.asarray(before) != np.asarray(after)
    return np.flatnonzero(different.any((0, 2)))


def test_one_face_changes_and_nothing_else(command, template, capsys):
    assert main(command("--face", 1)) == 0
    (path,) = capsys.readouterr().out.split()
    assert path.endswith("group-redrawn.png")
    columns = changed(template, path)
    assert 70 < columns.min() < columns.max() < 140
    said = read_text(path)
    assert said["source"] == "compositeWithTrainedAlgorithmicMedia"
    assert "strength: 0.6" in said["parameters"]


def test_by_a_box_and_all_of_them(command, template, capsys):
    assert main(command("--box", "0,0,65,90")) == 0
    left = changed(template, capsys.readouterr().out.split()[0])
    assert left.max() < 70
    assert main(command()) == 0
    both = changed(template, capsys.readouterr().out.split()[0])
    assert both.min() == left.min()
    assert both.max() > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--face", 2], "no face 2 in group.png: 2 found"),
        (["--face", 0, "--box", "0,0,1,1"], "once for each --photo"),
        (["--box", "1,2,3"], "--box 1,2,3: expected left,top,right,bottom"),
        (["--box", "66,0,68,4"], "no face of group.png lies in the box"),
        (["--strength", 0], "strength must lie above 0"),
        (["--strength", 0.2], "leaves none of 2 steps"),
        (["--soften", -1], "soften must lie in 0..1"),
    ],
)
def test_bad_input_is_one_line(command, options, message, capsys, tmp_path):
    assert main(command(*options)) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_two_photos_for_one_face(command, files, capsys):
    assert main(command("--photo", files.other_photo, "--face", 1, "--face", 1)) == 2
    assert "two photos are meant for the same face" in capsys.readouterr().err
