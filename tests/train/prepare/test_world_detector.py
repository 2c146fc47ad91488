"""The portrait world without side files: a trained detector, and its error against the truth."""

import json

import numpy as np
import pytest
from PIL import Image

from fact_jax.portraits import make_batch
from fact_train.data.records import Records
from fact_train.prepare.build import build
from fact_train.prepare.models.detectors import OnnxDetector
from fact_train.prepare.models.provider import Photo
from fact_train.prepare.settings import BuildSettings, Gates
from fact_train.prepare.sources import Item

pytestmark = pytest.mark.slow
pytest.importorskip("onnx")
SIDE = 96


def draw(first, count):
    ids = np.arange(first, first + count)
    batch = make_batch(ids, ids, SIDE)
    return batch.images, np.asarray(batch.portrait.points, np.float64)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    from tests.train.prepare.world_detector import train_detector

    path = tmp_path_factory.mktemp("model") / "world.onnx"
    images, points = draw(0, 400)
    train_detector(images, points, path)
    return path


@pytest.fixture(scope="module")
def people():
    """Others than those that it was trained on."""
    return draw(1000, 40)


def padded(image):
    """In the corner of 640 x 640, where a detector of that size sees it as it is."""
    whole = np.zeros((640, 640, 3), np.uint8)
    whole[:SIDE, :SIDE] = image
    return whole


def test_insightfaces_class_finds_the_same_faces(detector, people):
    pytest.importorskip("insightface.app")
    from insightface.model_zoo import get_model

    peer = get_model(str(detector), providers=["CPUExecutionProvider"])
    peer.prepare(-1, input_size=(640, 640), det_thresh=0.5)
    ours = OnnxDetector(detector, "cpu", 0.5)
    errors = []
    for image, truth in zip(*people, strict=True):
        picture = padded(image)
        boxes, points = peer.detect(np.ascontiguousarray(picture[..., ::-1]))
        (found,) = ours([Photo(Item("x"), picture, picture.shape[:2])])
        assert len(found) == len(boxes)
        for face, box, five in zip(found, boxes, points, strict=True):
            np.testing.assert_allclose(face.box, box[:4], atol=1e-2)
            np.testing.assert_allclose(face.points, five, atol=1e-2)
        eyes = np.linalg.norm(truth[1] - truth[0])
        errors.append(np.linalg.norm(points[0] - truth, axis=1).mean() / eyes if len(points) else 1)
    print(f"median error of the points: {np.median(errors):.3f} of the distance of the eyes")
    assert np.median(errors) < 0.1


def test_records_without_side_files_are_near_the_truth(detector, people, tmp_path):
    """Faces are found, and the points of the records are those of the world, to a few pixels."""
    truth = {}
    for number, (image, points) in enumerate(zip(*people, strict=True)):
        path = tmp_path / "in" / f"p{number}" / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(padded(image)).save(path)
        truth[f"p{number}/0.png"] = points
    settings = BuildSettings(
        source=str(tmp_path / "in"),
        size=320,
        crop=48,
        detector=str(detector),
        gates=Gates(face=8),
        duplicates=0.0,
    )
    summary = build(settings, str(tmp_path / "out")).summary
    assert summary["records"] >= 0.9 * len(truth), summary["reasons"]
    records = Records(tmp_path / "out")
    errors = []
    for number in range(len(records)):
        row = records[number]
        wanted = (truth[row["name"].decode()] + 0.5) / 2 - 0.5
        eyes = np.linalg.norm(wanted[1] - wanted[0])
        errors.append(np.linalg.norm(row["points"] - wanted, axis=1).mean() / eyes)
    print(json.dumps({"records": len(records), "median error": float(np.median(errors))}))
    assert np.median(errors) < 0.1
