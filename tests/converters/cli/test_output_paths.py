"""Where fact-convert writes: what may be replaced, and what is refused before anything is read."""

import contextlib
import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fact_convert.cli.main import main
from fact_convert.cli.opening import open_weights
from fact_convert.io.weight_files import read_file
from fact_jax.utils.files import atomic_write, replace_folder
from tests.converters.conftest import run


@pytest.fixture
def encoder(golden, tmp_path) -> Path:
    """A face encoder as another program has written it, with its configuration."""
    state, metadata = golden("transface", "state.")
    state = {k: v.astype(np.float32) for k, v in state.items()}
    (tmp_path / "in").mkdir()
    text = {"ss_title": "a", "format": "pt", "configs": f'{{"transface": {metadata["config"]}}}'}
    save_file(state, tmp_path / "in" / "encoder.safetensors", text)
    return tmp_path / "in" / "encoder.safetensors"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("command", ["to-jax", "to-torch"])
def test_force_replaces_what_was_written_here_and_nothing_else(encoder, refused, command, tmp_path):
    out = tmp_path / "out"
    again = (command, encoder, out, "--force")
    out.mkdir()
    run(*again)  # an empty folder
    run(*again)
    assert "exists already" in refused(command, encoder, out)
    (out / "sub").mkdir()
    for strange in ("notes.txt", "sub/photo.jpg"):
        (out / strange).write_text("mine")
        before = snapshot(tmp_path)
        assert strange in refused(*again)
        assert strange in refused(*again, "--dry-run")
        assert snapshot(tmp_path) == before
        (out / strange).unlink()
    changed = next(path for path in out.rglob("[!.]*") if path.is_file() and path.stat().st_size)
    whole = changed.read_bytes()
    changed.write_bytes(whole + b" ")
    assert changed.name in refused(*again)
    changed.write_bytes(whole)
    run(*again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("command", ["to-jax", "to-torch"])
def test_force_leaves_other_folders_and_files(encoder, pipeline_folder, refused, command, tmp_path):
    base = shutil.copytree(pipeline_folder, tmp_path / "base")
    (tmp_path / "note").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    before = snapshot(tmp_path)
    assert "no run wrote it: it holds model_index.json" in refused(
        command, encoder, base, "--force"
    )
    assert "holds a.jpg" in refused(command, encoder, tmp_path / "photos", "--force")
    assert "is a file, where a folder" in refused(command, encoder, tmp_path / "note", "--force")
    assert snapshot(tmp_path) == before


def test_out_must_not_be_what_is_read(encoder, pipeline_folder, refused, monkeypatch, tmp_path):
    base = shutil.copytree(pipeline_folder, tmp_path / "base")
    (tmp_path / "link.safetensors").symlink_to(encoder)
    (tmp_path / "home").symlink_to(encoder.parent)
    before = snapshot(tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in (
        ("to-jax", base, base),
        ("to-jax", base, base / "unet" / ".."),
        ("to-jax", base / "unet", base),
        ("to-jax", base, base / "new"),
        ("to-jax", encoder, encoder.parent),
        ("to-jax", "in/encoder.safetensors", "in"),
        ("to-jax", "home/encoder.safetensors", "in"),
        ("to-torch", encoder, encoder),
        ("to-torch", encoder, tmp_path / "link.safetensors"),
        ("to-torch", tmp_path / "link.safetensors", encoder),
        ("to-torch", base, base / "x.safetensors"),
        ("to-torch", encoder, base, "--config", base),
        ("to-torch", encoder, base / "new", "--config", base),
        ("to-torch", encoder, "x/new", "--base", "x"),
        ("merge-lora", base, encoder, encoder.parent),
        ("merge-lora", base, encoder.parent, encoder.parent / "new"),
        ("extract", base, base / "x.ckpt"),
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        assert "read" in refused(*words, "--force"), words
        (tmp_path / "x").rmdir()
    assert snapshot(tmp_path) == before


def test_outputs_that_cannot_be(encoder, refused, monkeypatch, tmp_path):
    here = tmp_path / "here"
    (here / "in").mkdir(parents=True)
    monkeypatch.chdir(here)
    (tmp_path / "link").symlink_to(here / "in")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder.ckpt").mkdir()
    os.mkfifo(tmp_path / "pipe.ckpt")
    before = sorted(tmp_path.rglob("*"))
    for command, out, reason in (
        ("to-jax", ".", "where this program runs"),
        ("to-jax", "in/..", "where this program runs"),
        ("to-jax", tmp_path, "read"),
        ("to-torch", ".", "where this program runs"),
        ("to-torch", "/", "read"),
        ("to-torch", "in/..", "where this program runs"),
        ("to-torch", "../link/..", "where this program runs"),
        ("to-torch", tmp_path / "other" / "..", "read"),
        ("to-jax", tmp_path / "link", "symbolic link"),
        ("to-torch", tmp_path / "link", "symbolic link"),
        ("to-jax", tmp_path / "loop", "symbolic link"),
        ("to-torch", tmp_path / "loop" / "x", "is not a folder"),
        ("to-torch", tmp_path / "folder.ckpt", "is a folder, where a file"),
        ("to-torch", tmp_path / "pipe.ckpt", "neither a file nor a folder"),
        ("to-torch", encoder / "x.ckpt", "read"),
        ("to-torch", tmp_path / "pipe.ckpt" / "x.ckpt", "is not a folder"),
        ("to-torch", "/proc/x", "/proc/x"),
        ("to-torch", "/proc/x.ckpt", "/proc/x.ckpt"),
        ("to-torch", tmp_path / ("x" * 300 + ".ckpt"), "File name too long"),
        ("to-torch", os.fsdecode(b"\xff.ckpt"), "not a name in UTF-8"),
        ("to-jax", os.fsdecode(b"\xff"), "not a name in UTF-8"),
        ("to-torch", "x.gguf", "none ends in .gguf"),
        ("to-torch", "x.PKL", "none ends in .PKL"),
        ("to-jax", "x.safetensors", "none ends in .safetensors"),
    ):
        assert reason in refused(command, encoder, out, "--force"), out
    assert sorted(tmp_path.rglob("*")) == before
    run("to-torch", encoder, "v1.5")


@pytest.mark.parametrize("out", ["x.safetensors", "x.ckpt", "x", "jax"])
def test_two_runs_into_one_place(encoder, refused, out, monkeypatch, tmp_path):
    out, command = tmp_path / out, "to-jax" if out == "jax" else "to-torch"
    writing = atomic_write(out) if out.suffix else replace_folder(out)
    with contextlib.suppress(RuntimeError), writing:
        assert "another run is writing it" in refused(command, encoder, out)
        raise RuntimeError
    if out.suffix == ".ckpt":  # asks for nothing in between
        return
    about = "fact_convert.cli.saving.provenance"

    def other_is_faster(sources):
        out.mkdir()
        (out / "mine").touch()
        return {}

    monkeypatch.setattr(about, other_is_faster)
    assert "exists already" in (err := refused(command, encoder, out)) or "kept" in err
    assert (out / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", out.name])


def test_a_signal_leaves_nothing_half_written(encoder, monkeypatch, tmp_path):
    import tqdm

    # Or it would decide the exit status of the tests.
    monkeypatch.setattr("fact_jax.utils.errors._leave_at_once", lambda status: None)
    before = snapshot(tmp_path)
    for number, command, out in (
        (signal.SIGTERM, "to-torch", "x.safetensors"),
        (signal.SIGHUP, "to-torch", "x.ckpt"),
        (signal.SIGTERM, "to-jax", "x"),
    ):
        monkeypatch.setattr(
            tqdm.tqdm, "update", lambda bar, size, number=number: signal.raise_signal(number)
        )
        assert main([command, str(encoder), str(tmp_path / out)]) == 128 + number
        assert snapshot(tmp_path) == before


def test_a_disk_that_is_too_small(encoder, refused, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    for command, out in (("to-torch", "x.ckpt"), ("to-torch", "x"), ("to-jax", "x")):
        assert "only 0.0 MB are free there" in refused(command, encoder, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_numbers_that_a_precision_cannot_hold(
    encoder, golden, released_checkpoint, refused, options, tmp_path
):
    state, text = read_file(encoder)
    state["norm.weight"] = state["norm.weight"].copy()
    state["norm.weight"][3] = 1e6
    large = tmp_path / "large.safetensors"
    save_file(state, large, text)
    adapter = dict(read_file(released_checkpoint)[0])
    adapter["local_fac_prj.latents"] = adapter["local_fac_prj.latents"] * np.float32(1e6)
    save_file(
        {k: np.array(a, order="C") for k, a in adapter.items()}, tmp_path / "adapter.safetensors"
    )
    before = snapshot(tmp_path)
    for command, source, out in (
        ("to-torch", "large.safetensors", "x.safetensors"),
        ("to-torch", "large.safetensors", "x.pt"),
        ("to-torch", "large.safetensors", "x"),
        ("to-jax", "large.safetensors", "x"),
        ("extract", "adapter.safetensors", "x.ckpt"),
    ):
        words = (command, tmp_path / source, tmp_path / out, *options)
        err = refused(*words, "--dtype", "float16")
        name = "norm.weight: 1 numbers, up to 1e+06" if "large" in source else "latents: "
        assert name in err
        assert "too large for float16; bfloat16 holds" in err
        assert snapshot(tmp_path) == before
    state["norm.bias"] = np.full(state["norm.bias"].shape, np.inf, np.float32)  # they were before
    save_file(state, large, text)
    run("to-torch", large, tmp_path / "x.safetensors", "--dtype", "bfloat16", *options)


def test_to_jax_rounds(encoder, tmp_path):
    run("to-jax", encoder, tmp_path / "jax", "--dtype", "bfloat16")
    found = open_weights(tmp_path / "jax").states["transface"]
    for key, array in read_file(encoder)[0].items():
        if array.dtype == np.float32:
            assert found[key].dtype.name == "bfloat16"
            assert np.array_equal(np.asarray(found[key]), array.astype(found[key].dtype)), key


def test_every_command_speaks_json(encoder, pipeline_folder, released_checkpoint, capsys, tmp_path):
    capsys.readouterr()

    def said(*words, status: int = 0) -> dict:
        assert main([*map(os.fspath, words), "--json"]) == status
        return json.loads(capsys.readouterr().out)

    file = tmp_path / "x.safetensors"
    about = said("to-torch", encoder, file)
    assert about == {
        "out": str(file),
        "kind": "transface",
        "layout": "file",
        "written": True,
        "notes": [],
        "left out": {},
    }
    assert said("to-jax", file, tmp_path / "jax", "--dry-run")["written"] is False
    found = said("extract", released_checkpoint, tmp_path / "a.ckpt")
    assert found["notes"][0].endswith("leaves out those that BASE has too")
    assert said("verify", file, encoder) == {"same": True, "differences": [], "settings": {}}
    assert said("verify", file, tmp_path / "a.ckpt", status=1)["differences"]
    assert said("inspect", file)["kind"] == "transface"


def test_bytes_do_not_depend_on_paths_or_the_clock(encoder, pipeline_folder, monkeypatch, tmp_path):
    import time

    other = tmp_path / "elsewhere" / "renamed.safetensors"
    other.parent.mkdir()
    shutil.copy(encoder, other)
    for out in ("x.safetensors", "x.pt", "x", "jax"):
        made = []
        for source, folder, clock in ((encoder, "a", 1e9), (other, "b", 2e9)):
            found = tmp_path / folder / (folder + out)
            monkeypatch.setattr(time, "time", lambda clock=clock: clock)
            monkeypatch.setattr("sys.argv", [folder])
            run("to-jax" if out == "jax" else "to-torch", source, found)
            made.append(snapshot(found) if found.is_dir() else found.read_bytes())
        assert made[0] == made[1], out
        assert str(tmp_path) not in str(made)
    with zipfile.ZipFile(tmp_path / "a" / "ax.pt") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_what_a_source_says_beside_is_kept(encoder, tmp_path):
    run("to-torch", encoder, tmp_path / "x.safetensors")
    run("to-jax", tmp_path / "x.safetensors", tmp_path / "jax")
    run("to-torch", tmp_path / "jax", tmp_path / "y.safetensors")
    for name in ("x", "y"):
        metadata = read_file(tmp_path / f"{name}.safetensors")[1]
        assert metadata["ss_title"] == "a"
        own = {"format", "software", "sources", "content", "configs"}
        assert set(metadata) == {"ss_title", *own}


def test_a_whole_base_has_no_file_of_its_own_names(pipeline_folder, refused, tmp_path):
    words = ("to-torch", pipeline_folder, tmp_path / "x.safetensors")
    assert "has the original layout" in refused(*words, "--format", "file")
    run(*words)
    assert "model.diffusion_model.out.0.bias" in read_file(tmp_path / "x.safetensors")[0]
