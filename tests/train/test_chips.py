"""The datasheets' table."""

import pytest

from train.chips import CHIPS, chip_of


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_jax_names_of_the_chips(device_kind, name):
    assert chip_of(device_kind) is CHIPS[name]


def test_unknown_device():
    assert chip_of("cpu") is None


def test_units_agree():
    """Every chip does 80 to 700 operations a byte; its link is slower than its memory."""
    for chip in CHIPS.values():
        assert 80 < chip.peak / chip.bandwidth < 700, chip.name
        assert 10e9 < chip.memory < 300e9
        assert chip.link < chip.bandwidth
        assert chip.network is None or chip.network < chip.link
