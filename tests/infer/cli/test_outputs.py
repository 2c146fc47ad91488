"""What fact-infer writes takes the place of nothing; where it cannot write it says so."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from fact_infer.cli.main import main
from fact_infer.evaluation.portrait_files import write_portraits
from fact_infer.evaluation.results import FILES, SETTINGS, open_folder

pytestmark = pytest.mark.heavy


def everything(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def own(files, tmp_path):
    """A photo of the user's, with its points."""
    shutil.copy(files.photo, tmp_path / "own.png")
    shutil.copy(files.photo.with_suffix(".points.json"), tmp_path / "own.points.json")
    return tmp_path / "own.png"


@pytest.mark.parametrize("way", ["same", "spelling", "hard link", "symbolic link", "relative"])
def test_face_leaves_the_photo(own, way, tmp_path, monkeypatch, capsys):
    out = tmp_path / "link.png"
    if way == "hard link":
        os.link(own, out)
    elif way == "symbolic link":
        out.symlink_to(own)
    elif way == "spelling":
        (tmp_path / "x").mkdir()
        out = tmp_path / "x" / ".." / "own.png"
    else:
        monkeypatch.chdir(tmp_path)
        out = own if way == "same" else "own.png"
    before = everything(tmp_path)
    assert main(["face", str(own), "--out", str(out)]) == 0
    said = capsys.readouterr().out.strip()
    assert said.endswith("-2.png")
    after = everything(tmp_path)
    assert len(after) == len(before) + 1
    assert after.items() >= before.items()


def test_portraits_keep_what_is_there(tmp_path):
    first = write_portraits("test", 1, 1, tmp_path)[0]
    taken = first.with_name(f"{first.stem}-2.points.json")
    taken.write_text("mine")
    before = everything(tmp_path)
    (again,) = write_portraits("test", 1, 1, tmp_path)
    assert again.name == f"{first.stem}-3.png"
    after = everything(tmp_path)
    assert after.items() >= before.items()
    new = {path.name: held for path, held in after.items() if path not in before}
    assert set(new) == {
        f"{first.stem}-3{suffix}" for suffix in (".png", ".mask.png", ".points.json")
    }
    assert new[again.name] == before[first]


def test_an_evaluation_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    new, settings = tmp_path / "new", {"steps": 8}
    new.mkdir()
    (new / "notes.txt").touch()
    assert open_folder(new, settings) == new
    # Not finished: the same settings go on in it, others do not.
    assert open_folder(new, settings) == new
    assert open_folder(new, {"steps": 9}) == tmp_path / "new-2"
    (new / FILES[-1]).touch()
    assert open_folder(new, settings) == tmp_path / "new-3"
    monkeypatch.chdir(new)
    assert open_folder(".", {"steps": 7}) == tmp_path / "new-4"
    assert json.loads((new / SETTINGS).read_text()) == settings


def test_an_evaluation_leaves_files_of_others_alone(tmp_path):
    (tmp_path / "pictures.npz").write_text("mine")
    assert open_folder(tmp_path, {}) != tmp_path
    assert (tmp_path / "pictures.npz").read_text() == "mine"
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / SETTINGS).write_text("{")
    assert open_folder(tmp_path / "damaged", {}) == tmp_path / "damaged-2"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("/proc/x/a.png", "/proc/x: no file can be written in /proc"),
        ("/dev/full/a.png", "/dev/full: /dev/full is not a folder"),
        ("FOLDER.png", "FOLDER.png is a folder: name a file"),
        ("DANGLING/a.png", "DANGLING is not a folder"),
        ("n" * 300 + "/a.png", "File name too long"),
        ("n" * 300 + ".png", "File name too long"),
    ],
)
def test_strange_outputs_are_one_line(own, out, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER.png").mkdir()
    (tmp_path / "DANGLING").symlink_to(tmp_path / "nowhere")
    before = everything(tmp_path)
    assert main(["face", str(own), "--out", out]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert message in last
    assert everything(tmp_path) == before


def test_a_full_disk_is_one_line(own, tmp_path):
    """No file may grow past one block: what a disk does that fills up."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    code = f"{limit}\nimport fact_infer.__main__"
    command = [sys.executable, "-c", code, "face", str(own), "--out", str(tmp_path / "out.png")]
    before = everything(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    *_, last = done.stderr.splitlines()
    assert last == f"error: {tmp_path / 'out.png'}: File too large"
    assert "Traceback" not in done.stderr
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--batch", "-1"], "--batch must be at least 1, got -1"),
        (["--seed", "-1"], "a seed must lie in 0..2147483647, got -1"),
        (["--out", "/proc/x"], "/proc/x: no file can be written in /proc"),
    ],
)
def test_evaluate_says_what_it_cannot_do(options, message, tmp_path, capsys):
    """Before a judge or a model is looked for."""
    words = ["evaluate", "--adapter", "none", "--judge", "none", "--out", str(tmp_path), *options]
    assert main(words) == 2
    assert message in capsys.readouterr().err
