"""Ranking by likeness and the sheet of all pictures."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fact_convert import load_encoder
from fact_infer.cli.main import main
from fact_infer.evaluation import ranking
from fact_infer.parts import read_face_models
from fact_jax.face.align import align_face, template_points
from fact_jax.face.landmarks import Face
from fact_jax.face.mask import head_mask
from fact_jax.metrics.identity import cosine
from fact_jax.utils.errors import UserError
from tests.infer.conftest import POINTS, read_text

pytestmark = pytest.mark.heavy


@pytest.fixture
def detector(monkeypatch, tmp_path):
    """Stands in for insightface: finds what the test puts into ``faces``, in any picture."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "detector.onnx").touch()
    faces: list[Face] = []
    monkeypatch.setattr(ranking, "detect_faces", lambda picture, pack: list(faces))
    return faces, tmp_path / "pack"


def face_at(left: float, top: float, side: float) -> Face:
    points = template_points(112) * (side / 112) + (left, top)
    return Face(points.astype(np.float32), np.float32([left, top, left + side, top + side]))


def test_similarity_is_the_cosine_of_the_largest_face(files, detector):
    faces, pack = detector
    chance = np.random.default_rng(0)
    found = read_face_models(files.adapter, files.encoder)
    size = found.encoder_config.img_size
    crops, picture = (chance.integers(0, 256, (n, size * 2, size * 2, 3), np.uint8) for n in (2, 1))
    crops, picture = crops[:, :size, :size], picture[0]
    judge = ranking.IdentityRanking(found, crops, pack)
    assert judge.similarity(picture) is None
    large = face_at(4, 2, 1.5 * size)
    faces[:] = [face_at(0, 0, size / 2), large]
    mask, _ = head_mask(picture.shape, large.points)
    crop = align_face(picture, large.points, size, mask)
    encoder = load_encoder(files.encoder)
    own, its = (
        np.array(encoder(jnp.asarray(x, jnp.float32) / 127.5 - 1)[1]) for x in (crops, crop[None])
    )
    own /= np.linalg.norm(own, axis=-1, keepdims=True)
    wanted = cosine(its[0], own.mean(0))
    assert judge.similarity(picture) == pytest.approx(wanted, abs=1e-5)
    faces[:] = [large, face_at(0, 0, size / 2)]
    assert judge.similarity(picture) == pytest.approx(wanted, abs=1e-5)


def test_a_missing_pack_is_said(files, tmp_path):
    found = read_face_models(files.adapter, files.encoder)
    size = found.encoder_config.img_size
    with pytest.raises(UserError, match="no model pack"):
        ranking.IdentityRanking(found, np.zeros((1, size, size, 3), np.uint8), tmp_path / "none")


def test_without_a_detector_the_face_is_where_it_lies_in_the_photo(
    files, monkeypatch, tmp_path, capsys
):
    """The photo's points are given, 64 x 72; the pictures are 32 x 32."""
    monkeypatch.setattr("fact_jax.face.landmarks._PACKS", tmp_path / "none")
    judged = []
    aligned = ranking.align_face

    def align(picture, points, size, mask):
        judged.append(points)
        return aligned(picture, points, size, mask)

    monkeypatch.setattr(ranking, "align_face", align)
    arguments = ["generate", "--base", files.base, "--adapter", files.adapter]
    arguments += ["--encoder", files.encoder, "--photo", files.photo, "--prompt", "a woman"]
    arguments += ["--points", files.photo.with_suffix(".points.json"), "--backend", "torch"]
    arguments += ["--sampler", "ddim", "--steps", 1, "--count", 3, "--best", 2]
    assert main([str(word) for word in [*arguments, "--out", tmp_path / "out"]]) == 0
    out, err = capsys.readouterr()
    assert f"no detector: likeness is judged where the face lies in {files.photo}" in err
    likeness = [json.loads(read_text(path)["fact_jax"])["similarity"] for path in out.split()]
    assert len(likeness) == 2
    assert likeness[0] >= likeness[1]
    assert len(judged) == 3
    np.testing.assert_allclose(judged[0], np.asarray(POINTS) * (32 / 64, 32 / 72), rtol=1e-6)


def test_the_best_come_first_and_no_face_comes_last():
    assert ranking.best_first([0.1, None, 0.7, -0.2, 0.4]) == [2, 4, 0, 3, 1]


def test_generate_keeps_the_best(files, detector, monkeypatch, tmp_path, capsys):
    _, pack = detector
    likeness = iter([0.2, None, 0.9, 0.5])
    monkeypatch.setattr(ranking.IdentityRanking, "similarity", lambda self, picture: next(likeness))
    arguments = ["generate", "--base", files.base, "--adapter", files.adapter]
    arguments += ["--encoder", files.encoder, "--photo", files.photo, "--prompt", "a woman"]
    arguments += ["--sampler", "ddim", "--steps", 1, "--count", 4, "--best", 2, "--sheet"]
    arguments += ["--detector", pack, "--format", "jpg", "--out", tmp_path / "out"]
    assert main([str(word) for word in arguments]) == 0
    names = ["a-woman-seed2.jpg", "a-woman-seed3.jpg", "sheet.jpg"]
    assert [line.rsplit("/")[-1] for line in capsys.readouterr().out.split()] == names
    assert '"similarity": 0.9' in read_text(tmp_path / "out" / names[0])["fact_jax"]
    with Image.open(tmp_path / "out" / "sheet.jpg") as sheet:
        assert sheet.width == 2 * 32 + 3 * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--best", "3"], "--best must lie in 1..1"),
        (["--best", "1"], "--best compares with photos"),
    ],
)
def test_what_cannot_be_ranked(options, message, files, capsys):
    assert main(["generate", "--base", str(files.base), "--prompt", "a woman", *options]) == 2
    assert message in capsys.readouterr().err
