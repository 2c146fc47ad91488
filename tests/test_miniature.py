"""The miniature's default paths, where there is no miniature: one line that names the options."""

import dataclasses
from pathlib import Path

import pytest

from fact_convert.io.hub import local_folder
from fact_infer.cli import main as infer
from fact_infer.parts import find_face_models
from fact_jax.utils.errors import UserError
from fact_jax.utils.miniature import require_miniature
from fact_train.config import load_config
from fact_train.plan.abstract_task import build
from fact_train.tasks import make_task


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_only_the_miniature_is_looked_for(tmp_path):
    require_miniature({"--base": "other/base", "--encoder": tmp_path / "miniature"})
    with pytest.raises(UserError, match=r"^--base=miniature/base: not there; the miniature comes"):
        require_miniature({"--base": "miniature/base", "--judge": "judge"})
    (tmp_path / "miniature" / "base").mkdir(parents=True)
    require_miniature({"--base": "miniature/base"})


@pytest.mark.parametrize(
    ("experiment", "options"),
    [
        ("mini", ["base", "encoder"]),
        ("mini_demo", ["base", "encoder", "weights"]),
        ("mini_base", ["vae"]),
    ],
)
def test_experiments_name_their_options(experiment, options):
    _, config = load_config(experiment)
    named = [f"options.{name}={getattr(config.options, name)}" for name in options]
    with pytest.raises(UserError) as error:
        make_task(config)
    assert str(error.value).startswith(f"{', '.join(named)}: not there")


def test_a_plan_assumes_no_other_base():
    with pytest.raises(UserError, match=r"options.base=miniature/base, .*: not there"):
        build(load_config("mini")[1])


def test_evaluation_names_its_options(capsys):
    Path("x.safetensors").touch()
    assert infer.main(["evaluate", "--adapter", "x.safetensors", "--out", "out"]) == 2
    names = ("base", "encoder", "judge")
    paths = ", ".join(f"--{name}=miniature/{name}" for name in names)
    assert capsys.readouterr().err.startswith(f"error: {paths}: not there")


def test_the_hub_is_not_asked_for_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", dataclasses.fields)  # raises TypeError
    for find in (
        lambda: local_folder("miniature/base", (), None),
        lambda: find_face_models("miniature/adapter/adapter.safetensors", None),
    ):
        with pytest.raises(UserError, match=r"^miniature/\S+: not there; the miniature comes"):
            find()
