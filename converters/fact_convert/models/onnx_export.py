"""ONNX export of the face encoder from its PyTorch state; weights keep their names."""

import json
import os

import numpy as np

from fact_convert.io.lazy_tensor import State, cast
from fact_convert.mapping import match_state
from fact_convert.weights import abstract_state, read_config
from fact_jax.models.transface import TransFaceConfig
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write

_OPSET = 17  # the first with LayerNormalization
_LARGEST = 2**31 - 2**20
"""Readers of protocol buffers stop at 2 GiB; a little of it is for the nodes."""
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Numbers of fields in ONNX's messages for a model, a graph and a tensor."""


def write_onnx(
    state: State,
    config,
    path: str | os.PathLike,
    *,
    replace: bool = True,
) -> None:
    """Write a TransFace as one ``.onnx`` file, tensor by tensor. Needs the package onnx.

    ``config`` is as for ``load_state``. Input ``images``: float32 (b, 3, h, w) in [-1, 1], RGB, of
    any batch; outputs ``tokens`` (b, n, d) and ``embedding`` (b, k). Weights are float32. Raises
    one UserError that lists every key that does not fit.
    """
    try:
        import onnx
    except ImportError as err:
        raise UserError(f"{path}: writing ONNX needs onnx: pip install 'fact-jax[faces]'") from err
    config = read_config("transface", config)
    _, flat = abstract_state("transface", config)
    shapes = {name: tuple(var.get_value().shape) for name, var in flat.items()}
    prefix, _, _ = match_state("transface", state, shapes)
    graph = _transface(config)
    weights = {key: state[prefix + key] for key in graph.weights}
    if (size := 4 * sum(array.size for array in weights.values())) > _LARGEST:
        raise UserError(f"{path}: {size} bytes of weights are too many for one ONNX file")

    model = onnx.ModelProto(ir_version=8, producer_name="fact-jax")
    model.opset_import.append(onnx.helper.make_opsetid("", _OPSET))
    about = {"kind": "transface", "config": json.dumps(config.to_dict())}
    onnx.helper.set_model_props(model, about)
    tensors = []
    for key, array in weights.items():
        tensor = onnx.TensorProto(
            name=key, dims=array.shape, data_type=onnx.TensorProto.FLOAT
        ).SerializeToString()
        tensor += _field(_RAW_DATA, 4 * array.size)
        tensors.append((_field(_INITIALIZER, len(tensor) + 4 * array.size) + tensor, array))
    nodes = graph.message(config).SerializeToString()
    length = len(nodes) + sum(len(head) + 4 * array.size for head, array in tensors)
    with atomic_write(path, replace=replace) as temporary, open(temporary, "wb") as handle:
        handle.write(model.SerializeToString() + _field(_GRAPH, length) + nodes)
        for key, (head, array) in zip(weights, tensors, strict=True):
            numbers = np.ascontiguousarray(cast(array, np.dtype("<f4"), key))
            handle.write(head)
            handle.write(numbers.reshape(-1).view(np.uint8).data)


