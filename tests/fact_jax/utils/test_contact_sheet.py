"""Contact sheets hold every picture, whatever is written around them."""

import numpy as np
import pytest

from fact_jax.utils.contact_sheet import contact_sheet


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (2 * 20 + 2, 3 * 30 + 2 * 2)),
        ({"border": 6, "gap": 6, "captions": list("abcde")}, (2 * 38 + 3 * 6, 3 * 30 + 4 * 6)),
        (
            {"titles": ["one", "two", "three"], "labels": ["person\n1", "person\n2"]},
            (30 + 2 * 20 + 2, 76 + 3 * 30 + 2 * 2),
        ),
    ],
)
def test_a_sheet_holds_every_picture_in_its_order(options, size):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), np.uint8)
    sheet = contact_sheet(pictures, 3, **options)
    assert sheet.shape == (*size, 3)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (20, 30, 3))[:, :, 0]
    found = [np.argwhere((windows == picture).all((-3, -2, -1))).tolist() for picture in pictures]
    assert [len(places) for places in found] == [1] * 5
    assert sorted(found) == found


def test_a_sheet_is_no_wider_than_a_jpeg():
    wide = np.zeros((2, 1, 40_000, 3), np.uint8)
    assert contact_sheet(wide, 2).shape == (1 + 2 + 1, 40_000, 3)
