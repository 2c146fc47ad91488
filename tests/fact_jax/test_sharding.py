"""Meshes that come out even, devices in their places, and rules by hand."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fact_jax.sharding import (
    AXES,
    FSDP_RULES,
    REPLICATED_RULES,
    MeshConfig,
    arrange_devices,
    global_batch,
    make_mesh,
    rows_of_process,
    shardings,
    zero1_shardings,
)
from fact_jax.utils.errors import UserError

MESH = AbstractMesh((4, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def test_sizes_of_the_mesh():
    assert MeshConfig().sizes(8) == (8, 1, 1)
    assert MeshConfig(fsdp=2, tensor=2).sizes(8) == (2, 2, 2)
    assert MeshConfig(data=1, fsdp=8).sizes(8) == (1, 8, 1)
    assert MeshConfig(slices=2).sizes(4) == (4, 1, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "mesh 3x1x1 (data x fsdp x tensor) does not divide 8 devices"),
        (MeshConfig(data=4), "mesh 4x1x1 (data x fsdp x tensor) does not divide 8 devices"),
        (MeshConfig(fsdp=3), "mesh -1x3x1 (data x fsdp x tensor) does not divide 8 devices"),
        (MeshConfig(tensor=16), "mesh -1x1x16 (data x fsdp x tensor) does not divide 8 devices"),
        (MeshConfig(slices=3), "data = 8 does not divide over mesh.slices = 3"),
    ],
)
def test_a_mesh_that_does_not_come_out_even(config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config.sizes(8)


@pytest.mark.parametrize("sizes", [{"data": 0}, {"data": -2}, {"fsdp": 0}, {"slices": 0}])
def test_sizes_are_positive(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        MeshConfig(**sizes)


def fake_devices(count, slices):
    return [
        SimpleNamespace(id=i, platform="cpu", device_kind="none", slice_index=i % slices)
        for i in range(count)
    ]


def test_slices_are_the_outer_part_of_the_data_axis():
    grid = arrange_devices(MeshConfig(fsdp=2, slices=2), fake_devices(8, slices=2))
    assert grid.shape == (4, 2, 1)
    by_data = [{device.slice_index for device in row.flat} for row in grid]
    assert by_data == [{0}, {0}, {1}, {1}]


def test_slices_that_are_not_there():
    with pytest.raises(UserError, match=r"mesh.slices = 4, but the devices form 2 slice\(s\)"):
        arrange_devices(MeshConfig(slices=4), fake_devices(8, slices=2))


def test_rules_by_hand():
    tree = {
        "attn": {
            "to_q": shapes(kernel=(12, 8), bias=(8,)),
            "to_out": {0: shapes(kernel=(8, 12), bias=(12,))},
        },
        "ff": {"net": {0: {"proj": shapes(kernel=(12, 96))}, 2: shapes(kernel=(48, 12))}},
        "conv": shapes(kernel=(3, 3, 4, 10), bias=(10,)),
        "norm": shapes(scale=(12,)),
        "alpha": shapes(alpha=()),
    }
    whole, split = (
        jax.tree.map(lambda s: tuple(s.spec), shardings(tree, rules, MESH))
        for rules in (REPLICATED_RULES, FSDP_RULES)
    )
    assert split["attn"]["to_q"] == {"kernel": ("fsdp", "tensor"), "bias": ("tensor",)}
    assert split["attn"]["to_out"][0] == {"kernel": ("tensor", "fsdp"), "bias": (None,)}
    assert split["ff"]["net"][0]["proj"]["kernel"] == ("fsdp", "tensor")
    assert split["ff"]["net"][2]["kernel"] == ("tensor", "fsdp")
    assert split["conv"] == {"kernel": (None, None, "fsdp", None), "bias": (None,)}
    assert split["norm"] == {"scale": (None,)}
    assert split["alpha"] == {"alpha": ()}
    assert whole["attn"]["to_q"]["kernel"] == (None, "tensor")
    assert whole["attn"]["to_out"][0]["kernel"] == ("tensor", None)
    assert whole["conv"]["kernel"] == (None,) * 4


def test_an_axis_that_does_not_divide_is_left_out():
    tree = {"to_q": shapes(kernel=(12, 7)), "to_k": shapes(kernel=(5, 8))}
    placed = shardings(tree, FSDP_RULES, MESH)
    assert placed["to_q"]["kernel"].spec == P("fsdp", None)
    assert placed["to_k"]["kernel"].spec == P(None, "tensor")


def test_the_first_rule_found_wins():
    rules = (("a/kernel", P("data")), ("kernel", P("tensor")))
    placed = shardings({"a": shapes(kernel=(8,)), "b": shapes(kernel=(8,))}, rules, MESH)
    assert (placed["a"]["kernel"].spec, placed["b"]["kernel"].spec) == (P("data"), P("tensor"))


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((16, 32), (), (None, AXES)),
        ((16, 24), (), (AXES, None)),  # 24 is longer, but 16 does not divide it
        ((12, 12), (), ()),
        ((8, 8), ("fsdp", "tensor"), (("fsdp", "data"), "tensor")),
        ((2, 8), ("fsdp", "tensor"), ("fsdp", ("tensor", "data"))),
        ((3, 3, 16, 2), (), (None, None, AXES, None)),
        ((64,), (), ()),
    ],
)
def test_spreading_over_the_axes_that_are_free(shape, spec, expected):
    leaf, placed = jax.ShapeDtypeStruct(shape, jnp.float32), NamedSharding(MESH, P(*spec))
    assert zero1_shardings(leaf, placed).spec == P(*expected)


def test_one_device_needs_all_rows_and_gets_them_back():
    mesh = make_mesh(MeshConfig())
    rows = rows_of_process(mesh, 6)
    np.testing.assert_array_equal(rows, np.arange(6))
    local = {"x": np.arange(12.0).reshape(6, 2)}
    np.testing.assert_array_equal(global_batch(mesh, 6, rows, local)["x"], local["x"])
