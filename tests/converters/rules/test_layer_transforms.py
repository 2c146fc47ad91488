"""The two directions of each kind, against values written by hand."""

import numpy as np
import pytest

from fact_convert.rules import layer_transforms as kinds


def turned(kind, leaf, array, ndim=None):
    (found,) = (one for one in kind.parameters if one.torch == leaf)
    there = found.to_jax(array, array.ndim if ndim is None else ndim)
    return there, found.to_torch(there, array.ndim)


def test_linear_is_transposed():
    weight = np.array([[1, 2, 3], [4, 5, 6]])  # two outputs of three inputs
    kernel, back = turned(kinds.LINEAR, "weight", weight)
    assert kernel.tolist() == [[1, 4], [2, 5], [3, 6]]
    assert back.tolist() == weight.tolist()


def test_conv_goes_from_oihw_to_hwio():
    weight = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    kernel, back = turned(kinds.CONV, "weight", weight)
    assert kernel.shape == (5, 7, 3, 2)
    assert kernel[4, 6, 2, 1] == weight[1, 2, 4, 6] == 209
    assert kernel[0, 6, 1, 0] == weight[0, 1, 0, 6] == 41
    assert np.array_equal(back, weight)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1, 1)])
@pytest.mark.parametrize(("ndim", "kernel_shape"), [(2, (3, 2)), (4, (1, 1, 3, 2))])
def test_pointwise_takes_either_form_and_gives_it_back(shape, ndim, kernel_shape):
    weight = np.arange(6).reshape(shape)
    kernel, back = turned(kinds.POINTWISE, "weight", weight, ndim)
    assert kernel.shape == kernel_shape
    assert kernel.reshape(3, 2).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert back.shape == shape
    assert np.array_equal(back, weight)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (kinds.NORM, {"weight": "scale", "bias": "bias"}),
        (kinds.EMBED, {"weight": "embedding"}),
        (kinds.RAW, {"": ""}),
        (
            kinds.BATCHNORM,
            {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"},
        ),
    ],
)
def test_other_kinds_only_rename(kind, names):
    assert {leaf.torch: leaf.jax for leaf in kind.parameters} == names
    array = np.arange(6).reshape(2, 3)
    for leaf in kind.parameters:
        assert leaf.to_jax(array, 2) is array
        assert leaf.to_torch(array, 2) is array
