"""Weight deltas of LoRA, LoHa and LoKr layers, with DoRA: pure NumPy, one class each."""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from fact_convert.io.lazy_tensor import State

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer(abc.ABC):
    """The delta of one weight: ``scalar * alpha / rank`` times a product of small ``parts``.

    ``key`` is the weight's PyTorch name in a model of this ``kind``, without a prefix. Without a
    ``rank`` (a LoKr of two full matrices) nothing divides and alpha has no meaning. ``magnitude``
    is DoRA's (arXiv 2402.09353): the norm that the weight's slices along ``axis`` get, 0 for those
    of every output (peft), 1 for those of every input (LyCORIS).
    """

    algorithm: ClassVar[str]
    kind: str
    key: str
    parts: State
    alpha: float
    rank: int | None
    scalar: float = 1.0
    magnitude: np.ndarray | None = None
    axis: int = 0

    @property
    def shape(self) -> Shape:
        """(out, in), and height and width of a convolution's kernel unless it is 1 x 1.

        Where the parts do not tell the kernel from the inputs, these are one number.
        """
        found = product_shape(self.algorithm, {k: a.shape for k, a in self.parts.items()})
        assert found is not None, "layers are checked when they are read"
        return found

    @property
    def factor(self) -> float:
        """The factor on the product of the parts."""
        return self.scalar * (1.0 if self.rank is None else self.alpha / self.rank)

    @abc.abstractmethod
    def product(self) -> np.ndarray:
        """The product of the parts, in float32."""

    def delta(self) -> np.ndarray:
        """The weight delta at scale 1, float32, of :attr:`shape`."""
        return self.product().reshape(self.shape) * np.float32(self.factor)

    def fits(self, base: Shape) -> bool:
        """Whether a weight of this shape can be changed by it."""
        flat = (base[0], math.prod(base[1:])) if base else ()
        if self.shape != squeeze_kernel(base) and (self.algorithm == "LoRA" or self.shape != flat):
            return False
        return self.magnitude is None or self.magnitude.shape == base[self.axis : self.axis + 1]

    def apply(self, weight: np.ndarray, base: np.ndarray, scale: float) -> np.ndarray:
        """``weight`` with ``scale`` times the change.

        ``base`` is the weight before any LoRA: DoRA's norms are taken of it with the change in
        it, as peft does, while ``weight`` may hold others already.
        """
        delta = self.product().reshape(base.shape) * base.dtype.type(scale * self.factor)
        if self.magnitude is None:
            return weight + delta
        others = tuple(axis for axis in range(base.ndim) if axis != self.axis)
        norm = np.sqrt(np.sum(np.square(base + delta), axis=others, keepdims=True))
        return self.magnitude.astype(base.dtype).reshape(norm.shape) / norm * (weight + delta)

    def _part(self, name: str) -> np.ndarray:
        return np.asarray(self.parts[name], np.float32)

    def _low_rank(self, name: str, core: str) -> np.ndarray:
        """``a @ b``, or the Tucker decomposition with a core of the kernel's size."""
        a, b = self._part(f"{name}_a"), self._part(f"{name}_b")
        if core not in self.parts:
            return a @ b
        return np.einsum("ijkl,ip,jr->prkl", self._part(core), a, b, optimize=True)


class LoraLayer(Layer):
    """``up @ down``, with the convolution ``mid`` between them in some of kohya's files."""

    algorithm = "LoRA"

    def product(self) -> np.ndarray:
        up, down = (a.reshape(a.shape[0], -1) for a in map(self._part, ("up", "down")))
        if "mid" not in self.parts:
            return up @ down
        # up (o, r) after mid (r, s, h, w) after down (s, i): one convolution.
        return np.einsum("or,rshw,si->oihw", up, self._part("mid"), down, optimize=True)


class LohaLayer(Layer):
    """The elementwise product of two low-rank matrices (arXiv 2108.06098)."""

    algorithm = "LoHa"

    def product(self) -> np.ndarray:
        return self._low_rank("hada_w1", "hada_t1") * self._low_rank("hada_w2", "hada_t2")


