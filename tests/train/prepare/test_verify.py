"""What is wrong with a set is found, whichever of its files says it."""

import io
import json
import shutil

import numpy as np
import pytest

from fact_jax.utils.errors import UserError
from fact_train.cli.main import main
from fact_train.data.records import encode_png
from fact_train.prepare.product.verify import _check_pictures, verify
from tests.train.prepare.conftest import noise, write_photo


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verified")
    for number in range(8):
        write_photo(folder / "in" / f"p{number // 2}" / f"{number % 2}.png", seed=number)
    write_photo(folder / "in" / "p3" / "other.png", seed=0)  # a suspect: p0's
    command = ["data", "build", str(folder / "in"), str(folder / "out"), "--size", "16"]
    assert main([*command, "--crop", "16", "--shard-mb", "0.01"]) == 0
    return folder / "out"


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


def edited(**changes):
    return lambda content: json.dumps(json.loads(content) | changes).encode()


def saved(change):
    def edit(content):
        buffer = io.BytesIO()
        np.save(buffer, change(np.load(io.BytesIO(content))))
        return buffer.getvalue()

    return edit


def rotated(content):
    """The shards' lengths, each the next one's."""
    found = json.loads(content)
    lengths = found["splits"][0]["shardLengths"]
    assert len(set(lengths)) > 1
    found["splits"][0]["shardLengths"] = lengths[1:] + lengths[:1]
    return json.dumps(found).encode()


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("identities.npy", saved(lambda array: np.append(array, 0))),
        ("identities.npy", saved(lambda array: array[:, None])),
        ("dataset_info.json", rotated),
        ("features.json", lambda content: content.replace(b'"16"', b'"32"')),
        ("sizes.json", lambda _: b"{}"),
        ("summary.json", edited(splits=[])),
        ("summary.json", edited(models=None)),
        ("summary.json", edited(settings=None)),
        ("summary.json", edited(size=32)),
        ("log.jsonl", lambda _: b"{"),
        ("suspects.jsonl", lambda content: content.replace(b'"people"', b'"persons"')),
    ],
)
def test_each_file_is_looked_into(out, name, edit):
    verify(out)
    path = next(out.rglob(name), out / name)
    before = path.read_bytes() if path.exists() else b""
    path.write_bytes(edit(before))
    assert path.read_bytes() != before
    with pytest.raises(UserError) as caught:
        verify(out)
    assert "\n" not in str(caught.value)


def test_a_person_in_two_splits_is_found(tmp_path):
    for number in range(12):
        write_photo(tmp_path / "in" / f"p{number // 2}" / f"{number % 2}.png", seed=number)
    out = tmp_path / "out"
    command = ["data", "build", str(tmp_path / "in"), str(out), "--size", "16", "--crop", "16"]
    assert main([*command, "--split", "validation=0.5"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert {*summary["splits"]} == {"train", "validation"}
    verify(out)
    # The files of one split take the place of the other's.
    about, inner = summary["splits"], out / "face_records" / "1.0.0"
    for path in [*inner.iterdir(), *(out / "about").iterdir()]:
        if "validation" in path.name:
            path.unlink()
    for path in [*inner.glob("*train*"), *(out / "about").glob("train*")]:
        shutil.copy(path, path.with_name(path.name.replace("train", "validation")))
    shutil.copy(inner / "identities.npy", inner / "identities-validation.npy")
    info = json.loads((inner / "dataset_info.json").read_text())
    train = next(one for one in info["splits"] if one["name"] == "train")
    info["splits"] = [train, train | {"name": "validation"}]
    (inner / "dataset_info.json").write_text(json.dumps(info))
    sizes = {path.name: path.stat().st_size for path in inner.glob("*.array_record*")}
    (inner / "sizes.json").write_text(json.dumps(sizes))
    summary["splits"] = {"train": about["train"], "validation": about["train"]}
    (out / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="is in several splits"):
        verify(out)


@pytest.mark.parametrize(
    ("part", "picture"),
    [
        ("photo", np.zeros((8, 8), np.uint8)),
        ("face_mask", np.zeros((8, 8, 3), np.uint8)),
        ("crop", np.zeros((8, 8), np.uint8)),
        ("head_mask", np.zeros((8, 7), np.uint8)),
    ],
)
def test_pictures_are_of_the_kind_that_training_reads(part, picture):
    colour, grey = encode_png(noise(0, (8, 8, 3))), encode_png(np.zeros((8, 8), np.uint8))
    row = {"photo": colour, "crop": colour, "face_mask": grey, "head_mask": grey}
    row["points"] = np.zeros((5, 2), np.float32)
    _check_pictures(row, (8, 8), 8)
    with pytest.raises(UserError, match=f"its {part} is"):
        _check_pictures(row | {part: encode_png(picture)}, (8, 8), 8)
    cut = encode_png(noise(0, (8, 8, 3)))[:40]
    with pytest.raises(UserError, match=f"its {part} is damaged"):
        _check_pictures(row | {part: cut}, (8, 8), 8)
