"""Layer transforms between PyTorch and JAX layouts, both directions side by side.

Results are views where a transposition suffices.
"""

import dataclasses
from collections.abc import Callable

from fact_convert.io.lazy_tensor import Tensor

TransformFn = Callable[[Tensor, int], Tensor]
"""Transforms a tensor to the other layout; the number is how many axes the other side has."""


@dataclasses.dataclass(frozen=True)
class ParameterTransform:
    """One parameter of a layer: its name on either side (empty: the path itself)."""

    torch: str
    jax: str
    to_jax: TransformFn
    to_torch: TransformFn


@dataclasses.dataclass(frozen=True)
class LayerTransform:
    """A type of layer. Every parameter is optional."""

    name: str
    parameters: tuple[ParameterTransform, ...]


def _same(array: Tensor, ndim: int) -> Tensor:
    return array


def _linear_to_jax(weight: Tensor, ndim: int) -> Tensor:
    """(out, in) -> (in, out)"""
    return weight.T


def _linear_to_torch(kernel: Tensor, ndim: int) -> Tensor:
    """(in, out) -> (out, in)"""
    return kernel.T


def _conv_to_jax(weight: Tensor, ndim: int) -> Tensor:
    """(out, in, h, w) -> (h, w, in, out)"""
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight


def _conv_to_torch(kernel: Tensor, ndim: int) -> Tensor:
    """(h, w, in, out) -> (out, in, h, w)"""
    return kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel


def _pointwise_to_jax(weight: Tensor, ndim: int) -> Tensor:
    """(out, in) or (out, in, 1, 1) -> (in, out) or (1, 1, in, out), whichever the model has"""
    if weight.ndim not in (2, 4) or weight.shape[2:] not in ((), (1, 1)):
        return _conv_to_jax(weight, ndim)
    kernel = weight.reshape(weight.shape[:2]).T
    return kernel[None, None] if ndim == 4 else kernel


def _pointwise_to_torch(kernel: Tensor, ndim: int) -> Tensor:
    """(in, out) or (1, 1, in, out) -> (out, in) or (out, in, 1, 1), whichever the file had"""
    if kernel.ndim == 4 and kernel.shape[:2] != (1, 1):
        return _conv_to_torch(kernel, ndim)
    weight = kernel.reshape(kernel.shape[-2:]).T
    return weight[:, :, None, None] if ndim == 4 else weight


_BIAS = ParameterTransform("bias", "bias", _same, _same)
_SCALE = ParameterTransform("weight", "scale", _same, _same)

LINEAR = LayerTransform(
    "linear", (ParameterTransform("weight", "kernel", _linear_to_jax, _linear_to_torch), _BIAS)
)
CONV = LayerTransform(
    "conv", (ParameterTransform("weight", "kernel", _conv_to_jax, _conv_to_torch), _BIAS)
)
POINTWISE = LayerTransform(
    "pointwise",
    (ParameterTransform("weight", "kernel", _pointwise_to_jax, _pointwise_to_torch), _BIAS),
)
"""A linear layer over channels that files hold as a matrix or as a 1 x 1 convolution."""
NORM = LayerTransform("norm", (_SCALE, _BIAS))
BATCHNORM = LayerTransform(
    "batchnorm",
    (
        _SCALE,
        _BIAS,
        ParameterTransform("running_mean", "mean", _same, _same),
        ParameterTransform("running_var", "var", _same, _same),
    ),
)
EMBED = LayerTransform("embed", (ParameterTransform("weight", "embedding", _same, _same),))
RAW = LayerTransform("raw", (ParameterTransform("", "", _same, _same),))
