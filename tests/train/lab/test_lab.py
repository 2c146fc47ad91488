"""The laboratory: registered questions, verdicts on made-up scores, resuming."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from fact_jax.metrics.intervals import two_way_interval
from fact_jax.utils.errors import UserError
from fact_train.cli.main import main
from fact_train.lab import one as lab_one
from fact_train.lab import run as lab_run
from fact_train.lab.question import Claim, load_questions, runs_of, shortened
from fact_train.lab.report import MEASURES, read_variant, verdict
from fact_train.lab.run import laboratory, make_laboratory


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


def scores(rows) -> dict:
    return {"another": np.asarray(rows, np.float64)}


@pytest.mark.parametrize(
    ("shift", "expected", "word"),
    [(0.2, "above", "holds"), (0.2, "below", "refuted"), (0.0, "above", "open")],
)
def test_verdicts_follow_the_interval(shift, expected, word):
    draw = np.random.default_rng(0)
    fact = draw.normal(size=(3, 96))
    noise = 0.1 * draw.normal(size=(3, 96))
    noise -= noise.mean()
    claim = Claim(variant="v", measure="another", difference=expected, source="s")
    found = verdict(claim, {"fact": scores(fact), "v": scores(fact + shift + noise)})
    assert found.word == word
    assert found.difference.mean == pytest.approx(shift)


def test_the_interval_over_seeds_and_people_holds_both():
    draw = np.random.default_rng(1)
    people, seeds = draw.normal(size=(1, 200)), np.array([[-1.0], [0.0], [1.0]])
    # Seeds alike: as wide as over people alone. Seeds apart: as wide as three seeds allow.
    alike = two_way_interval(np.repeat(people, 3, axis=0))
    assert alike.high - alike.low == pytest.approx(2 * 1.96 * people.std() / 200**0.5, rel=0.06)
    apart = two_way_interval(people * 0 + seeds)
    assert apart.mean == 0.0
    assert (apart.low, apart.high) == (-1.0, 1.0)
    one = two_way_interval(people)
    assert one.n == 200
    assert two_way_interval(np.full((2, 3), np.nan)).n == 0


def test_a_training_of_its_own_is_that_of_the_run(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(lab_run, "_call", lambda module, *words, **_: told.append(words) or 0)
    lab = make_laboratory(["fair"], tmp_path, None, 2, 20, 4)
    run = next(r for r in lab.runs() if r.key == "fair 1/seed-1")
    assert lab_run._train(lab, run) == 0
    trained = []
    outcome = SimpleNamespace(stopped_by=None)
    monkeypatch.setattr(
        lab_one, "train", lambda config, out, _: trained.append((config, out)) or outcome
    )
    assert lab_one.main(list(told[0])) == 0
    assert trained == [(run.config, tmp_path / "train" / "fair 1" / "seed-1")]


class World:
    """Trainings and evaluations that only write what they would have written."""

    def __init__(self, monkeypatch):
        self.trained, self.evaluated, self.fail_at = [], [], None
        monkeypatch.setattr(lab_run, "_train", self.train)
        monkeypatch.setattr(lab_run, "_evaluate", self.evaluate)

    def train(self, lab, run):
        folder = lab.trained(run)
        if folder not in self.trained:
            self.trained.append(folder)
        return 0

    def evaluate(self, lab, run):
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
    assert "0 trainings" not in text
    assert laboratory(lab) == 0  # nothing to do but the report
    assert (tmp_path / "lab" / "laboratory.md").read_text() == text
    assert (tmp_path / "lab" / "laboratory.png").is_file()
    with pytest.raises(UserError, match="is of another experiment"):
        laboratory(dataclasses.replace(lab, people=13))


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
