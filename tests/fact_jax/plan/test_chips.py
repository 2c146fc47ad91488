"""The datasheets' table."""

import pytest

from fact_jax.plan.chips import CHIPS, chip_of


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
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
    ],
)
def test_jax_names_of_the_chips(device_kind, name):
    assert chip_of(device_kind) is CHIPS[name]


@pytest.mark.parametrize(
    "device_kind",
    [
        "cpu",
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA A1000 6GB Laptop GPU",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 PCIe",
        "TPU v50",
    ],
)
def test_unknown_device(device_kind):
    """Chips whose names begin like that of a known one are others."""
    assert chip_of(device_kind) is None


def test_units_agree():
    """Every chip does 80 to 700 operations a byte."""
    for chip in CHIPS.values():
        assert 80 < chip.peak / chip.bandwidth < 700, chip.name
        assert 10e9 < chip.memory < 300e9
