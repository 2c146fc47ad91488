"""A dry run: the step that the run would take first, and nothing left behind."""

import json

import jax
import pytest

from fact_jax.utils.errors import UserError
from fact_train.cli.main import main
from fact_train.overrides import override
from fact_train.run.dry_run import dry_run
from fact_train.run.loop import run

pytestmark = pytest.mark.heavy


def test_it_takes_the_first_step_and_writes_nothing(
    toy_file, toy_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    assert main(["run", str(toy_file), "--out", str(out), "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "dry run: loading what the toy task starts from ..."
    placed = f"1 x {jax.devices()[0].device_kind} in 1 process(es), mesh data 1 x fsdp 1 x tensor 1"
    options = "xla_disable_hlo_passes=cse_barrier_expander"
    assert f"{placed}; float32, attention: by XLA, in tiles; {options}" in said
    assert "compiling the training step ..." in said
    assert said[-1].startswith("dry run: one step in ")
    run(override(toy_config, ["steps=1"]), out)
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    found = dry_run(toy_config)
    for name in ("loss", "gradient_norm"):
        assert found[name] == pytest.approx(first[name], rel=1e-6)


def test_a_first_step_that_is_not_finite_is_an_error(toy_config):
    with pytest.raises(UserError, match="the first step is not finite"):
        dry_run(override(toy_config, ["options.poison=(0,3)"]))
