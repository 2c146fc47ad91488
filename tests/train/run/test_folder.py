"""Whose a run's folder is."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write
from fact_train.cli.main import main
from fact_train.config import load_config
from fact_train.overrides import override, settings_of_run, to_json
from fact_train.run.folder import claim_folder, lock_folder


@pytest.fixture
def folder(toy_config, tmp_path):
    """A run's folder that holds a checkpoint."""
    claim_folder(toy_config, tmp_path)
    (tmp_path / "checkpoints" / "00000007").mkdir(parents=True)
    return tmp_path


def test_settings_that_leave_the_run_what_it_is_may_change(folder, toy_config):
    settings = ["mesh.fsdp=2", "accumulate=2", "remat=block", "log.every=3", "checkpoint.best=1"]
    changed = override(toy_config, settings)
    claim_folder(changed, folder)
    assert json.loads((folder / "config.json").read_text()) == to_json(changed)


def test_a_setting_younger_than_the_run_had_its_default(folder, toy_config):
    path = folder / "config.json"
    old = json.loads(path.read_text())
    del old["precision"], old["options.poison"]
    path.write_text(json.dumps(old))
    claim_folder(toy_config, folder)
    path.write_text(json.dumps(old))
    with pytest.raises(UserError, match="precision float32 -> bfloat16"):
        claim_folder(override(toy_config, ["precision=bfloat16"]), folder)


def test_what_runs_did_before_there_was_a_setting(folder, toy_config):
    """Older than ``decay_embeddings``, a run decayed them: it goes on only as it was."""
    path = folder / "config.json"
    old = json.loads(path.read_text())
    del old["optimizer.decay_embeddings"]
    path.write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"decay_embeddings True -> False"):
        claim_folder(toy_config, folder)
    claim_folder(override(toy_config, ["optimizer.decay_embeddings=true"]), folder)


def test_stages_of_an_older_run_are_the_same_stages():
    config = load_config("mini")[1]
    saved = to_json(config)
    for stage in saved["options.stages"]:
        del stage["ramp"]
        stage["text"] = True
    read = settings_of_run(config, saved)["options.stages"]
    assert [stage["text"] for stage in read] == ["caption"] * 3
    assert [stage["ramp"] for stage in read] == ["linear"] * 3
    assert settings_of_run(config, saved | {"options.stages": "none"})["options.stages"] == "none"


@pytest.mark.parametrize("junk", [b"{", b"[]", b"3", b"\xff\xfe", b'{"a": 1}', None])
def test_a_damaged_configuration_is_taken_from_a_checkpoint(junk, folder, toy_config):
    path, meta = folder / "config.json", folder / "checkpoints" / "00000007" / "meta" / "metadata"
    other = override(toy_config, ["seed=4"])
    with_damage = path.unlink if junk is None else lambda: path.write_bytes(junk)
    with_damage()
    with pytest.raises(UserError, match=r"config\.json .*, and no checkpoint beside it says"):
        claim_folder(toy_config, folder)
    meta.parent.mkdir()
    meta.write_text(json.dumps({"config": to_json(toy_config)}))
    with pytest.raises(UserError, match="seed 3 -> 4"):
        claim_folder(other, folder)
    claim_folder(toy_config, folder)
    assert json.loads(path.read_text()) == to_json(toy_config)


def test_changes_are_told_from_what_was_trained_not_from_a_start_that_came_to_nothing(
    folder, toy_config
):
    meta = folder / "checkpoints" / "00000007" / "meta" / "metadata"
    meta.parent.mkdir()
    meta.write_text(json.dumps({"config": to_json(toy_config)}))
    slower = override(toy_config, ["optimizer.learning_rate=1e-3"])
    for _ in range(2):  # as if the first had been killed before its first checkpoint
        assert claim_folder(slower, folder) == ["optimizer.learning_rate 0.01 -> 0.001"]
    assert claim_folder(toy_config, folder) == []


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "export/mine.txt"])
def test_files_that_are_not_a_runs_are_not_written_over(name, toy_config, tmp_path):
    """As those of a model's folder that was given as --out."""
    (tmp_path / "job.sh").touch()
    claim_folder(toy_config, tmp_path)
    (tmp_path / "config.json").unlink()
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"model_type": "transface"}')
    with pytest.raises(UserError, match=f"holds {Path(name).parts[0]}, but no run's config.json"):
        claim_folder(toy_config, tmp_path)
    assert path.read_text() == '{"model_type": "transface"}'


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("host far, process 7, since noon")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_in_one_folder_is_refused_until_the_first_is_dead(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="process 7, since noon"), lock_folder(tmp_path):
            pass
        holder.kill()
    with lock_folder(tmp_path) as warnings:
        assert warnings == []
        assert f"process {os.getpid()}, " in (tmp_path / ".lock").read_text()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def lockf(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    with lock_folder(tmp_path) as warnings:
        assert len(warnings) == 1
        assert "start only one process in it" in warnings[0]


@pytest.mark.parametrize("out", ["gs://b/r", "s3://b/r/", "runs:/x"])
def test_a_url_is_refused_and_makes_no_folder(out, toy_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ["run", "cache"] if "://" not in out else ["cache"]:
        assert main([command, str(toy_file), "--out", out]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {out.split(':')[0]}://")
        assert "mount the bucket as a folder" in line
    with pytest.raises(UserError, match="mount the bucket"), atomic_write(Path(out)):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs:").mkdir()  # who has such a folder may use it
    with atomic_write(Path("runs:/x")) as temporary:
        temporary.touch()


def test_a_setting_that_is_gone_is_a_difference(folder, toy_config):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"options.depth": 3}))
    with pytest.raises(UserError, match=r"options\.depth 3 -> absent"):
        claim_folder(toy_config, folder)