def _field(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited protobuf field."""
    head = bytes([number << 3 | 2])
    while length > 127:
        head += bytes([length & 127 | 128])
        length >>= 7
    return head + bytes([length])


class _Graph:
    """A graph under construction: nodes in order, values by name."""

    def __init__(self):
        self.nodes: list = []
        self.constants: list = []
        self.weights: list[str] = []

    def op(self, kind: str, *inputs: str, **attributes) -> str:
        """Add a node; gives the name of what it computes."""
        return self.split_op(kind, *inputs, outputs=1, **attributes)[0]

    def split_op(self, kind: str, *inputs: str, outputs: int, **attributes) -> list[str]:
        """Add a node that computes several values; gives their names."""
        from onnx import helper

        names = [f"{kind}.{len(self.nodes)}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names

    def result(self, name: str, value: str) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node("Identity", [value], [name]))

    def weight(self, key: str) -> str:
        self.weights.append(key)
        return key

    def constant(self, value) -> str:
        from onnx import numpy_helper

        name = f"constant.{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps an axis, -1 takes the rest."""
        return self.op("Reshape", x, self.constant(np.array(shape, np.int64)))

    def linear(self, x: str, path: str, bias: bool = True) -> str:
        """A linear layer over the last axis; readers turn the weight around once, on loading."""
        turned = self.op("Transpose", self.weight(f"{path}.weight"), perm=[1, 0])
        product = self.op("MatMul", x, turned)
        return self.op("Add", product, self.weight(f"{path}.bias")) if bias else product

    def norm(self, x: str, path: str) -> str:
        names = [self.weight(f"{path}.{leaf}") for leaf in ("weight", "bias")]
        return self.op("LayerNormalization", x, *names, axis=-1, epsilon=1e-5)

    def batch_norm(self, x: str, path: str) -> str:
        leaves = ("weight", "bias", "running_mean", "running_var")
        names = [self.weight(f"{path}.{leaf}") for leaf in leaves]
        return self.op("BatchNormalization", x, *names, epsilon=2e-5)

    def message(self, config: TransFaceConfig):
        """The graph without its weights."""
        from onnx import TensorProto, helper

        def value(name: str, *shape: int | str):
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        return helper.make_graph(
            self.nodes,
            "transface",
            [value("images", "b", 3, config.img_size, config.img_size)],
            [
                value("tokens", "b", config.tokens, config.embed_dim),
                value("embedding", "b", config.num_classes),
            ],
            self.constants,
        )


def _transface(config: TransFaceConfig) -> _Graph:
    """The encoder's graph, as in ``fact_jax.models.transface``."""
    g = _Graph()
    patch, dim = [config.patch_size] * 2, config.embed_dim
    weights = [g.weight(f"patch_embed.proj.{leaf}") for leaf in ("weight", "bias")]
    x = g.op("Conv", "images", *weights, kernel_shape=patch, strides=patch)
    x = g.op("Transpose", g.reshape(x, 0, dim, -1), perm=[0, 2, 1])
    x = g.op("Add", x, g.weight("pos_embed"))
    for i in range(config.depth):
        block = f"blocks.{i}"
        x = g.op("Add", x, _attention(g, g.norm(x, f"{block}.norm1"), f"{block}.attn", config))
        hidden = g.linear(g.norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        limits = [g.constant(np.float32(limit)) for limit in (0, 6)]
        x = g.op("Add", x, g.linear(g.op("Clip", hidden, *limits), f"{block}.mlp.fc2"))
    tokens = g.norm(x, "norm")

    hidden = g.op("Relu", g.linear(g.op("Flatten", tokens), "senet.0", bias=False))
    weight = g.op("Sigmoid", g.linear(hidden, "senet.2", bias=False))
    weighted = g.op("Mul", tokens, g.reshape(weight, 0, config.tokens, 1))
    x = g.batch_norm(g.linear(g.op("Flatten", weighted), "feature.0", bias=False), "feature.1")
    embedding = g.batch_norm(g.linear(x, "feature.2", bias=False), "feature.3")
    g.result("tokens", tokens)
    g.result("embedding", embedding)
    return g


def _attention(g: _Graph, x: str, path: str, config: TransFaceConfig) -> str:
    heads, width = config.num_heads, config.embed_dim // config.num_heads
    split = g.reshape(g.linear(x, f"{path}.qkv", bias=False), 0, 0, 3, heads, width)
    parts = g.split_op("Split", g.op("Transpose", split, perm=[2, 0, 3, 1, 4]), outputs=3, axis=0)
    first = g.constant(np.array([0], np.int64))
    q, k, v = (g.op("Squeeze", part, first) for part in parts)
    scale = g.constant(np.float32(width**-0.5))
    scores = g.op("MatMul", g.op("Mul", q, scale), g.op("Transpose", k, perm=[0, 1, 3, 2]))
    mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)
    joined = g.reshape(g.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 0, config.embed_dim)
    return g.linear(joined, f"{path}.proj")
