"""The real insightface and onnxruntime, on a model pack made here: its "faces" are red squares.

The network has a released detector's outputs (SCRFD: scores, boxes and five points at strides 8,
16 and 32, two anchors a cell) but no weights: a cell's score is how red it is, and box and points
are always the same around the cell.
"""

import numpy as np
import pytest

from fact_jax.face import landmarks as module
from fact_jax.face.align import template_points
from fact_jax.face.landmarks import detect_faces, find_face

onnx = pytest.importorskip("onnx")
pytest.importorskip("insightface.app")

HALF_BOX = 96.0
OFFSETS = template_points(112) - 56.0  # of the five points from the middle of the box


def save_red_square_detector(path):
    helper = onnx.helper
    nodes, constants, outputs = [], [], {"score": [], "box": [], "points": []}

    def constant(name, value):
        constants.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(kind, inputs, output, **attributes):
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    column = constant("column", np.array([-1, 1]))
    zero, one = constant("zero", np.float32(0)), constant("one", np.float32(1))
    red = node("Gather", ["image", constant("first", np.array([0]))], "red", axis=1)
    for stride in (8, 16, 32):
        window = {"kernel_shape": [stride, stride], "strides": [stride, stride]}
        mean = node("AveragePool", [red], f"mean{stride}", **window)
        cells = node("Reshape", [mean, column], f"cells{stride}")
        anchors = node("Concat", [cells, cells], f"anchors{stride}", axis=1)
        flat = node("Reshape", [anchors, column], f"flat{stride}")
        score = node("Clip", [flat, zero, one], f"score{stride}")
        outputs["score"].append((score, 1))
        nothing = node("Mul", [flat, zero], f"nothing{stride}")
        box = np.full((1, 4), HALF_BOX / stride, np.float32)
        five = (OFFSETS / stride).astype(np.float32).reshape(1, 10)
        for name, value in (("box", box), ("points", five)):
            fixed = constant(f"fixed_{name}{stride}", value)
            out = node("Add", [nothing, fixed], f"{name}{stride}")
            outputs[name].append((out, value.size))
    real = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "red_squares",
        [helper.make_tensor_value_info("image", real, [1, 3, "h", "w"])],
        [
            helper.make_tensor_value_info(name, real, [f"n{name}", width])
            for group in outputs.values()
            for name, width in group
        ],
        constants,
    )
    opsets = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    save_red_square_detector(folder / "detector.onnx")
    module._load_detector.cache_clear()
    yield folder
    module._load_detector.cache_clear()


def photo(*corners, channel=0):
    image = np.zeros((640, 640, 3), np.uint8)
    for x, y in corners:
        image[y : y + 32, x : x + 32, channel] = 255
    return image


def test_faces_with_their_points_from_left_to_right(pack):
    faces = detect_faces(photo((448, 96), (128, 320)), pack)
    assert len(faces) == 2
    for face, corner in zip(faces, ((128, 320), (448, 96)), strict=True):
        middle = face.points.mean(0) - OFFSETS.mean(0)
        # Which of the square's cells wins is the detector's business: all lie within it.
        assert (np.abs(middle - corner - 16) <= 16.01).all()
        np.testing.assert_allclose(face.points - middle, OFFSETS, atol=0.01)
        np.testing.assert_allclose(face.box, [*middle - HALF_BOX, *middle + HALF_BOX], atol=0.01)
        assert face.score > 0.9
        assert face.points.dtype == np.float32


def test_channels_reach_the_network_as_rgb(pack):
    assert detect_faces(photo((128, 320), channel=2), pack) == []


def test_a_photo_through_the_detector(pack, tmp_path):
    face, note = find_face(tmp_path / "a.png", photo((448, 96), (128, 320)), pack=pack, index=1)
    assert face.points[2, 0] > 400
    assert "non-commercial" in note
