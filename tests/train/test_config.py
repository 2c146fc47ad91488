"""Experiments, overrides, and what is said when they are wrong."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from fact_jax.errors import UserError
from train.cli import main
from train.config import TrainConfig, defaults, list_configs, load_config, override, to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    width: int = 4
    flag: bool = False
    where: Path = Path("a")
    limit: int | None = 3
    mode: Literal["x", "y"] = "x"
    stages: tuple[tuple[int, float], ...] = ((0, 0.0),)
    size: tuple[int, int] = (1, 2)
    inner: Inner = Inner()


BASE = TrainConfig(task="toy", steps=10, batch_size=2, options=Options())


@pytest.mark.parametrize(
    ("assignment", "read", "expected"),
    [
        ("steps=25", lambda c: c.steps, 25),
        ("optimizer.learning_rate=3e-4", lambda c: c.optimizer.learning_rate, 3e-4),
        ("optimizer.weight_decay=1", lambda c: c.optimizer.weight_decay, 1.0),
        ("precision=bfloat16", lambda c: c.precision, "bfloat16"),
        ("ema.warmup=false", lambda c: c.ema.warmup, False),
        ("options.flag=True", lambda c: c.options.flag, True),
        ("options.where=x=y", lambda c: c.options.where, Path("x=y")),
        ("options.limit=none", lambda c: c.options.limit, None),
        ("options.limit=7", lambda c: c.options.limit, 7),
        ("options.mode=y", lambda c: c.options.mode, "y"),
        ("options.stages=((0,1),(5,.5))", lambda c: c.options.stages, ((0, 1.0), (5, 0.5))),
        ("options.size=[3,4]", lambda c: c.options.size, (3, 4)),
        ("options.inner.rate=-2", lambda c: c.options.inner.rate, -2.0),
        (
            "optimizer.multipliers=(('alpha',10),)",
            lambda c: c.optimizer.multipliers,
            (("alpha", 10.0),),
        ),
    ],
)
def test_override_converts_to_the_type_of_the_field(assignment, read, expected):
    value = read(override(BASE, [assignment]))
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.lerning_rate=1", "the nearest is 'optimizer.learning_rate'"),
        ("option.width=1", "the nearest is 'options.width'"),
        ("options.widht=1", "the nearest is 'options.width'"),
        ("steps.every=1", "'steps.every' is no setting"),
        ("optimizer=1", "is a group of settings"),
        ("steps=many", "steps=many: expected an integer"),
        ("steps=1.5", "expected an integer"),
        ("steps=0", "steps must be at least 1"),
        ("log.every=0", "every must be at least 1"),
        ("precision=float16", "expected one of float32, bfloat16"),
        ("ema.warmup=1", "expected true or false"),
        ("options.size=(1,2,3)", "expected tuple[int, int]"),
        ("options.size=(1,2.5)", "expected tuple[int, int]"),
        ("options.stages=((", "expected tuple"),
        ("steps", "not of the form key=value"),
    ],
)
def test_override_says_what_is_wrong_in_one_line(assignment, message):
    with pytest.raises(UserError) as caught:
        override(BASE, [assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_has_dotted_keys_and_survives_json():
    flat = to_json(BASE)
    assert flat["options.inner.rate"] == 0.5
    assert flat["options.stages"] == [[0, 0.0]]
    assert flat["optimizer.schedule"] == "constant"


def test_an_experiment_that_is_missing_or_broken_is_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "nothing.py")
    broken = tmp_path / "broken.py"
    broken.write_text("from train.config import TrainConfig\nconfig = TrainConfig(tusk='x')\n")
    with pytest.raises(UserError, match="unexpected keyword argument 'tusk'"):
        load_config(broken)
    broken.write_text("x = 1\n")
    with pytest.raises(UserError, match="defines no"):
        load_config(broken)


def test_command_line_errors_have_status_2_and_one_line(tmp_path, toy_file, capsys):
    assert main(["run", str(toy_file), "--out", str(tmp_path / "run"), "sed=1"]) == 2
    captured = capsys.readouterr().err
    assert captured == "error: 'sed' is no setting of this experiment; the nearest is 'seed'\n"
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    assert main(["run", str(toy_file), "--out", str(tmp_path / "file")]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert main(["run", str(toy_file), "task=tie"]) == 2
    assert "the nearest is" in capsys.readouterr().err


def test_help_and_the_list_import_nothing_heavy():
    program = (
        "import sys; from train.cli import main; main(['configs'])\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'flax', 'numpy', 'orbax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, line in list_configs():
        assert line, f"{name} has no docstring"
        assert name in done.stdout


@pytest.mark.parametrize("name", [name for name, _ in list_configs()])
def test_every_experiment_loads_and_its_stages_fill_its_steps(name):
    _, config = load_config(name)
    stages = getattr(config.options, "stages", None)
    if stages is not None:
        assert sum(stage.steps for stage in stages) == config.steps


def test_the_pod_sees_as_many_photos_as_the_node():
    node, pod = (load_config(name)[1] for name in ("sd15_fact", "sd15_fact_pod"))
    assert node.steps * node.batch_size == pod.steps * pod.batch_size
    assert pod.ema.decay == pytest.approx(0.9992)


def test_defaults_are_those_of_all_settings_that_have_one():
    found = defaults(override(BASE, ["options.width=9", "steps=25", "ema.decay=0.5"]))
    assert found["options.width"] == 4
    assert found["ema.decay"] == 0.9999
    assert found["options.inner.rate"] == 0.5
    assert "steps" not in found
