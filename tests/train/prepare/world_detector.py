"""A face detector for the portrait world in SCRFD's layout, trained here in seconds.

A small convolutional network at stride 16 is trained in JAX on portraits with their true points;
the exported file has SCRFD's nine outputs, those of strides 8 and 32 with scores of 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import optax
from onnx import TensorProto, helper, numpy_helper

WIDTHS = (16, 32, 64, 96)
STRIDE = 16
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def _init(key):
    sizes = list(zip((3, *WIDTHS[:-1]), WIDTHS, strict=True))
    keys = jax.random.split(key, len(sizes) + 2)
    layers = [
        (jax.random.normal(k, (3, 3, i, o)) * (2 / (9 * i)) ** 0.5, jnp.zeros(o))
        for k, (i, o) in zip(keys, sizes, strict=False)
    ]
    layers.append((jax.random.normal(keys[-2], (3, 3, WIDTHS[-1], 96)) * 0.05, jnp.zeros(96)))
    layers.append((jax.random.normal(keys[-1], (1, 1, 96, 15)) * 0.05, jnp.zeros(15)))
    return layers


def _apply(layers, images):
    """(n, h, w, 3) in SCRFD's normalization to (n, h / 16, w / 16, 15): logit, box, points."""
    x = images
    for number, (weights, bias) in enumerate(layers):
        stride = 2 if number < len(WIDTHS) else 1
        pad = weights.shape[0] // 2
        x = jax.lax.conv_general_dilated(
            x,
            weights,
            (stride, stride),
            [(pad, pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = x + bias
        x = jax.nn.relu(x) if number < len(layers) - 1 else x
    return x


def _targets(points, cells):
    """Which cell holds the middle of the face, and box and points from each, in strides."""
    low, high = points.min(1), points.max(1)
    middle, half = points.mean(1), (high - low).max(-1, keepdims=True)
    corners = np.stack(np.meshgrid(np.arange(cells), np.arange(cells)), -1) * STRIDE
    near = np.abs(corners[None] - middle[:, None, None]).max(-1) <= STRIDE * 0.75
    box = np.concatenate([middle - half, middle + half], 1)[:, None, None]
    sides = np.concatenate([corners - box[..., :2], box[..., 2:] - corners], -1) / STRIDE
    offsets = (points[:, None, None] - corners[None, :, :, None]) / STRIDE
    return near, np.concatenate([sides, offsets.reshape(*near.shape, 10)], -1)


def train_detector(images, points, path, steps=1000, batch=24):
    """Train on portraits (n, s, s, 3) with points (n, 5, 2), scaled and placed at random."""
    side = 128
    rng = np.random.default_rng(0)
    layers = _init(jax.random.key(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    state = optimizer.init(layers)

    @jax.jit
    def step(layers, state, x, near, wanted):
        def loss(layers):
            out = _apply(layers, x)
            score = optax.sigmoid_binary_cross_entropy(out[..., 0], near).mean()
            apart = jnp.abs(out[..., 1:] - wanted).mean(-1)
            return 10 * score + (apart * near).sum() / near.sum()

        value, gradient = jax.value_and_grad(loss)(layers)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(layers, updates), state, value

    for _ in range(steps):
        chosen = rng.integers(0, len(images), batch)
        x = rng.integers(0, 256, (batch, 1, 1, 3)) * np.ones((batch, side, side, 3))
        moved = np.empty((batch, 5, 2))
        for i, number in enumerate(chosen):
            s = images.shape[1]
            left, top = rng.integers(0, side - s + 1, 2)
            x[i, top : top + s, left : left + s] = images[number]
            moved[i] = points[number] + (left, top)
        near, wanted = _targets(moved, side // STRIDE)
        x = ((x - 127.5) / 128).astype(np.float32)
        layers, state, _ = step(layers, state, x, near.astype(np.float32), wanted)
    _export(layers, path)
    return layers


def _export(layers, path):
    nodes, constants, outputs = [], [], []

    def constant(name, value):
        constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(kind, inputs, output, **attributes):
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    x = "input"
    for number, (weights, bias) in enumerate(layers):
        stride, pad = (2 if number < len(WIDTHS) else 1), weights.shape[0] // 2
        kernel = constant(f"w{number}", np.asarray(weights).transpose(3, 2, 0, 1))
        inputs = [x, kernel, constant(f"b{number}", bias)]
        x = node("Conv", inputs, f"c{number}", strides=[stride] * 2, pads=[pad] * 4)
        if number < len(layers) - 1:
            x = node("Relu", [x], f"r{number}")
    rows = node("Transpose", [x], "rows", perm=[0, 2, 3, 1])
    cells = node("Reshape", [rows, constant("cells", np.array([-1, 15]))], "flat")
    axis = constant("axis", np.array([1]))
    for name, first, last in (("score", 0, 1), ("box", 1, 5), ("points", 5, 15)):
        ends = [constant(f"{name}{end}", np.array([end])) for end in (first, last)]
        part = node("Slice", [cells, *ends, axis], f"part_{name}")
        part = node("Sigmoid", [part], "sure") if name == "score" else part
        # Two anchors a cell; the second never sees a face.
        other = node("Mul", [part, constant(f"zero_{name}", np.float32(0))], f"other_{name}")
        pair = node("Concat", [part, other], f"pair_{name}", axis=1)
        width = last - first
        shape = constant(f"shape_{name}", np.array([-1, width]))
        made = {16: node("Reshape", [pair, shape], f"{name}16")}
        for stride, times in ((8, 4), (32, 1)):
            made[stride] = f"{name}{stride}"
            if stride == 8:
                nothing = node("Mul", [made[16], f"zero_{name}"], f"nothing_{name}")
                node("Concat", [nothing] * times, made[8], axis=0)
            else:
                pool = node(
                    "AveragePool", ["input"], f"p_{name}", kernel_shape=[32] * 2, strides=[32] * 2
                )
                zero = node("Mul", [pool, f"zero_{name}"], f"z_{name}")
                one = node("Slice", [zero, "score0", "score1", axis], f"s_{name}")
                many = node("Reshape", [one, constant(f"m_{name}", np.array([-1, 1]))], f"l_{name}")
                wide = node("Concat", [many] * width, f"w_{name}", axis=1)
                node("Concat", [wide, wide], made[32], axis=0)
        outputs.append([(made[stride], width) for stride in (8, 16, 32)])
    real = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "world",
        [helper.make_tensor_value_info("input", real, [1, 3, "h", "w"])],
        [
            helper.make_tensor_value_info(name, real, [f"n_{name}", width])
            for group in outputs
            for name, width in group
        ],
        constants,
    )
    opsets = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
