"""Photos of the portrait world for the adapter: kept for the next run, some edited by the base."""

import dataclasses

import numpy as np
import pytest

from fact_convert import tokenize
from fact_train.data.portraits import draw_portraits
from fact_train.tasks import drawn_photos
from fact_train.tasks.adapter import AdapterTask
from fact_train.tasks.drawn_photos import edited_rows, photo_arrays
from tests.train.tiny import RESAMPLER, tiny_config

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def task(miniature):
    return AdapterTask(tiny_config(miniature))


def with_options(task, **options):
    task.options = dataclasses.replace(task.config.options, **options)
    return task


def test_what_was_kept_is_the_same_and_is_not_drawn_again(task, tmp_path, monkeypatch):
    drawn = photo_arrays(with_options(task))
    kept = str(tmp_path / "kept")
    photo_arrays(with_options(task, portrait_cache=kept))
    monkeypatch.setattr(drawn_photos, "_draw", lambda task: pytest.fail("drawn again"))
    again = photo_arrays(with_options(task, portrait_cache=kept))
    assert again.keys() == drawn.keys()
    for name, array in drawn.items():
        np.testing.assert_array_equal(again[name], array)
        assert again[name].dtype == array.dtype
    monkeypatch.setattr(drawn_photos, "_draw", lambda task: {"latents": np.zeros(1)})
    other = dataclasses.replace(RESAMPLER, embedding=True, embedding_dim=8)
    for options in (
        *({"people": 6}, {"region": "face"}, {"edited": 0.5}, {"resampler": other}),
        {"point_weight": 1.0},
    ):
        assert len(photo_arrays(with_options(task, portrait_cache=kept, **options))["latents"]) == 1
    assert len(list((tmp_path / "kept").glob("*.npz"))) == 6


def test_points_come_where_they_are_weighed(task):
    points = draw_portraits("adapter", 5, 3, size=16).portrait.points
    found = photo_arrays(with_options(task, point_weight=1.0))["points"]
    np.testing.assert_array_equal(found, points)
    assert "points" not in photo_arrays(with_options(task))
    with pytest.raises(ValueError, match="which a cache does not hold"):
        with_options(task, cache="data/cache", point_weight=1.0)


def test_edits_change_their_rows_alone_and_say_what_they_show(task):
    plain = photo_arrays(with_options(task))
    edited = photo_arrays(with_options(task, edited=0.4))
    rows = edited_rows(5, 3, 0.4)
    assert 0 < rows.sum() < 15
    changed = (plain["latents"] != edited["latents"]).any((1, 2, 3))
    np.testing.assert_array_equal(changed, rows)
    np.testing.assert_array_equal(plain["tokens"], edited["tokens"])
    captions = draw_portraits("adapter", 5, 3, size=16).captions
    for row in np.flatnonzero(rows):
        person, photo = divmod(row, 3)
        told = tokenize(task.pipeline.tokenizer, [captions[person * 3 + (photo + 1) % 3]])[0][0]
        np.testing.assert_array_equal(edited["ids"][row], told)
    np.testing.assert_array_equal(edited["ids"][~rows], plain["ids"][~rows])


def test_records_have_no_drawn_photos(task):
    for options in ({"edited": 0.5}, {"portrait_cache": "kept"}):
        with pytest.raises(ValueError, match="edited and portrait_cache are of made-up portraits"):
            with_options(task, records="data/faces", **options)
