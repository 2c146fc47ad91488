"""Whose a run's folder is."""

import json

import pytest

from fact_jax.errors import UserError
from train.config import override, to_json
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


def test_a_setting_that_is_gone_is_a_difference(folder, toy_config):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"options.depth": 3}))
    with pytest.raises(UserError, match=r"options\.depth 3 -> absent"):
        claim_folder(toy_config, folder)
