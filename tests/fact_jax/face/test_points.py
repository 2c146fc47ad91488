"""Where the five points come from, in which order, and what is said when they do not."""

import json
import sys
import types

import numpy as np
import pytest

from fact_jax.face import landmarks as module
from fact_jax.face.align import template_points
from fact_jax.face.landmarks import (
    can_find_faces,
    detect_faces,
    find_face,
    find_face_in,
    read_sidecar,
)
from fact_jax.utils.errors import UserError

IMAGE = np.zeros((150, 200, 3), np.uint8)
IMAGE[..., 0] = 9  # red, to see in which order the detector gets the channels
SMALL = template_points(50) + [5, 20]
LARGE = template_points(90) + [100, 10]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def as_face(points, box=None):
    return {"points": points.tolist()} | ({} if box is None else {"box": box})


class FakeAnalysis:
    """insightface's FaceAnalysis, as far as it is used."""

    found = ()
    made = 0

    def __init__(self, name, allowed_modules, providers):
        assert allowed_modules == ["detection"]
        assert providers == ["CPUExecutionProvider"]
        type(self).made += 1

    def prepare(self, ctx_id):
        assert ctx_id == -1

    def get(self, image):
        assert image.flags.c_contiguous
        assert image[0, 0].tolist() == [0, 0, 9]
        return [
            types.SimpleNamespace(kps=kps, bbox=np.array(box, np.float32), det_score=score)
            for kps, box, score in self.found
        ]


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """A model pack folder, and an insightface that finds what ``FakeAnalysis.found`` says."""
    folder = tmp_path / "packs" / "some_pack"
    folder.mkdir(parents=True)
    (folder / "det.onnx").write_bytes(b"")
    app = types.ModuleType("insightface.app")
    app.FaceAnalysis = FakeAnalysis
    monkeypatch.setitem(sys.modules, "insightface", types.ModuleType("insightface"))
    monkeypatch.setitem(sys.modules, "insightface.app", app)
    monkeypatch.setattr(module, "_PACKS", tmp_path / "packs")
    monkeypatch.setattr(
        FakeAnalysis,
        "found",
        [(LARGE.astype(np.float32), [110, 15, 190, 100], 0.9), (SMALL, [5, 20, 55, 70], 0.8)],
    )
    monkeypatch.setattr(FakeAnalysis, "made", 0)
    module._load_detector.cache_clear()
    yield folder
    module._load_detector.cache_clear()


def test_sources_in_order(tmp_path, pack):
    photo = tmp_path / "me.holiday.jpg"
    explicit = write(tmp_path / "x.json", as_face(SMALL + 1))
    face, note = find_face(photo, IMAGE, pack=pack, index=0)
    np.testing.assert_allclose(face.points, SMALL, atol=1e-5)
    write(tmp_path / "me.holiday.json", as_face(SMALL + 2))
    face, _ = find_face(photo, IMAGE, pack=pack)
    np.testing.assert_allclose(face.points, SMALL + 2, atol=1e-5)
    write(tmp_path / "me.holiday.points.json", as_face(SMALL + 3))
    face, _ = find_face(photo, IMAGE, pack=pack)
    np.testing.assert_allclose(face.points, SMALL + 3, atol=1e-5)
    face, note = find_face(photo, IMAGE, pack=pack, points_file=explicit)
    np.testing.assert_allclose(face.points, SMALL + 1, atol=1e-5)
    assert face.points.dtype == np.float32
    assert note == ""


def test_two_faces_take_the_largest_and_say_so(tmp_path):
    both = write(tmp_path / "x.json", {"faces": [as_face(LARGE), as_face(SMALL)]})
    face, note = find_face(tmp_path / "a.jpg", IMAGE, points_file=both)
    np.testing.assert_allclose(face.points, LARGE, atol=1e-4)
    assert note == (
        f"2 faces found in {both}, took the largest "
        "(face 1, counted from 0 at the left; box 100, 10, 190, 100)"
    )
    for index, points in ((0, SMALL), (1, LARGE)):
        face, note = find_face(tmp_path / "a.jpg", IMAGE, points_file=both, index=index)
        np.testing.assert_allclose(face.points, points, atol=1e-4)
        assert note == ""
    for index in (2, -1):
        with pytest.raises(UserError, match=f"no face {index} in .*: 2 found"):
            find_face(tmp_path / "a.jpg", IMAGE, points_file=both, index=index)


