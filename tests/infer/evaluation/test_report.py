"""The report: whole in one file, and it says what the sources say."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fact_infer.cli.main import main
from fact_infer.evaluation.figures import AMPLIFY
from fact_infer.evaluation.report import ReportSources, read_metrics, write_report
from fact_jax.metrics.intervals import Estimate
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy


class Outline(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "path", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


@pytest.fixture
def sources(tmp_path) -> ReportSources:
    """A run of 20 steps, an evaluation of 7 people, one picture by each backend."""
    run, evaluation = tmp_path / "run", tmp_path / "evaluation"
    for folder in (run, evaluation, tmp_path / "flax" / "a", tmp_path / "torch" / "a"):
        folder.mkdir(parents=True)
    rows = [{"step": s, "loss/mse": 1 / s, "loss/fair": 0.1} for s in (1, 10, 20)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 2')
    config = {"batch_size": 4, "options.people": 30, "options.weights": None}
    (run / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (3, 7, 64, 64, 3), np.uint8)
    names = ("reference", "base", "fact")
    np.savez(
        evaluation / "pictures.npz",
        ids=np.arange(80000, 80007),
        captions=np.array([f"a hat & {i}" for i in range(7)]),
        **dict(zip(names, pictures, strict=True)),
    )
    about = {
        "people": 7,
        "photos of each": 1,
        "sampler": "ddim",
        "steps": 25,
        "guidance": {"text": 3.0, "face_scale": 1.0},
        "seed": 0,
        "measures": {"reference/fact": Estimate(0.5, 0.4, 0.6, 7).to_dict()},
        "notes": ["one < note"],
    }
    (evaluation / "evaluation.json").write_text(json.dumps(about))
    image = draw.integers(1, 255, (64, 64, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "flax" / "a" / "x-seed1.png")
    image[5, 6] += 1
    Image.fromarray(image).save(tmp_path / "torch" / "a" / "x-seed1.png")
    (tmp_path / "stages.json").write_text(json.dumps({"train": {"seconds": 61.4, "done": True}}))
    return ReportSources(
        training=run,
        evaluation=evaluation,
        flax=tmp_path / "flax",
        torch=tmp_path / "torch",
        stages=tmp_path / "stages.json",
    )


def report(sources: ReportSources, out) -> Outline:
    grid, page = write_report(sources, out)
    assert grid == out / "grid.png"
    return Outline(page.read_text())


def test_report_is_whole_and_needs_nothing_from_outside(sources, tmp_path):
    page = report(sources, tmp_path / "out")
    assert page.open == []
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4  # grid, a pair of backends, marked photo, crop
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\(|@import", (tmp_path / "out" / "report.html").read_text())


def test_report_says_what_the_sources_say(sources, tmp_path):
    words = report(sources, tmp_path / "out").words
    assert "0.500 [0.400, 0.600]" in words
    assert "one < note" in words
    assert "80005: a hat & 5" in words
    assert "80006" not in words
    assert "20 steps of 4 portraits, 30 people. It began at nothing." in words
    assert "from the same noise (1)" in words
    assert "at most 1 of 255 levels, by 0.0002 on average" in words
    assert "61 s" in words


def test_report_of_a_resumed_run_says_so_and_draws_the_earlier_one(sources, tmp_path):
    config = json.loads((sources.training / "config.json").read_text())
    config["options.weights"] = "shipped.safetensors"
    (sources.training / "config.json").write_text(json.dumps(config))
    before = tmp_path / "before.jsonl"
    before.write_text("".join(json.dumps({"step": s, "loss/mse": 0.5}) + "\n" for s in (1, 400)))
    words = report(replace(sources, before=before), tmp_path / "out").words
    assert "It went on from shipped.safetensors." in words
    assert "the run it went on from" in words


def test_grid_shows_six_people_and_the_amplified_difference(sources, tmp_path):
    write_report(sources, tmp_path / "out")
    with np.load(sources.evaluation / "pictures.npz") as held:
        apart = held["fact"][0].astype(int) - held["base"][0]
    grid = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
    assert grid.shape[0] > 6 * 64 * 3
    assert grid.shape[0] < 7 * 64 * 3
    tile = grid[30 : 30 + 192, -192:].reshape(64, 3, 64, 3, 3).mean((1, 3))
    expected = np.minimum(AMPLIFY * np.abs(apart), 255)
    assert np.corrcoef(tile.ravel(), expected.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: (s.evaluation / "pictures.npz").write_bytes(b"no"),
        lambda s: (s.evaluation / "evaluation.json").write_text("{"),
        lambda s: (s.evaluation / "evaluation.json").write_text("[]"),
        lambda s: (s.evaluation / "evaluation.json").write_text('{"people": 3}'),
        lambda s: (s.evaluation / "evaluation.json").write_bytes(b"\xff"),
        lambda s: np.savez(s.evaluation / "pictures.npz", ids=np.zeros(2)),
        lambda s: (s.training / "config.json").write_text("{}"),
        lambda s: s.stages.write_text('{"train": 61}'),
        lambda s: (s.training / "metrics.jsonl").unlink(),
        lambda s: (s.training / "config.json").unlink(),
        lambda s: (s.torch / "a" / "x-seed1.png").unlink(),
        lambda s: (s.flax / "a" / "x-seed1.png").unlink(),
    ],
)
def test_what_is_missing_or_damaged_is_named_and_nothing_written(sources, tmp_path, damage):
    damage(sources)
    with pytest.raises(UserError, match=str(tmp_path)):
        write_report(sources, tmp_path / "out")
    assert not (tmp_path / "out" / "report.html").exists()


def test_lines_of_metrics_that_are_none_are_left_out(sources, tmp_path):
    path = sources.training / "metrics.jsonl"
    path.write_bytes(b'1\n\xff\n[]\n{"a": 1}\n{"step": "x"}\n' + path.read_bytes())
    assert [row["step"] for row in read_metrics(path)] == [1, 10, 20]
    path.write_text('{"step": 1, "loss/mse": NaN, "loss/fair": "x"}\n{"step": 2, "loss/mse": 1.0}')
    assert "NaN" not in report(sources, tmp_path / "out").words


def test_command_writes_the_report(sources, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--training", sources.training, "--evaluation", sources.evaluation, "--out", out]
    assert main(["report", *map(str, options)]) == 0
    assert capsys.readouterr().out.split() == [str(out / "grid.png"), str(out / "report.html")]
