"""The parts that reports are drawn of."""

import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from fact_infer.evaluation.figures import (
    Series,
    data_uri,
    difference,
    enlarge,
    running_mean,
    svg_curves,
    ticks,
)


def test_difference_is_amplified_clipped_and_symmetric():
    a = np.array([[[10, 0, 200]]], np.uint8)
    b = np.array([[[0, 4, 100]]], np.uint8)
    assert difference(a, b).tolist() == [[[30, 12, 255]]]
    assert (difference(a, b) == difference(b, a)).all()


def test_enlarging_keeps_a_flat_colour():
    image = np.full((3, 5, 3), 77, np.uint8)
    assert (enlarge(image, 3) == 77).all()
    assert enlarge(image, 3).shape == (9, 15, 3)


def test_data_uri_holds_the_very_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    head, _, code = data_uri(pixels).partition(",")
    assert head == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))) == pixels).all()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]),
        (0.0, 4000.0, [0, 1000, 2000, 3000, 4000]),
        (0.0, 0.37, [0, 0.1, 0.2, 0.3, 0.4]),
        (0.5, 0.5, None),
        (0.0, 0.0, None),
        (-0.3, 0.2, [-0.4, -0.2, 0.0, 0.2]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    found = ticks(low, high)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    assert len(found) >= 2
    if expected is not None:
        assert found == pytest.approx(expected)


def test_running_mean_is_shorter_at_the_ends():
    assert running_mean([0, 3, 6, 9], reach=1) == [1.5, 3, 6, 7.5]


def test_curves_are_xml_and_leave_out_what_is_not_finite():
    series = [Series("a < b", "#123456", [(1, 0.5), (2, float("nan")), (3, 0.25)])]
    root = ElementTree.fromstring(svg_curves("loss & more", series))
    paths = [p.get("d") for p in root.iter("path") if p.get("stroke") == "#123456"]
    assert len(paths) == 2
    assert all(path.count("L") == 1 for path in paths)
    assert "nan" not in "".join(paths)
    # Two points of the raw line: the later is lower in the picture (a smaller value).
    first, second = paths[0].removeprefix("M").split("L")
    assert float(first.split()[1]) < float(second.split()[1])
    assert ElementTree.fromstring(svg_curves("nothing", [])) is not None


def test_curves_over_a_logarithmic_axis_meet_their_values():
    series = [Series("", "#123456", [(0.001, 0.0), (0.002, 1.0), (0.004, 0.0)])]
    root = ElementTree.fromstring(svg_curves("score", series, reach=0, log=True))
    raw, mean = [p.get("d") for p in root.iter("path") if p.get("stroke") == "#123456"]
    assert raw == mean
    across = [float(point.split()[0]) for point in raw.removeprefix("M").split("L")]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)
    assert [text.text for text in root.iter("text") if text.get("class") == "mid"] == [
        "0.001",
        "0.002",
        "0.004",
    ]
