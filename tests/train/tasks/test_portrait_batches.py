"""Training data drawn some people after others are those drawn together."""

import dataclasses

import numpy as np
import pytest

from fact_train.config import load_config
from fact_train.data import portraits
from fact_train.tasks import make_task

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mini_vae", {}),
        ("mini_judge", {"networks": ("features",)}),
        ("mini_encoder", {}),
        ("mini_base", {}),
        ("mini", {"point_weight": 1.0}),
    ],
)
def test_pieces_are_the_whole(name, options, monkeypatch):
    _, config = load_config(name)
    options = dataclasses.replace(config.options, people=5, photos=2, **options)
    task = make_task(dataclasses.replace(config, options=options))
    whole = task.source().arrays
    monkeypatch.setattr(portraits, "_PHOTOS_AT_ONCE", 5)  # two people, two people, one
    pieces = task.source().arrays
    assert list(pieces) == list(whole)
    for key, array in whole.items():
        assert len(array) == 10
        np.testing.assert_array_equal(pieces[key], array)
