"""Records: what is written comes back, whole or not at all, without TensorFlow."""

import dataclasses
import io
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fact_jax.utils.errors import UserError
from fact_train.cli.main import main
from fact_train.data.portraits import align_portraits, draw_portraits
from fact_train.data.record_writer import write_records
from fact_train.data.records import (
    Example,
    Records,
    data_libraries,
    decode,
    encode_png,
    read_row,
)
from fact_train.tasks.validation import read_validation
from tests.train.data.conftest import PEOPLE, PHOTOS

pytestmark = pytest.mark.heavy

SIZE, CROP = 20, 12


def make_example(number: int, identity: str, photo_format: str = "PNG") -> Example:
    rng = np.random.default_rng(number)
    photo = io.BytesIO()
    pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo, photo_format)
    return Example(
        identity=identity,
        name=f"{identity}/{number}.png",
        photo=photo.getvalue(),
        caption=f"number {number}, ünïcode",
        face_mask=encode_png(rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)),
        head_mask=encode_png(rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)),
        crop=encode_png(rng.integers(0, 256, (CROP, CROP, 3), dtype=np.uint8)),
        points=rng.uniform(0, SIZE, (5, 2)).astype(np.float32),
    )


def test_every_feature_comes_back_through_tfds_alone(tmp_path):
    people = ["anna", "bo", "anna", "bo", "anna"]
    examples = [make_example(i, who, "JPEG" if i == 3 else "PNG") for i, who in enumerate(people)]
    assert write_records(examples, tmp_path / "out", size=SIZE, crop_size=CROP) == (5, 2)
    tfds = data_libraries().tfds
    source = tfds.data_source("face_records", split="train", data_dir=tmp_path / "out")
    assert len(source) == 5
    for example, row in zip(examples, source, strict=True):
        assert row.keys() == {field.name for field in dataclasses.fields(Example)}
        for name in ("identity", "name", "caption"):
            assert row[name].decode() == getattr(example, name)
        for name in ("photo", "face_mask", "head_mask", "crop"):
            wanted = decode(getattr(example, name))
            np.testing.assert_array_equal(row[name].reshape(wanted.shape), wanted)
        np.testing.assert_array_equal(row["points"], example.points)
    np.testing.assert_array_equal(Records(tmp_path / "out").identities, [0, 1, 0, 1, 0])
    assert "tensorflow" not in sys.modules
    assert "arXiv 2410.12312" in source.dataset_info.description
    # Nothing but the data set is left behind.
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert held == {"face_records", ".fact-jax.json"}


def test_portraits_come_back_as_the_tasks_draw_them(records):
    batch = draw_portraits("adapter", PEOPLE, PHOTOS, size=16)
    crops = align_portraits(batch, 16)
    stored = Records(records)
    assert (len(stored), stored.size, stored.crop_size) == (PEOPLE * PHOTOS, 16, 16)
    for i in (0, PHOTOS, PEOPLE * PHOTOS - 1):
        row = stored[i]
        np.testing.assert_array_equal(decode(row["photo"]), batch.images[i])
        np.testing.assert_array_equal(decode(row["crop"]), crops[i])
        np.testing.assert_array_equal(row["points"], batch.portrait.points[i])
        for name in ("head_mask", "face_mask"):
            mask = getattr(batch.portrait, name)[i]
            assert abs(decode(row[name]) / 255 - mask).max() <= 0.5 / 255 + 1e-6
        assert row["caption"].decode() == batch.captions[i]
    np.testing.assert_array_equal(stored.identities, np.arange(PEOPLE * PHOTOS) // PHOTOS)


def test_written_whole_or_not_at_all(tmp_path):
    def broken():
        yield make_example(0, "anna")
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        write_records(broken(), tmp_path / "out", size=SIZE, crop_size=CROP)
    wrong = dataclasses.replace(make_example(1, "bo"), crop=make_example(1, "bo").photo)
    with pytest.raises(UserError, match=r"bo/1.png: its crop is 20 x 20, these .* hold 12 x 12"):
        write_records([wrong], tmp_path / "out", size=SIZE, crop_size=CROP)
    with pytest.raises(UserError, match="no usable photo"):
        write_records([], tmp_path / "out", size=SIZE, crop_size=CROP)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_by_force(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    sizes = {"size": SIZE, "crop_size": CROP}
    with pytest.raises(UserError, match="exists already"):
        write_records([make_example(0, "anna")], tmp_path / "out", **sizes)
    with pytest.raises(UserError, match="it holds mine"):
        write_records([make_example(0, "anna")], tmp_path / "out", force=True, **sizes)
    (tmp_path / "out" / "mine").unlink()
    for name in ("anna", "bo"):
        write_records([make_example(0, name)], tmp_path / "out", force=True, **sizes)
    (found,) = Records(tmp_path / "out").identities
    assert found == 0


def test_what_is_wrong_with_a_folder_is_said(records, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        Records(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no whole data set"):
        Records(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(records, copy)
    inner = copy / "face_records" / "1.0.0"
    np.save(inner / "identities.npy", np.zeros(3, np.int32))
    with pytest.raises(UserError, match="3 identities for 15 records"):
        Records(copy)
    (inner / "identities.npy").unlink()
    with pytest.raises(UserError, match=r"identities.npy cannot be read"):
        Records(copy)
    shutil.copy(records / "face_records" / "1.0.0" / "identities.npy", inner)
    shard = next(inner.glob("*array_record*"))
    # Cut off between two of its blocks, array_record itself would read it and be wrong.
    shard.write_bytes(shard.read_bytes()[:65536])
    with pytest.raises(UserError, match=r"array_record.* has 65,536 bytes, 131,072 were written"):
        Records(copy)
    shard.unlink()
    with pytest.raises(UserError, match=r"array_record.* is missing"):
        Records(copy)


def test_the_fingerprint_is_the_data(records, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(records, moved)
    assert Records(moved).fingerprint == Records(records).fingerprint
    path = moved / "face_records" / "1.0.0" / "identities.npy"
    np.save(path, np.load(path)[::-1])
    assert Records(moved).fingerprint != Records(records).fingerprint


def test_a_damaged_record_is_not_watched(records, monkeypatch):
    """The second person's first photo cannot be decoded: the others are looked at."""
    config = SimpleNamespace(sample_size=8, downscale=2, img_size=16)
    model = SimpleNamespace(config=config)
    pipeline = SimpleNamespace(unet=model, vae=model)
    whole = read_validation(str(records), pipeline, model)
    assert len(whole.photos) == PEOPLE
    picture = Records.picture

    def torn(self, number, row, name):
        return picture(self, number, row | {name: b"torn"} if number == PHOTOS else row, name)

    monkeypatch.setattr(Records, "picture", torn)
    found = read_validation(str(records), pipeline, model)
    np.testing.assert_array_equal(found.photos, np.delete(whole.photos, 1, axis=0))
    monkeypatch.setattr(Records, "__getitem__", lambda self, n: read_row([], n, self.folder))
    with pytest.raises(UserError, match="readable photos of at least two people"):
        read_validation(str(records), pipeline, model)


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserError, match=r"pip install 'fact-jax\[data\]'"):
        data_libraries()


def test_too_many_made_up_people(tmp_path, capsys):
    command = ["records", "portraits", "--people", "9999999", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "the split adapter has 20000 people" in capsys.readouterr().err