def test_a_given_box_decides_what_is_largest(tmp_path):
    both = {"faces": [as_face(LARGE, [120, 20, 130, 30]), as_face(SMALL)]}
    face, _ = find_face("a.jpg", IMAGE, points_file=write(tmp_path / "x.json", both))
    np.testing.assert_allclose(face.points, SMALL, atol=1e-4)


def test_detector_faces_come_from_left_to_right(pack):
    faces = detect_faces(IMAGE, pack)
    assert [face.score for face in faces] == [0.8, 0.9]
    np.testing.assert_array_equal(faces[0].box, [5, 20, 55, 70])
    detect_faces(IMAGE, "some_pack")  # by its name, and the models are loaded once
    assert FakeAnalysis.made == 1


def test_detector_notes_name_the_largest_and_the_licence(tmp_path, pack):
    _, note = find_face(tmp_path / "a.jpg", IMAGE, pack=pack)
    assert "2 faces found in" in note
    assert "non-commercial" in note
    (pack / "MODEL.LICENSE").write_text("")
    _, note = find_face(tmp_path / "a.jpg", IMAGE, pack=pack)
    assert "non-commercial" not in note
    assert str(pack / "MODEL.LICENSE") in note


def test_the_default_pack_is_used_where_it_is_installed(tmp_path, pack):
    pack.rename(pack.with_name("buffalo_l"))
    face, _ = find_face(tmp_path / "a.jpg", IMAGE)
    np.testing.assert_allclose(face.points, LARGE, atol=1e-4)


def test_a_face_in_a_picture_that_is_no_file(pack, monkeypatch):
    with pytest.raises(UserError, match=r"give its five points \(left eye, .* install a detector"):
        find_face_in(IMAGE)
    face, note = find_face_in(IMAGE, pack=pack)
    np.testing.assert_allclose(face.points, LARGE, atol=1e-4)
    assert "non-commercial" in note
    assert "2 faces found" in note
    face, _ = find_face_in(IMAGE, pack=pack, index=0)
    np.testing.assert_allclose(face.points, SMALL, atol=1e-5)
    monkeypatch.setattr(FakeAnalysis, "found", [])
    with pytest.raises(UserError, match="no face found in a picture"):
        find_face_in(IMAGE, pack=pack)


def test_no_face(tmp_path, pack, monkeypatch):
    monkeypatch.setattr(FakeAnalysis, "found", [])
    with pytest.raises(UserError, match=r"no face found in .*a.jpg: .*a.points.json"):
        find_face(tmp_path / "a.jpg", IMAGE, pack=pack)
    empty = write(tmp_path / "x.json", {"faces": []})
    with pytest.raises(UserError, match=r"no face found in .*x.json"):
        find_face(tmp_path / "a.jpg", IMAGE, points_file=empty)


