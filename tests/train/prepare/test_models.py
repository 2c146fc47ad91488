"""Our decoding of public detectors, embedders and the others against their own classes."""

import numpy as np
import pytest

from fact_jax.face import Face, align_face
from fact_jax.face.align import template_points
from fact_jax.utils.errors import UserError
from fact_train.prepare.models.detectors import OnnxDetector
from fact_train.prepare.models.onnx_models import (
    OnnxEmbedder,
    OnnxParser,
    OnnxQuality,
    head_square,
)
from fact_train.prepare.models.provider import Photo, describe_model, query_providers
from fact_train.prepare.models.roles import describe_models, model_paths
from fact_train.prepare.settings import BuildSettings, RejectedError
from fact_train.prepare.sources import Item

cv2 = pytest.importorskip("cv2")
pytest.importorskip("insightface.app")
pytest.importorskip("onnx")

from tests.fact_jax.face.test_detector import save_red_square_detector  # noqa: E402
from tests.train.prepare import onnx_files  # noqa: E402

OFFSETS = template_points(112) - 56.0


def photo(image):
    return Photo(Item("made"), image, image.shape[:2])


def red_squares(height, width, *squares):
    image = np.zeros((height, width, 3), np.uint8)
    for left, top, side in squares:
        image[top : top + side, left : left + side, 0] = 255
    return image


def by_x(faces):
    return sorted(faces, key=lambda face: float(face.box[0]))


def test_scrfd_is_decoded_as_insightface_does(tmp_path):
    from insightface.model_zoo import get_model

    path = tmp_path / "detector.onnx"
    save_red_square_detector(path)
    peer = get_model(str(path), providers=["CPUExecutionProvider"])
    peer.prepare(-1, input_size=(640, 640), det_thresh=0.5)
    image = red_squares(640, 640, (64, 96, 32), (448, 320, 32))
    boxes, points = peer.detect(np.ascontiguousarray(image[..., ::-1]))
    ours = OnnxDetector(path, "cpu", 0.5)([photo(image)])[0]
    assert len(ours) == len(boxes) == 2
    order = np.argsort(boxes[:, 0])
    for face, box, five in zip(by_x(ours), boxes[order], points[order], strict=True):
        np.testing.assert_allclose(face.box, box[:4], atol=1e-3)
        np.testing.assert_allclose(face.points, five, atol=1e-3)
        assert face.score == pytest.approx(box[4], abs=1e-5)


def test_yunet_is_decoded_as_opencv_does(tmp_path):
    path = tmp_path / "yunet.onnx"
    onnx_files.save_yunet(path, OFFSETS, half=48.0)
    image = red_squares(640, 640, (64, 96, 16), (448, 320, 16))
    peer = cv2.FaceDetectorYN.create(str(path), "", (640, 640), 0.5, 0.4, 100)
    found = peer.detect(np.ascontiguousarray(image[..., ::-1]))[1]
    ours = OnnxDetector(path, "cpu", 0.5)([photo(image)])[0]
    assert len(ours) == len(found) == 2
    for face, row in zip(by_x(ours), found[np.argsort(found[:, 0])], strict=True):
        np.testing.assert_allclose(face.box, [*row[:2], *(row[:2] + row[2:4])], atol=1e-3)
        np.testing.assert_allclose(face.points.reshape(-1), row[4:14], atol=1e-3)
        assert face.score == pytest.approx(row[14], abs=1e-5)


def test_retinaface_by_hand(tmp_path):
    """Prior of 128 px at the centre (328, 104) of a cell of stride 16; variances 0.1 and 0.2."""
    path = tmp_path / "retinaface.onnx"
    onnx_files.save_retinaface(path, 640)
    image = np.zeros((640, 640, 3), np.uint8)
    image[96:112, 320:336, 0] = 255
    (face,) = OnnxDetector(path, "cpu", 0.5)([photo(image)])[0]
    # Offsets (1, -1) of a tenth of 128; width as it is, height twice.
    middle = np.array([328 + 12.8, 104 - 12.8])
    np.testing.assert_allclose(face.box, [*(middle - (64, 128)), *(middle + (64, 128))], atol=1e-2)
    points = (328, 104) + 12.8 * np.arange(10).reshape(5, 2)
    np.testing.assert_allclose(face.points, points, atol=1e-3)


def test_faces_are_in_pixels_of_the_photo(tmp_path):
    """A photo of 1280 x 960 is halved for the detector, and padded."""
    path = tmp_path / "detector.onnx"
    save_red_square_detector(path)
    large, small = red_squares(960, 1280, (128, 192, 64)), red_squares(480, 640, (64, 96, 32))
    one, other = OnnxDetector(path, "cpu", 0.5)([photo(large), photo(small)])
    assert len(one) == len(other) == 1
    # Which of a square's cells is the reddest depends on the resizing: a cell of 8 px is 16 here.
    np.testing.assert_allclose(one[0].points, 2 * other[0].points, atol=17)
    ends = (face[0].points[4] - face[0].points[0] for face in (one, other))
    np.testing.assert_allclose(next(ends), 2 * next(ends), atol=1e-3)