class LokrLayer(Layer):
    """The Kronecker product of two matrices, each full or of low rank (arXiv 2212.10650)."""

    algorithm = "LoKr"

    def product(self) -> np.ndarray:
        one, other = (self._matrix(i) for i in (1, 2))
        # A kernel's axes belong to the second alone, so it may be flat with its inputs.
        return np.kron(one, other.reshape(other.shape[0], -1))

    def _matrix(self, i: int) -> np.ndarray:
        name = f"lokr_w{i}"
        return self._part(name) if name in self.parts else self._low_rank(name, f"lokr_t{i}")


ALGORITHMS: dict[str, type[Layer]] = {
    layer.algorithm: layer for layer in (LoraLayer, LohaLayer, LokrLayer)
}


def squeeze_kernel(shape: Shape) -> Shape:
    """The shape without the kernel of a 1 x 1 convolution."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def missing_parts(algorithm: str, parts: Mapping[str, object]) -> list[str]:
    """The parts that the algorithm needs and that are not among these."""
    if algorithm == "LoRA":
        wanted = ["down", "up"]
    elif algorithm == "LoHa":
        wanted = [f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"]
        wanted += [f"hada_t{i}" for i in (1, 2) if {"hada_t1", "hada_t2"} & parts.keys()]
    else:
        halves = [i for i in (1, 2) if f"lokr_w{i}" not in parts]
        wanted = [f"lokr_w{i}_{side}" for i in halves for side in "ab"]
    return [part for part in wanted if part not in parts]


def rank_of(algorithm: str, shapes: Mapping[str, Shape]) -> int | None:
    """The inner dimension of the parts' products; None if there is none."""
    names = {"LoRA": ["down"], "LoHa": ["hada_w1_b"], "LoKr": ["lokr_w2_b", "lokr_w1_b"]}
    return next((shapes[name][0] for name in names[algorithm] if name in shapes), None)


def product_shape(algorithm: str, shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the change that parts of these shapes make, or None if they do not fit."""
    if any(0 in shape for shape in shapes.values()):
        return None
    found = _SHAPES[algorithm](shapes)
    return None if found is None else squeeze_kernel(found)


def _lora_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    fits = len(down) in (2, 4) and len(up) in (2, 4) and math.prod(up[2:]) == 1
    if mid is None:
        return (up[0], *down[1:]) if fits and up[1] == down[0] else None
    fits = fits and len(mid) == 4 and math.prod(down[2:]) == 1
    return (up[0], down[1], *mid[2:]) if fits and mid[:2] == (up[1], down[0]) else None


def _loha_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    one, other = (_low_rank_shape(shapes, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
    return one if one == other else None


def _lokr_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    one, other = (_lokr_factor(i, shapes) for i in (1, 2))
    if one is None or other is None or len(one) != 2 or len(other) not in (2, 4):
        return None
    return (one[0] * other[0], one[1] * other[1], *other[2:])


def _lokr_factor(i: int, shapes: Mapping[str, Shape]) -> Shape | None:
    name, core = f"lokr_w{i}", f"lokr_t{i}"
    if name not in shapes:
        return _low_rank_shape(shapes, name, core)
    return None if shapes.keys() & {f"{name}_a", f"{name}_b", core} else shapes[name]


_SHAPES = {"LoRA": _lora_shape, "LoHa": _loha_shape, "LoKr": _lokr_shape}


def _low_rank_shape(shapes: Mapping[str, Shape], name: str, core: str) -> Shape | None:
    a, b, t = shapes[f"{name}_a"], shapes[f"{name}_b"], shapes.get(core)
    if len(a) != 2 or len(b) != 2:
        return None
    if t is None:
        return (a[0], b[1]) if a[1] == b[0] else None
    return (a[1], b[1], *t[2:]) if len(t) == 4 and t[:2] == (a[0], b[0]) else None