def test_nothing_to_find_it_with(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PACKS", tmp_path)
    with pytest.raises(UserError) as error:
        find_face(tmp_path / "a.jpg", IMAGE)
    text = str(error.value)
    assert "\n" not in text
    for part in ("a.points.json", "left eye, right eye", "pip install 'fact-jax[faces]'"):
        assert part in text
    assert str(tmp_path / "buffalo_l") in text


@pytest.mark.parametrize(
    "content",
    [{"title": "me.jpg"}, {"points": 12}, {"faces": 3}, [1], "{", "\xff", " " * (1 << 21)],
)
def test_json_of_somebody_else_beside_the_photo(tmp_path, pack, monkeypatch, content):
    """No claim to be points: the detector looks; where there is none that file is named."""
    write(tmp_path / "a.json", content)
    face, _ = find_face(tmp_path / "a.jpg", IMAGE, pack=pack, index=0)
    np.testing.assert_allclose(face.points, SMALL, atol=1e-5)
    assert can_find_faces(tmp_path / "a.jpg", pack)
    assert not can_find_faces(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"no face points for .*a.jpg \(.*a.json is not about"):
        find_face(tmp_path / "a.jpg", IMAGE)
    write(tmp_path / "a.json", {"points": GOOD[:4]})
    with pytest.raises(UserError, match="must be five"):
        find_face(tmp_path / "a.jpg", IMAGE, pack=pack)
    assert can_find_faces(tmp_path / "a.jpg")


def test_missing_or_empty_pack(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PACKS", tmp_path)
    with pytest.raises(UserError, match="no model pack nowhere: neither a folder nor a name"):
        find_face("a.jpg", IMAGE, pack="nowhere")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UserError, match=r"hollow holds no \.onnx file"):
        detect_faces(IMAGE, "hollow")


def test_insightface_not_installed(pack, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(UserError, match=r"needs insightface and onnxruntime .*fact-jax\[faces\]"):
        detect_faces(IMAGE, pack)


def test_the_real_insightface_on_a_broken_pack(tmp_path):
    pytest.importorskip("insightface.app")
    module._load_detector.cache_clear()
    (tmp_path / "det.onnx").write_bytes(b"not a model")
    with pytest.raises(UserError, match="has no face detector that loads") as error:
        detect_faces(IMAGE, tmp_path)
    assert "\n" not in str(error.value)


def test_a_detector_that_fails_is_one_line(pack, monkeypatch):
    def fail(self, image):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(FakeAnalysis, "get", fail)
    with pytest.raises(UserError, match="failed: out of memory"):
        detect_faces(IMAGE, pack)


GOOD = SMALL.tolist()
SWAPPED = [GOOD[1], GOOD[0], GOOD[2], GOOD[4], GOOD[3]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\xff", "is not JSON"),
        ([], "holds no face points"),
        ({"landmarks": GOOD}, "holds no face points"),
        ({"faces": [{"points": GOOD}, 3]}, "face 1: expected an object"),
        ({"points": GOOD[:4]}, "must be five"),
        ({"points": [[1, 2, 3]] * 5}, "must be five"),
        ({"points": [*GOOD[:4], [1]]}, "must be five"),
        ({"points": "left"}, "must be five"),
        ({"points": [*GOOD[:4], ["x", 1]]}, "must be five"),
        ({"points": [*GOOD[:4], [float("nan"), 1]]}, "finite"),
        ({"points": [*GOOD[:4], [10**400, 1]]}, "finite"),
        ({"points": [[7, 7]] * 5}, "less than one pixel apart"),
        ({"points": SWAPPED}, "mirrored or out of order"),
        ({"points": GOOD, "box": [1, 2, 3]}, '"box" must be'),
        ({"points": GOOD, "box": [9, 2, 3, 8]}, '"box" is empty'),
    ],
)
def test_bad_sidecars(tmp_path, content, message):
    path = write(tmp_path / "x.json", content)
    with pytest.raises(UserError, match=message) as error:
        read_sidecar(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_sidecar_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_sidecar(tmp_path / "gone.json")
    with pytest.raises(UserError, match="is a folder"):
        read_sidecar(tmp_path)
    with pytest.raises(UserError, match="too large"):
        read_sidecar(write(tmp_path / "x.json", " " * (1 << 21)))


def test_points_outside_the_photo(tmp_path):
    far = write(tmp_path / "x.json", as_face(SMALL + [165, 0]))
    with pytest.raises(UserError, match=r"the right eye \(.*\) lies outside the photo.*200 x 150"):
        find_face(tmp_path / "a.jpg", IMAGE, points_file=far)
