"""Experiments, overrides, and what is said when they are wrong."""

import dataclasses
import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest

from fact_jax.curriculum import Stage
from fact_jax.utils.errors import UserError
from fact_train.cli.main import main
from fact_train.config import TrainConfig, list_configs, load_config
from fact_train.overrides import defaults, override, to_json


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
        ("precision=float16", "expected one of float32, tf32, bfloat16"),
        ("ema.warmup=1", "expected true or false"),
        ("options.size=(1,2,3)", "expected tuple[int, int]"),
        ("options.size=(1,2.5)", "expected tuple[int, int]"),
        ("options.stages=((", "expected tuple"),
        ("steps", "not of the form key=value"),
        ("optimizer.lr=1", "the nearest is 'optimizer.learning_rate'"),
        ("lr=1", "the nearest is 'optimizer.learning_rate'"),
        ("keep=1", "the nearest is 'checkpoint.keep'"),
    ],
)
def test_override_says_what_is_wrong_in_one_line(assignment, message):
    with pytest.raises(UserError) as caught:
        override(BASE, [assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


NONSENSE = [
    ("mini", "optimizer.learning_rate=-1", "learning_rate must be at least 0, not -1.0"),
    ("mini", "optimizer.learning_rate=nan", "learning_rate must be at least 0, not nan"),
    ("mini", "optimizer.learning_rate=inf", "learning_rate must be at least 0, not inf"),
    ("mini", "optimizer.weight_decay=-0.1", "weight_decay must be at least 0"),
    ("mini", "optimizer.weight_decay=nan", "weight_decay must be at least 0"),
    ("mini", "optimizer.clip_norm=-1", "optimizer: clip_norm must be above 0, not -1.0"),
    ("mini", "optimizer.clip_norm=0", "clip_norm must be above 0"),
    ("mini", "optimizer.clip_norm=nan", "clip_norm must be above 0"),
    ("mini", "optimizer.warmup_steps=-1", "warmup_steps must be at least 0"),
    ("mini", "optimizer.b1=1.5", "b1 must be at least 0 and below 1, not 1.5"),
    ("mini", "optimizer.b2=1", "b2 must be at least 0 and below 1"),
    ("mini", "optimizer.eps=0", "eps must be above 0"),
    ("mini", "optimizer.multipliers=(('(', 2),)", "elements are a regular expression"),
    ("mini", "optimizer.multipliers=(('a', -2),)", "elements are at least 0"),
    ("mini", "ema.decay=1.5", "ema: decay must be at least 0 and below 1, not 1.5"),
    ("mini", "ema.decay=-0.1", "decay must be at least 0 and below 1"),
    ("mini", "checkpoint.keep=0", "checkpoint: keep must be at least 1"),
    ("mini", "checkpoint.best=-1", "best must be at least 0"),
    ("mini", "log.samples_every=-5", "log: samples_every must be at least 0"),
    ("mini", "log.profile_steps=(5,2)", "profile_steps must be a first and a last step"),
    ("mini", "mesh.data=0", "mesh: data must be at least 1, or -1"),
    ("mini", "mesh.fsdp=0", "mesh: fsdp must be at least 1"),
    ("mini", "seed=-1", "seed must be at least 0"),
    ("mini", "steps=3000000000", "steps must be at least 1 and at most 2,147,483,647"),
    ("mini", "batch_size=0", "batch_size must be at least 1"),
    ("mini", "accumulate=-1", "accumulate must be at least 1"),
    ("mini", "task=", "task must be of at least 1 element"),
    ("mini", "options.base=", "options: base must be of at least 1 element"),
    ("mini", "options.people=0", "options: people must be from 1 to 20,000, not 0"),
    ("mini", "options.people=20001", "people must be from 1 to 20,000"),
    ("mini", "options.photos=0", "photos must be from 1 to 1,000"),
    ("mini", "options.photos=1", "photos must be at least 2 where a stage shuffles"),
    ("mini", "options.stages=()", "stages must be of at least 1 element"),
    ("mini", "options.stages.1.shuffle=(0,1.5)", "options.stages.1: shuffle must be a tuple"),
    ("mini", "options.stages.1.fair_weight=(0,-1)", "options.stages.1: fair_weight must be"),
    ("mini", "options.stages.0.steps=-1", "options.stages.0: steps must be at least 0"),
    ("mini", "options.drop.face=1.2", "options.drop: face must be from 0 to 1"),
    ("mini", "options.drop.face=0.95", "face + text + both must be at most 1, not 1.05"),
    ("mini", "options.gate=0", "gate must be above 0"),
    ("mini", "options.face_weight=-1", "face_weight must be at least 0"),
    ("mini", "options.min_snr=-5", "min_snr must be at least 0"),
    ("mini", "options.noise_offset=nan", "noise_offset must be at least 0"),
    (
        "mini",
        "options.generic_caption_probability=1.1",
        "generic_caption_probability must be from 0 to 1",
    ),
    ("mini", "options.resampler.heads=0", "options.resampler: heads must be at least 1"),
    ("mini_vae", "options.kl_weight=-1", "kl_weight must be at least 0"),
    ("mini_vae", "options.head_weight=inf", "head_weight must be at least 0"),
    ("mini_base", "options.drop_text=2", "drop_text must be from 0 to 1"),
    ("mini_base", "options.unet.heads=(2, 4)", "must have 3 values each"),
    ("mini_base", "options.unet.heads=(2, 4, 5)", "192 must be divided by its heads (5)"),
    ("mini_encoder", "options.people=1", "people must be from 2 to 20,000"),
    ("mini_judge", "options.blur=-0.5", "blur must be from 0 to 1"),
]


@pytest.mark.parametrize(("name", "assignment", "message"), NONSENSE)
def test_nonsense_is_refused_when_the_settings_are_read(name, assignment, message):
    with pytest.raises(UserError) as caught:
        override(load_config(name)[1], [assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranges_are_checked_when_all_assignments_are_made():
    drop = override(
        load_config("mini")[1],
        ["options.drop.face=1", "options.drop.text=0", "options.drop.both=0"],
    ).options.drop
    assert (drop.face, drop.text, drop.both) == (1.0, 0.0, 0.0)


def test_a_clip_norm_may_be_infinite():
    assert override(BASE, ["optimizer.clip_norm=inf"]).optimizer.clip_norm == float("inf")


@pytest.mark.parametrize("name", [name for name, _ in list_configs()])
def test_every_number_of_every_setting_has_a_range(name):
    """Numbers are bare in no annotation, of whatever groups an experiment is made of."""

    def bare(hint) -> bool:
        if get_origin(hint) is Annotated:
            return not hint.__metadata__
        return hint in (int, float) or any(map(bare, get_args(hint)))

    def walk(node):
        for field, hint in get_type_hints(type(node), include_extras=True).items():
            assert not bare(hint), f"{type(node).__name__}.{field}"
            value = getattr(node, field)
            for inner in value if isinstance(value, tuple) else (value,):
                if dataclasses.is_dataclass(inner):
                    walk(inner)

    walk(load_config(name)[1])


def test_stages_on_the_command_line():
    config = load_config("mini")[1]
    first, second, third = config.options.stages
    changed = override(config, ["options.stages.0.steps=7", "options.stages.2.shuffle=(0.5, 0.6)"])
    assert changed.options.stages == (
        dataclasses.replace(first, steps=7),
        second,
        dataclasses.replace(third, shuffle=(0.5, 0.6)),
    )
    given = '[{"steps": 20, "shuffle": [0, 0.5]}, {"steps": 30, "ramp": "cosine"}]'
    stages = (Stage(steps=20, shuffle=(0.0, 0.5)), Stage(steps=30, ramp="cosine"))
    assert override(config, [f"options.stages={given}"]).options.stages == stages
    python = "({'steps': 20, 'shuffle': (0, 0.5)}, {'steps': 30, 'ramp': 'cosine'})"
    assert override(config, [f"options.stages={python}"]).options.stages == stages
    # What a run's folder says of its stages can be given again; and part by part.
    kept = json.dumps(to_json(config)["options.stages"])
    assert override(config, [f"options.stages={kept}"]) == config
    both = [f"options.stages={given}", "options.stages.1.steps=31"]
    assert override(config, both).options.stages[1] == dataclasses.replace(stages[1], steps=31)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('=[{"stepz": 1}]', "'stepz' is no setting of a Stage; the nearest is 'steps'"),
        ('=[{"ramp": "cosine"}]', "a Stage needs 'steps'"),
        ('=[{"steps": 1.5}]', "steps=1.5: expected an integer"),
        ('=[{"steps": -1}]', "options.stages.0: steps must be at least 0"),
        ("=5", 'expected a list [{"steps": ..., "shuffle": ...'),
        (".7.steps=1", "'options.stages.7.steps' is no setting"),
        (".0=1", "'options.stages.0' is a group of settings"),
        (".0.text=no", "expected one of caption, empty_caption, no_cross_attention or true or"),
    ],
)
def test_stages_that_are_none(value, message):
    with pytest.raises(UserError) as caught:
        override(load_config("mini")[1], [f"options.stages{value}"])
    assert message in str(caught.value)


def test_json_has_dotted_keys_and_survives_json():
    flat = to_json(BASE)
    assert flat["options.inner.rate"] == 0.5
    assert flat["options.stages"] == [[0, 0.0]]
    assert flat["optimizer.schedule"] == "constant"


def test_an_experiment_that_is_missing_or_broken_is_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "nothing.py")
    broken = tmp_path / "broken.py"
    broken.write_text("from fact_train.config import TrainConfig\nconfig = TrainConfig(tusk='x')\n")
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
    assert main(["run", str(toy_file), "--out", str(tmp_path / "run"), "task=tie"]) == 2
    assert "the nearest is" in capsys.readouterr().err
    assert main(["run", "mini", "--out", str(tmp_path / "run"), "task=vae"]) == 2
    assert "takes VAEOptions as its options" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_and_the_list_import_nothing_heavy():
    program = (
        "import sys; from fact_train.cli.main import main; main(['configs'])\n"
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


@pytest.mark.parametrize("name", ["sd15_fact", "sd15_fact_pod"])
def test_the_recipe_starts_from_zero_projections_and_ramps_fair_in(name):
    config = load_config(name)[1]
    assert config.options.start == "zero_projections"
    weights = [stage.fair_weight for stage in config.options.stages]
    assert weights == [(0.0, 0.0), (0.0, 0.01), (0.01, 0.01)]
    # The released start, as the docstring of sd15_fact has it.
    text = importlib.import_module("fact_train.configs.sd15_fact").__doc__
    command = shlex.split(text[text.index("fact-train run sd15_fact options.") :].split("\n\n")[0])
    released = override(config, [word for word in command[3:] if word.strip()]).options
    assert released.start == "zero_gates"
    assert {stage.fair_weight for stage in released.stages} == {(0.01, 0.01)}


def test_the_pod_sees_as_many_photos_as_the_node():
    node, pod = (load_config(name)[1] for name in ("sd15_fact", "sd15_fact_pod"))
    assert node.steps * node.batch_size == pod.steps * pod.batch_size
    assert pod.ema.decay == pytest.approx(0.9992)


def test_fact_plus_is_fact_after_steps_of_the_resampler_alone():
    fact, plus = (load_config(name)[1] for name in ("sd15_fact", "sd15_fact_plus"))
    assert plus.options.pretrain_resampler > 0
    assert override(plus, ["options.pretrain_resampler=0"]) == fact


def test_defaults_are_those_of_all_settings_that_have_one():
    found = defaults(override(BASE, ["options.width=9", "steps=25", "ema.decay=0.5"]))
    assert found["options.width"] == 4
    assert found["ema.decay"] == 0.9999
    assert found["options.inner.rate"] == 0.5
    assert "steps" not in found
