"""Small networks in the public layouts, made by construction: no weights are trained.

Detectors see red squares (a cell's score is how red it is), whose box and points lie always the
same around the cell.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class _Graph:
    def __init__(self):
        self.nodes, self.constants, self.outputs = [], [], []

    def constant(self, name, value):
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind, inputs, output, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def output(self, name, shape):
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def save(self, path, shape):
        image = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "made", [image], self.outputs, self.constants)
        opsets = [helper.make_opsetid("", 13)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def _cells(graph, stride, channel, shift=0.0, scale=1.0):
    """Mean of a channel in each cell, (n, cells, 1), row by row, brought to 0..1."""
    name = f"channel{stride}"
    one = graph.node(
        "Gather", ["input", graph.constant(f"which{stride}", np.array([channel]))], name, axis=1
    )
    window = {"kernel_shape": [stride, stride], "strides": [stride, stride]}
    mean = graph.node("AveragePool", [one], f"mean{stride}", **window)
    flat = graph.node(
        "Reshape", [mean, graph.constant(f"to{stride}", np.array([0, -1, 1]))], f"flat{stride}"
    )
    moved = graph.node(
        "Add", [flat, graph.constant(f"shift{stride}", np.float32(shift))], f"moved{stride}"
    )
    wide = graph.node(
        "Mul", [moved, graph.constant(f"scale{stride}", np.float32(scale))], f"wide{stride}"
    )
    ends = [graph.constant(f"{end}{stride}", np.float32(end)) for end in (0, 1)]
    return graph.node("Clip", [wide, *ends], f"red{stride}")


def _fixed(graph, name, red, stride, values):
    """The same numbers in every cell."""
    zero = graph.node(
        "Mul", [red, graph.constant(f"zero_{name}", np.float32(0))], f"nothing_{name}"
    )
    row = graph.constant(f"row_{name}", np.asarray(values, np.float32).reshape(1, 1, -1))
    return graph.node("Add", [zero, row], name)


def save_yunet(path, offsets, half):
    """YuNet's layout, 640 x 640, BGR in 0..255."""
    graph = _Graph()
    outputs = {}
    for stride in (8, 16, 32):
        red = _cells(graph, stride, 2, scale=1 / 255)
        for kind in ("cls", "obj"):
            outputs[f"{kind}_{stride}"] = (graph.node("Identity", [red], f"{kind}_{stride}"), 1)
        centre = [0.5, 0.5, *np.log([2 * half / stride] * 2)]
        outputs[f"bbox_{stride}"] = (_fixed(graph, f"bbox_{stride}", red, stride, centre), 4)
        points = np.asarray(offsets) / stride + 0.5
        outputs[f"kps_{stride}"] = (_fixed(graph, f"kps_{stride}", red, stride, points), 10)
    for kind in ("cls", "obj", "bbox", "kps"):
        for stride in (8, 16, 32):
            name, width = outputs[f"{kind}_{stride}"]
            graph.output(name, [1, (640 // stride) ** 2, width])
    graph.save(path, [1, 3, 640, 640])


def save_retinaface(path, side):
    """RetinaFace of PyTorch for one size: every second prior of stride 16 (128 px) scores."""
    graph = _Graph()
    reds = []
    for stride in (8, 16, 32):
        red = _cells(graph, stride, 2, shift=123.0, scale=1 / 255)  # what was taken off
        zero = graph.constant(f"none{stride}", np.float32(stride == 16))
        small = graph.node("Mul", [red, graph.constant(f"no{stride}", np.float32(0))], f"a{stride}")
        large = graph.node("Mul", [red, zero], f"b{stride}")
        pair = graph.node("Concat", [small, large], f"pair{stride}", axis=2)
        shape = graph.constant(f"line{stride}", np.array([0, -1, 1]))
        reds.append(graph.node("Reshape", [pair, shape], f"priors{stride}"))
    scores = graph.node("Concat", reds, "scores", axis=1)
    other = graph.node("Sub", [graph.constant("one", np.float32(1)), scores], "other")
    graph.node("Concat", [other, scores], "conf", axis=2)
    _fixed(graph, "loc", scores, 0, [1.0, -1.0, 0.0, np.log(2) / 0.2])
    _fixed(graph, "landms", scores, 0, np.arange(10))
    for name, width in (("loc", 4), ("conf", 2), ("landms", 10)):
        graph.output(name, ["n", "priors", width])
    graph.save(path, ["n", 3, side, side])


def save_embedder(path, dimensions=128, seed=0):
    """A random projection of 8 x 8 means of the crop: what looks alike lies near each other."""
    graph = _Graph()
    weights = np.random.default_rng(seed).normal(size=(192, dimensions)).astype(np.float32)
    pooled = graph.node("AveragePool", ["input"], "pooled", kernel_shape=[14, 14], strides=[14, 14])
    flat = graph.node("Flatten", [pooled], "flat")
    graph.node("MatMul", [flat, graph.constant("weights", weights)], "embedding")
    graph.output("embedding", ["n", dimensions])
    graph.save(path, ["n", 3, 112, 112])


def save_quality(path, features=False):
    """The crop's mean as its quality; as CR-FIQA also features."""
    graph = _Graph()
    mean = graph.node("ReduceMean", ["input"], "mean", axes=[1, 2, 3], keepdims=0)
    graph.node("Unsqueeze", [mean, graph.constant("last", np.array([1]))], "quality")
    if features:
        graph.node("Flatten", ["input"], "features")
        graph.output("features", ["n", 3 * 112 * 112])
    graph.output("quality", ["n", 1])
    graph.save(path, ["n", 3, 112, 112])


def save_parser(path, side=64):
    """BiSeNet's layout: label 17 (hair) where the picture is red, 14 (neck) elsewhere."""
    graph = _Graph()
    red = graph.node("Gather", ["input", graph.constant("first", np.array([0]))], "red", axis=1)
    zero = graph.node("Mul", [red, graph.constant("zero", np.float32(0))], "zeros")
    planes = [zero] * 17 + [red, zero]
    small = graph.constant("small", np.float32(0.1))
    planes[14] = graph.node("Add", [zero, small], "neck")
    graph.node("Concat", planes, "scores", axis=1)
    graph.output("scores", ["n", 19, side, side])
    graph.save(path, ["n", 3, side, side])
