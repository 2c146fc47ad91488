"""The laboratory: registered questions, verdicts on made-up scores, resuming."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fact_jax.utils.errors import UserError
from fact_train.cli.main import main
from fact_train.lab import one as lab_one
from fact_train.lab import run as lab_run
from fact_train.lab.question import load_questions, runs_of, shortened
from fact_train.lab.report import MEASURES
from fact_train.lab.run import laboratory, make_laboratory
from fact_train.lab.verdicts import read_variant
from fact_train.run.folder import file_hashes
from fact_train.run.loop import DivergedError


def test_every_question_says_what_would_refute_it():
    questions = load_questions([])
    assert questions[0].name == "fact"
    assert len(questions) >= 8
    for one in questions[1:]:
        text = " ".join(one.text.split())
        assert "efuted if" in text or "efuted where" in text, one.name
        assert one.question.claims, one.name
        for claim in one.question.claims:
            assert claim.measure in MEASURES


def test_all_configurations_train_equally_long_on_the_same_people():
    configs = [c for one in load_questions([]) for c in one.question.variants.values()]
    reference = configs[0]
    for config in configs:
        assert config.steps == reference.steps == sum(s.steps for s in config.options.stages)
        assert config.batch_size == reference.batch_size
        assert config.options.people == reference.options.people


def test_seeds_come_one_after_the_other_and_fact_is_always_there():
    runs = runs_of(load_questions(["fair"]), 2, None, ("--people", "4"))
    assert [run.key for run in runs[:2]] == ["fact/seed-0", "fair 0/seed-0"]
    assert [run.seed for run in runs] == [0] * 5 + [1] * 5
    assert all(run.config.seed == run.seed for run in runs)
    with pytest.raises(UserError, match="no question 'fare' in the laboratory: there are coupling"):
        load_questions(["fare"])


def test_shorter_trials_keep_the_proportions():
    (fact,) = load_questions(["fact"])
    config = shortened(fact.question.variants["fact"], 200)
    assert [stage.steps for stage in config.options.stages] == [16, 37, 147]
    assert config.optimizer.warmup_steps == 13


def test_a_training_of_its_own_is_that_of_the_run(monkeypatch, tmp_path):
    told = []
    programs = SimpleNamespace(call=lambda module, *words, **_: told.append(words) or 0)
    lab = make_laboratory(["fair"], tmp_path, None, 2, 20, 4)
    run = next(r for r in lab.runs() if r.key == "fair 1/seed-1")
    assert lab_run._train(lab, run, programs) == 0
    trained = []
    outcome = SimpleNamespace(stopped_by=None)
    monkeypatch.setattr(
        lab_one, "train", lambda config, out, _: trained.append((config, out)) or outcome
    )
    assert lab_one.main(list(told[0])) == 0
    options = dataclasses.replace(run.config.options, portrait_cache=str(tmp_path / "drawn"))
    config = dataclasses.replace(run.config, options=options)
    assert trained == [(config, tmp_path / "train" / "fair 1" / "seed-1")]

    def diverge(config, out, _):
        raise DivergedError("loss was not finite")

    monkeypatch.setattr(lab_one, "train", diverge)
    assert lab_one.main(list(told[0])) == lab_run.DIVERGED


def test_a_training_that_was_stopped_at_a_checkpoint_goes_on(tmp_path):
    told = []
    programs = SimpleNamespace(call=lambda module, *words, **_: told.append(words) or 0)
    lab = make_laboratory(["drop"], tmp_path, None, 1, 20, 4)
    run = lab.runs()[0]
    export = lab.trained(run) / "export"
    export.mkdir(parents=True)
    (export / "adapter.safetensors").write_bytes(b"weights")
    files = file_hashes(export)
    for step, trainings in ((10, 1), (20, 1)):
        (export / "training.json").write_text(json.dumps({"step": step, "files": files}))
        assert f"to do: {3 - step // 10} trainings" in lab_run.announce(lab, lab.runs(), lab.runs())
        assert lab_run._train(lab, run, programs) == 0
        assert len(told) == trainings


class World:
    """Trainings and evaluations that only write what they would have written."""

    def __init__(self, monkeypatch):
        self.trained, self.evaluated, self.fail_at, self.diverges = [], [], None, ()
        monkeypatch.setattr(lab_run, "_train", self.train)
        monkeypatch.setattr(lab_run, "_evaluate", self.evaluate)

    def train(self, lab, run, programs=None):
        folder = lab.trained(run)
        if folder not in self.trained:
            self.trained.append(folder)
        return lab_run.DIVERGED if run.key in self.diverges else 0

    def evaluate(self, lab, run, programs=None):
        if len(self.evaluated) == self.fail_at:
            return 130
        self.evaluated.append(run.key)
        folder = lab.evaluated(run)
        folder.mkdir(parents=True)
        draw = np.random.default_rng(run.seed)
        likeness = draw.normal(size=lab.people) + (run.variant == "no drop")
        rows = [
            {"person": i, "scores": dict.fromkeys(MEASURES, float(x))}
            for i, x in enumerate(likeness)
        ]
        (folder / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        said = {"people": lab.people, "sampler": "ddim", "steps": 25}
        (folder / "evaluation.json").write_text(json.dumps(said))
        pictures = {
            n: np.zeros((lab.people, 8, 8, 3), np.uint8) for n in ("reference", "base", "fact")
        }
        np.savez(folder / "pictures.npz", **pictures)
        return 0


def test_a_stopped_laboratory_goes_on_and_writes_the_same_report(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch)
    lab = make_laboratory(["drop", "uniid"], tmp_path / "lab", None, 2, 20, 12)
    world.fail_at = 3
    assert laboratory(lab) == 130
    assert "the same command goes on" in capsys.readouterr().err
    world.fail_at = None
    assert laboratory(lab) == 0
    assert len(world.evaluated) == len(set(world.evaluated)) == 8
    assert len(world.trained) == 6  # one is FACT's own adapter, drawn otherwise
    text = (tmp_path / "lab" / "laboratory.md").read_text()
    assert (
        "| FACT: conditions are dropped for guidance | no drop: target photo | below 0 | +1.000"
        in text
    )
    assert "| refuted |" in text
    assert (
        "**Came out the other way:** FACT: conditions are dropped for guidance (no drop)." in text
    )
    assert "\n\n\n" not in text
    assert "0 trainings" not in text
    assert laboratory(lab) == 0  # nothing to do but the report
    assert (tmp_path / "lab" / "laboratory.md").read_text() == text
    assert (tmp_path / "lab" / "laboratory-uniid.png").is_file()
    assert "![uniid: reference, base, FACT, variants](laboratory-uniid.png)" in text
    with pytest.raises(UserError, match="is of another experiment"):
        laboratory(dataclasses.replace(lab, people=13))


def test_trainings_of_another_length_are_not_taken_for_these(tmp_path, monkeypatch):
    world = World(monkeypatch)
    world.fail_at = 0
    lab = make_laboratory(["fact"], tmp_path / "lab", None, 1, 20, 12)
    assert laboratory(lab) == 130
    with pytest.raises(UserError, match="seed-0 is of another experiment, number of steps"):
        laboratory(dataclasses.replace(lab, steps=30))
    (tmp_path / "lab" / "train" / "fact" / "seed-0.json").write_text("{")
    with pytest.raises(UserError, match=r"seed-0\.json is damaged: remove it"):
        laboratory(lab)


def test_other_models_concern_only_the_runs_that_need_them(tmp_path, monkeypatch):
    World(monkeypatch)
    for name in ("base", "identity"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    monkeypatch.setattr(
        lab_run,
        "_models",
        lambda run: [tmp_path / ("identity" if run.variant == "no drop" else "base")],
    )
    monkeypatch.setattr(lab_run, "require_miniature", lambda models: None)
    make = functools.partial(make_laboratory, out=tmp_path / "lab", docs=None, seeds=1)
    assert laboratory(make(["drop"], steps=20, people=12)) == 0
    (tmp_path / "identity" / "weights").write_text("another")
    with pytest.raises(UserError, match="no drop/seed-0 is of another experiment"):
        laboratory(make(["drop"], steps=20, people=12))
    assert laboratory(make(["fact"], steps=20, people=12)) == 0


def test_a_folder_that_no_record_speaks_of_is_of_another_version(tmp_path, monkeypatch):
    World(monkeypatch)
    lab = make_laboratory(["fact"], tmp_path / "lab", None, 1, 20, 12)
    (tmp_path / "lab" / "evaluation" / "fact" / "seed-0").mkdir(parents=True)
    with pytest.raises(UserError, match="or of another version: give another --out"):
        laboratory(lab)


def test_killed_between_measuring_and_noting_it_is_measured(tmp_path, monkeypatch):
    world = World(monkeypatch)
    lab = make_laboratory(["fact"], tmp_path / "lab", None, 1, 20, 12)
    write, written = lab_run._write, []

    def killed(folder, record):
        write(folder, record)
        written.append(record)
        if len(written) == 2 or "seconds" in record:
            world.evaluate(lab, lab.runs()[0])
            raise KeyboardInterrupt

    monkeypatch.setattr(lab_run, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        laboratory(lab)
    monkeypatch.setattr(lab_run, "_write", write)
    assert laboratory(lab) == 0
    assert world.evaluated == ["fact/seed-0"]


def test_a_training_that_diverged_is_reported_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch)
    world.diverges = ("no drop/seed-1", "fact/seed-0")
    lab = make_laboratory(["drop", "uniid"], tmp_path / "lab", None, 2, 20, 12)
    assert laboratory(lab) == 0
    assert "fact/seed-0 diverged: the report says so" in capsys.readouterr().out
    # Its adapter is drawn otherwise by another variant, which is left out with it.
    assert "cap and schedule/seed-0" not in world.evaluated
    text = (tmp_path / "lab" / "laboratory.md").read_text()
    gone = "fact/seed-0, cap and schedule/seed-0, no drop/seed-1"
    assert f"Diverged (no finite updates any more) and left out: {gone}." in text
    assert "| not measured |" in text  # no seed is left of which both were measured
    assert laboratory(lab) == 0
    assert len(world.evaluated) == 5
    world.diverges = [run.key for run in lab.runs()]
    with pytest.raises(UserError, match="every training diverged"):
        laboratory(dataclasses.replace(lab, out=tmp_path / "other"))


def test_of_two_laboratories_in_a_folder_the_second_says_so(tmp_path, monkeypatch):
    World(monkeypatch)
    lab = make_laboratory(["fact"], tmp_path / "lab", None, 1, 20, 12)
    (tmp_path / "lab").mkdir()
    held = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    held += "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", held, str(tmp_path / "lab" / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process is writing in"):
            laboratory(lab)
        other.stdin.close()
    assert laboratory(lab) == 0


def test_several_at_a_time_give_the_same_report(tmp_path, monkeypatch):
    texts = []
    for jobs in (1, 3):
        World(monkeypatch)
        lab = make_laboratory(["drop", "uniid"], tmp_path / str(jobs), None, 2, 20, 12)
        with monkeypatch.context() as patch:
            patch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
            patch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
            assert laboratory(dataclasses.replace(lab, jobs=jobs)) == 0
        texts.append(lab.docs.read_text())
    assert texts[0] == texts[1]


def test_a_report_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    world = World(monkeypatch)
    lab = make_laboratory(["fact"], tmp_path / "lab", tmp_path, 1, 20, 12)
    with pytest.raises(UserError, match="no file can be written there"):
        laboratory(lab)
    assert not world.trained
    docs = tmp_path / "new" / "report.md"
    assert laboratory(dataclasses.replace(lab, docs=docs)) == 0
    assert docs.is_file()


def test_one_seed_is_said_to_be_one(tmp_path, monkeypatch):
    World(monkeypatch)
    lab = make_laboratory(["drop"], tmp_path / "lab", None, 1, 20, 12)
    assert laboratory(lab) == 0
    assert "**One seed only:**" in lab.docs.read_text()


def test_a_seed_that_measured_others_is_refused(tmp_path, monkeypatch):
    world = World(monkeypatch)
    lab = make_laboratory(["fact"], tmp_path, None, 2, 20, 4)
    for run in lab.runs():
        world.evaluate(lab, run)
    assert read_variant(lab.runs(), "fact", lab.evaluated)["another"].shape == (2, 4)
    path = lab.evaluated(lab.runs()[1]) / "pictures.jsonl"
    path.write_text(path.read_text().replace('"person": 3', '"person": 9'))
    with pytest.raises(UserError, match="other people than in the seed before"):
        read_variant(lab.runs(), "fact", lab.evaluated)


def test_the_program_says_beforehand_what_it_would_do(tmp_path, capsys):
    assert main(["lab", "fair", "--out", str(tmp_path / "lab"), "--dry-run", "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    assert "fair: Does FAIR keep the rest of the picture" in said
    assert "0 of 10 evaluations are done; to do: 10 trainings, 15,000 steps" in said
    assert "hours" in said
    assert not (tmp_path / "lab").exists()
    assert main(["lab", "--seeds", "0"]) == 2
    assert "--seeds must be at least 1, got 0" in capsys.readouterr().err
    assert main(["lab", "--jobs", "4096"]) == 2
    assert "--jobs must be from 1 to" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["lab", "--out", str(tmp_path / "file")]) == 2
    assert "is no folder" in capsys.readouterr().err
