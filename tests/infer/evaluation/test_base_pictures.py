"""Pictures of the base, drawn once for evaluations of several adapters."""

import types

import numpy as np
import pytest

from fact_infer.cli.main import main
from fact_infer.evaluation import world
from fact_infer.evaluation.results import Cost, PictureStore
from fact_infer.request import GenerationParams

ABOUT = {
    "people": 3,
    "first person": 80_000,
    "sampler": "ddim",
    "steps": 2,
    "seed": 0,
    "pictures of each": 1,
    "guidance": {"text": 3.0, "face_scale": 1.0},
    "files": {"base": "a", "adapter": "b"},
}


def folder(root, batch=16, **changes):
    return world.base_pictures(root, {**ABOUT, **changes}, batch).folder


def test_they_are_of_the_base_and_the_settings_alone(tmp_path):
    same = folder(tmp_path)
    assert folder(tmp_path, files={"base": "a", "adapter": "c"}, adapter="x") == same
    assert folder(tmp_path, guidance={"text": 3.0, "face_scale": 0.5}) == same
    others = [
        folder(tmp_path, **changes)
        for changes in (
            {"people": 4},
            {"steps": 3},
            {"seed": 1},
            {"files": {"base": "z"}},
            {"guidance": {"text": 4.0}},
            {"batch": 8},
        )
    ]
    assert len({same, *others}) == 7


class Drawer:
    """A pipeline whose pictures say how often it was asked."""

    def __init__(self):
        self.base = types.SimpleNamespace(picture_size=lambda params: (64, 64))
        self.asked = []

    def generate(self, prompts, seeds, crops, params, bar=None):
        self.asked.append("base" if crops is None else "fact")
        return np.full((len(prompts), 64, 64, 3), len(self.asked), np.uint8)


def test_the_second_adapter_finds_them_there(tmp_path):
    scenes = types.SimpleNamespace(
        captions=["a"] * 3, ids=np.arange(3), images=np.zeros((3, 64, 64, 3), np.uint8)
    )
    people = types.SimpleNamespace(scenes=scenes, crops=np.zeros((3, 1, 4, 4, 3), np.uint8))
    kept, drawer, found = PictureStore(tmp_path / "base"), Drawer(), []
    for name in ("first", "second"):
        store, cost = PictureStore(tmp_path / name), Cost()
        with cost.drawing(store, kept):
            found.append(
                world.generate_pictures(
                    drawer,
                    people,
                    GenerationParams(sampler="ddim", steps=2),
                    seed=0,
                    batch=2,
                    store=store,
                    base_store=kept,
                )
            )
        assert cost.to_dict()["drawn"] == (6 if name == "first" else 3)
        assert not (tmp_path / name / "base").exists()
    assert drawer.asked == ["base"] * 2 + ["fact"] * 4
    np.testing.assert_array_equal(found[0]["base"], found[1]["base"])
    assert (found[0]["fact"] != found[1]["fact"]).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pictures", "p.jsonl"], "leave out --base-pictures"),
        (["--folder", "f", "--adapter", "a"], "--base-pictures is for the portrait world"),
        (["--folder", "f", "--people", "0"], "--people must be at least 2, got 0"),
    ],
)
def test_they_are_of_the_portrait_world(tmp_path, capsys, options, words):
    out = ["--out", str(tmp_path / "out"), "--base-pictures", str(tmp_path / "base")]
    assert main(["evaluate", *options, *out]) == 2
    assert words in capsys.readouterr().err