def test_embeddings_are_those_of_insightface(tmp_path):
    from insightface.model_zoo import get_model

    path = tmp_path / "arcface.onnx"
    onnx_files.save_embedder(path)
    crops = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    photos = [photo(crop) for crop in crops]
    for one in photos:
        one.aligned = one.image
    peer = get_model(str(path), providers=["CPUExecutionProvider"])
    wanted = peer.get_feat([np.ascontiguousarray(crop[..., ::-1]) for crop in crops])
    ours = OnnxEmbedder(path, "cpu")(photos)
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


@pytest.mark.parametrize("features", [False, True])
def test_the_quality_is_the_output_with_one_number(tmp_path, features):
    path = tmp_path / "quality.onnx"
    onnx_files.save_quality(path, features)
    photos = [photo(np.full((112, 112, 3), value, np.uint8)) for value in (0, 255)]
    for one in photos:
        one.aligned = one.image
    np.testing.assert_allclose(OnnxQuality(path, "cpu")(photos), [-1.0, 1.0], atol=1e-6)


def test_the_parsers_mask_lies_where_the_labels_are(tmp_path):
    """Red is hair: a mask of the red part, within the square around the head that it sees."""
    path = tmp_path / "parser.onnx"
    onnx_files.save_parser(path)
    one = photo(np.zeros((400, 300, 3), np.uint8))
    one.image[100:200, 50:150, 0] = 255
    points = (template_points(112) * 0.9 + (50, 100)).astype(np.float32)
    one.face = Face(points, np.array([50, 100, 150, 200], np.float32))
    left, top, right, bottom = head_square(one)
    assert right - left == bottom - top == round(256 * 0.9)
    (mask,) = OnnxParser(path, "cpu")([one])
    assert mask.shape == (400, 300)
    wanted = (one.image[..., 0] > 0).astype(np.float32)
    assert np.abs(mask - wanted).mean() < 0.01
    assert mask[150, 100] == 1
    assert mask[300, 200] == 0


@pytest.mark.slow
def test_blip_captions_a_batch(tmp_path):
    """The real classes, with random weights of a tiny configuration."""
    transformers = pytest.importorskip("transformers")
    from fact_train.prepare.models.captioner import BlipCaptioner

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "photo", "of", "face"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(vocab_file=str(tmp_path / "vocab.txt"))
    text = {"vocab_size": 10, "hidden_size": 8, "encoder_hidden_size": 8, "intermediate_size": 8}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    text |= {"bos_token_id": 5, "eos_token_id": 3, "pad_token_id": 0, "sep_token_id": 3}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 32}
    vision |= {"num_attention_heads": 2, "patch_size": 16}
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    folder = tmp_path / "blip"
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    captioner = BlipCaptioner(folder, "cpu")
    photos = [photo(np.full((40, 50, 3), value, np.uint8)) for value in (0, 255)]
    found = captioner(photos)
    assert len(found) == 2
    assert all(found)
    assert found == captioner(photos)


def test_the_next_one_is_asked_where_one_says_nothing():
    class Says:
        def __init__(self, name, answers):
            self.name, self._answers = name, answers
            self.asked = []

        def __call__(self, photos):
            self.asked += [one.item.name for one in photos]
            return [self._answers.get(one.item.name) for one in photos]

    photos = [Photo(Item(name), np.zeros((1, 1, 3), np.uint8), (1, 1)) for name in "abcd"]
    first = Says("side file", {"a": 1, "b": RejectedError("points", "no")})
    second = Says("model", {"c": 3})
    assert query_providers("points", [first, second], photos) == [1, None, 3, None]
    assert second.asked == ["c", "d"]
    assert photos[0].by == {"points": "side file"}
    assert photos[2].by == {"points": "model"}
    assert photos[1].rejected.reason == "points"


def test_models_are_told_with_hash_and_licence(tmp_path):
    import hashlib

    folder = tmp_path / "model"
    folder.mkdir()
    onnx_files.save_embedder(folder / "model.onnx")
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    settings = BuildSettings(source="x", embedder=str(folder))
    assert describe_models(settings)["embedding"] == {
        "file": "model.onnx",
        "sha256": digest,
        "licence": None,
    }
    (folder / "LICENSE.txt").write_text("\n  MIT License\n")
    assert describe_model(folder / "model.onnx")["licence"] == "MIT License"
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# A model\n")
    assert describe_model(folder / "model.onnx")["licence"] == "apache-2.0"
    save_red_square_detector(folder / "det.onnx")
    found = model_paths(BuildSettings(source="x", detector=str(folder)))
    assert found == {"points": folder / "det.onnx"}


def test_a_model_in_the_wrong_place_is_one_line(tmp_path):
    path = tmp_path / "one.onnx"
    onnx_files.save_embedder(path)
    with pytest.raises(UserError, match="known detectors are"):
        OnnxDetector(path, "cpu", 0.5)
    one = photo(np.zeros((112, 112, 3), np.uint8))
    one.aligned = one.image
    with pytest.raises(UserError, match="no quality model"):
        OnnxQuality(path, "cpu")([one])
    with pytest.raises(UserError, match="has no CUDAExecutionProvider"):
        OnnxEmbedder(path, "cuda")
    assert align_face(one.image, template_points(112).astype(np.float32)).shape == (112, 112, 3)
