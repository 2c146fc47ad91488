"""The command on a folder of people: drawn, stopped, gone on with, measured from outside."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fact_infer.cli.main import main
from fact_infer.evaluation.any_model import observations, people_folder
from fact_infer.evaluation.any_model.manifest import Shown
from fact_infer.evaluation.results import read_scores
from fact_jax.face import Face, read_image
from fact_jax.utils.errors import UserError
from tests.infer.conftest import POINTS
from tests.infer.evaluation.any_model.test_networks import write_network

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def world(files, tmp_path_factory):
    """A recogniser, and two people with three photos each."""
    folder = tmp_path_factory.mktemp("world")
    write_network(folder / "net.onnx")
    for person in ("anna", "ben"):
        for number in range(3):
            path = folder / "people" / person / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw = np.random.default_rng([len(person), number // 2])
            pixels = draw.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).resize((72, 72), Image.Resampling.BICUBIC).save(path)
            path.with_suffix(".points.json").write_text(json.dumps({"points": POINTS}))
    return folder


def words(world, files, out, *more):
    return [
        *["evaluate", "--base", str(files.base), "--adapter", str(files.adapter)],
        *["--encoder", str(files.encoder), "--folder", str(world / "people"), "--photos", "2"],
        *["--prompt", "a person", "--seeds", "2", "--steps", "2", "--batch", "3"],
        *["--recogniser", str(world / "net.onnx"), "--features", str(world / "net.onnx")],
        *["--out", str(out), *more],
    ]


@pytest.fixture(scope="module")
def detector(world):
    """In place of a real one: finds the one face where it is in every drawn picture."""
    face = Face(np.asarray(POINTS, np.float32) / 2, np.array([8.0, 8, 24, 28], np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observations, "local_pack", lambda pack: world / "net.onnx")
        patch.setattr(observations, "detect_faces", lambda image, pack: [face])
        yield


@pytest.fixture(scope="module")
def done(world, files, detector, tmp_path_factory):
    """A finished evaluation."""
    out = tmp_path_factory.mktemp("out") / "evaluation"
    assert main(words(world, files, out)) == 0
    return out


@pytest.mark.slow
def test_without_a_detector_nothing_is_drawn_in_vain(world, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(observations, "local_pack", lambda pack: None)
    assert main(words(world, files, tmp_path / "out")) == 2
    assert "nothing finds faces in drawn pictures of 32 x 32" in capsys.readouterr().err
    assert not (tmp_path / "out" / "pictures").exists()


@pytest.mark.slow
def test_everybody_is_drawn_with_every_prompt_and_seed(done):
    assert len(list((done / "pictures" / "fact").glob("*.png"))) == 4
    assert len(list((done / "pictures" / "base").glob("*.png"))) == 2  # one a prompt and seed
    held = json.loads((done / "evaluation.json").read_text())
    assert held["measures"]["reference/fact"]["n"] == 2
    assert {"another/fact", "copy_paste/fact", "fair/fact", "kid/fact"} <= held["measures"].keys()
    assert held["measures"]["latents/fact"]["mean"] > 0
    assert held["cost"]["peak_memory_gb"] > 0
    assert held["cost"]["drawn"] == 6
    assert 'src="data:' in (done / "pictures.html").read_text()


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bits(world, files, done, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(done, again)
    (again / "evaluation.json").unlink()
    lost = sorted((again / "pictures" / "fact").glob("*.png"))[1]
    lost.unlink()
    for seen in sorted((again / "seen").iterdir())[:3]:
        seen.unlink()
    assert main(words(world, files, again)) == 0
    np.testing.assert_array_equal(
        read_image(lost), read_image(done / "pictures" / "fact" / lost.name)
    )
    assert (again / "evaluation.txt").read_text() == (done / "evaluation.txt").read_text()
    one, other = (json.loads((f / "evaluation.json").read_text()) for f in (done, again))
    assert one["measures"] == other["measures"]


@pytest.mark.slow
def test_the_manifest_measures_the_same_from_outside(world, done, tmp_path, capsys):
    manifest = done / "manifest.jsonl"
    command = ["evaluate", "--pictures", str(manifest), "--recogniser", str(world / "net.onnx")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "4 pictures of" in capsys.readouterr().out
    for one, other in zip(read_scores(done), read_scores(tmp_path / "out"), strict=True):
        for name, value in other["scores"].items():
            assert one["scores"][name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "o"], "give --adapter FILE, or --pictures JSONL"),
        (
            ["--adapter", "a", "--folder", "f", "--out", "o"],
            "--folder needs prompts: --prompt TEXT",
        ),
        (
            ["--adapter", "a", "--folder", "none", "--prompt", "p", "--out", "o"],
            "none is not a folder of people",
        ),
        (["--adapter", "a", "--clip", "c", "--out", "o"], "are for --folder and --pictures"),
        (["--pictures", "p", "--adapter", "a", "--out", "o"], "leave out --adapter"),
        (["--pictures", "none.jsonl", "--out", "o"], "none.jsonl: No such file"),
        (["--adapter", "a", "--seeds", "0", "--out", "o"], "--seeds must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_one_line(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_torn_target_photo_is_said_before_anything_is_drawn(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    shown = Shown(person="anna", references=(), target=tmp_path / "torn.png")
    person = people_folder.Person(shown=shown, photos=())
    with pytest.raises(UserError, match=r"torn\.png is not an image"):
        people_folder.check_photos([person])
