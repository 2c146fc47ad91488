"""``fact-infer redraw`` as a person meets it."""

import json

import numpy as np
import pytest
from PIL import Image, ImageCms

import fact_infer.cli.redraw
from fact_infer.cli.main import main
from fact_jax.utils.errors import UserError
from tests.infer.conftest import POINTS, read_text

pytestmark = pytest.mark.heavy


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
        (["--face", 0, "--box", "0,0,1,1"], "--box or --area once for each person"),
        (["--face", 0, "--area", "SMALL"], "--box or --area once for each person"),
        (["--area", "SMALL", "--area", "SMALL"], "--box or --area once for each person"),
        (["--photo", "PHOTO", "--face", 0, "--face", 1], "(people: 1; --person with each --photo"),
        (["--area", "BLACK"], "group.png: the mask is empty"),
        (["--area", "PHOTO"], "has colours: a mask is grey"),
        (["--area", "SMALL"], "the mask for group.png is 20 x 30, the template is 140 x 90"),
        (["--control", "PHOTO"], "--control and --controlnet belong together"),
        (["--controlnet", "X", "--control", "SMALL", "--control", "SMALL"], "for each template"),
        (["--controlnet", "NET", "--control", "SMALL"], "the control picture for group.png is 20"),
        (["--controlnet", "OTHER", "--control", "TEMPLATE"], "is for another base model than"),
        (["--person", 1], "photos must be of person 0"),
        (["--face-start", 0.8, "--face-stop", 0.2], "0 <= start <= stop <= 1"),
        (["--block-scale", "top=1"], "'top': found in the path of no block"),
        (["--control-scale", 3], "control scale must lie in 0..2"),
        (["--box", "nan,0,65,90"], "--box nan,0,65,90: expected left,top,right,bottom"),
        (["--box", "9,0,5,90"], "--box 9,0,5,90: expected left,top,right,bottom"),
        (["--seed", 3000000000], "a seed must lie in 0..2147483647"),
        (["--batch", 0], "a batch of at least one"),
        (["--prompt", "a" * 4001], "a prompt has at most 4,000 characters"),
        (["--prompt", "a\udcff"], "is not valid text"),
        (["--controlnet", "/nowhere/net", "--control", "TEMPLATE"], "/nowhere/net: no such folder"),
        (["--controlnet", "UNET", "--control", "TEMPLATE"], "not a ControlNet but a UNet2D"),
        (["--box", "1,2,3"], "--box 1,2,3: expected left,top,right,bottom"),
        (["--box", "66,0,68,4"], "no face of group.png lies in the box"),
        (["--strength", 0], "strength must lie above 0"),
        (["--strength", 0.2], "leaves none of 2 steps"),
        (["--soften", -1], "soften must lie in 0..1"),
    ],
)
def test_bad_input_is_one_line(
    command, files, template, steered, options, message, capsys, tmp_path, monkeypatch
):
    """All of it before a model is loaded."""
    monkeypatch.setattr(fact_infer.cli.redraw, "load_pipeline", None)
    Image.new("L", (20, 30), "white").save(tmp_path / "small.png")
    Image.new("L", (140, 90)).save(tmp_path / "black.png")
    net = steered[0] / "controlnet"
    config = json.loads((net / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 7}))
    targets = {
        "TEMPLATE": template,
        "PHOTO": files.photo,
        "SMALL": tmp_path / "small.png",
        "BLACK": tmp_path / "black.png",
        "NET": net,
        "OTHER": tmp_path / "other",
        "UNET": files.base / "unet",
    }
    assert main(command(*(targets.get(option, option) for option in options))) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_colours_stay_those_of_the_template(command, template, capsys):
    """Bytes mean other colours under another profile; in PNG and JPEG it goes along."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with Image.open(template) as image:
        image.copy().save(template, icc_profile=profile)
    for suffix in ("png", "jpg"):
        assert main(command("--face", 1, "--format", suffix)) == 0
        with Image.open(capsys.readouterr().out.split()[0]) as picture:
            assert picture.info["icc_profile"] == profile


def test_two_people_for_one_face(command, files, capsys):
    two = ("--photo", files.other_photo, "--person", 0, "--person", 1)
    assert main(command(*two, "--face", 1, "--face", 1)) == 2
    assert "two people are meant for the same face" in capsys.readouterr().err


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_an_area_instead_of_the_face(command, template, tmp_path, capsys):
    area = np.zeros((90, 140), np.uint8)
    area[50:80, 20:50] = 255
    Image.fromarray(area).save(tmp_path / "area.png")
    (template.parent / "group.points.json").unlink()  # nobody looks for a face
    wanted = ("--area", tmp_path / "area.png", "--grow", 0, "--soften", 0)
    assert main(command(*wanted)) == 0
    different = (pixels(capsys.readouterr().out.split()[0]) != pixels(template)).any(-1)
    assert not different[area == 0].any()
    assert different[area > 0].mean() > 0.9


def test_a_box_needs_no_detector(command, template, capsys, monkeypatch, tmp_path):
    (template.parent / "group.points.json").unlink()
    monkeypatch.setattr("fact_jax.face.landmarks._PACKS", tmp_path / "none")
    assert main(command("--box", "20,30,60,80", "--grow", 0, "--soften", 0)) == 0
    out, err = capsys.readouterr()
    assert "no points and no detector: the ellipse in the box is redrawn" in err
    different = (pixels(out.split()[0]) != pixels(template)).any(-1)
    rows, columns = np.nonzero(different)
    assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (20, 60, 30, 80)
    # An ellipse has pi/4 of its box, and not its corners.
    assert different.sum() == pytest.approx(np.pi / 4 * 40 * 50, rel=0.1)
    assert not different[30:34, 20:24].any()
    assert main(command("--box", "200,30,260,80")) == 2
    assert "--box 200,30,260,80 lies outside of group.png, which is 140 x 90" in (
        capsys.readouterr().err
    )
    assert main(command("--face", 0)) == 2
    assert "no face points for" in capsys.readouterr().err


def test_photos_are_of_one_person_in_both_commands(files, command, monkeypatch):
    """Whatever is drawn: the same options mean the same people."""
    seen = {}

    def prepared(photos, size):
        seen.setdefault(name, []).append([photo.path for photo in photos])
        raise UserError("enough")

    monkeypatch.setattr("fact_infer.photos.prepare_crops", prepared)
    redraw = command("--photo", files.other_photo)
    generate = ["generate", *redraw[2:], "--prompt", "a woman"]
    for words in (redraw, generate):
        name = words[0]
        assert main(words) == 2
    assert seen["redraw"] == seen["generate"] == [[files.photo, files.other_photo]]


def test_what_steers_a_redrawing(command, files, steered, template, capsys):
    """Another photo of the person, a LoRA, a ControlNet, a window of nothing: each counts."""
    folder, _, _ = steered
    net = ("--controlnet", folder / "controlnet", "--control", template)
    drawn = {}
    for name, options in {
        "plain": (),
        "two photos": ("--photo", files.other_photo),
        "lora": ("--lora", f"{folder / 'lora.safetensors'}=0.8"),
        "control": net,
        "less control": (*net, "--control-scale", 0.3),
        "no face": ("--face-stop", 0),
    }.items():
        assert main(command("--face", 0, *options)) == 0, name
        path = capsys.readouterr().out.split()[0]
        drawn[name] = pixels(path)
    said = read_text(path)["parameters"]
    assert "face stop: 0.0" in said
    assert json.loads(read_text(path)["fact_jax"])["face"]["photos"] == ["one.png"]
    for name, picture in drawn.items():
        for other, compared in drawn.items():
            assert name == other or (picture != compared).any(), (name, other)
    far = (pixels(template) == drawn["control"]).all(-1)
    assert far[:, 75:].all()
