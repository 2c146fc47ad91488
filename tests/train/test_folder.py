"""Whose a run's folder is."""

import json

import pytest

from fact_jax.errors import UserError
from train.config import load_config, override, settings_of_run, to_json
from train.folder import claim_folder


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


def test_a_setting_that_is_gone_is_a_difference(folder, toy_config):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"options.depth": 3}))
    with pytest.raises(UserError, match=r"options\.depth 3 -> absent"):
        claim_folder(toy_config, folder)
