"""What a damaged, joined or mistyped table or tar holds is told of, and joins nobody."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from fact_train.cli.main import main
from fact_train.data.records import Records
from tests.train.prepare.conftest import POINTS, noise, rejected, write_photo

SIZES = ["--size", "64", "--crop", "48"]


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(noise(seed)).save(buffer, "png")
    return buffer.getvalue()


def tar(path, *samples):
    """Samples (key, seed, what its JSON holds beside the points, or its text)."""
    with tarfile.open(path, "w") as archive:
        for key, seed, more in samples:
            text = more
            if isinstance(more, dict):
                text = json.dumps({"points": POINTS.tolist(), **more})
            for ending, content in (("png", png(seed)), ("json", text.encode())):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def build(source, out, *more):
    return main(["data", "build", str(source), str(out), *SIZES, *more])


def records(out):
    read = Records(out)
    return [read[i] for i in range(len(read))]


def test_what_follows_a_damaged_header_is_told_of(tmp_path, capsys):
    path = tar(tmp_path / "a.tar", *((str(i), i, {}) for i in range(4)))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        header = archive.getmember("2.png").offset
    content[header] ^= 0xFF
    path.write_bytes(content)
    assert build(path, tmp_path / "out") == 0
    assert "3 photos in, 2 records of 2 people, 1 rejected" in capsys.readouterr().out
    reason, line = rejected(tmp_path / "out")["a.tar"]
    assert reason == "damaged shard"
    assert f"at byte {header:,} there is no header" in line


def test_joined_tars_are_told_of(tmp_path):
    one, other = (tar(tmp_path / f"{i}", (str(i), i, {})) for i in range(2))
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + other.read_bytes())
    assert build(both, tmp_path / "out") == 0
    assert rejected(tmp_path / "out")["both.tar"][0] == "damaged shard"


def test_samples_that_are_not_what_they_should_be(tmp_path):
    """Names that lead out, broken JSON; two of one name are two people."""
    path = tar(
        tmp_path / "a.tar",
        ("../x", 1, {}),
        ("broken", 2, '{"identity": "anna",}'),
        ("a", 3, {}),
        ("b", 4, {"identity": ["anna"]}),
        ("c", 5, {"identity": 7}),
        ("a", 6, {}),
    )
    assert build(path, tmp_path / "out") == 0
    assert {name: why for name, (why, _) in rejected(tmp_path / "out").items()} == dict.fromkeys(
        ("a.tar/../x", "a.tar/broken", "a.tar/b"), "row"
    )
    people = [row["identity"].decode() for row in records(tmp_path / "out")]
    assert people == ["only a.tar/a", "7", "only only a.tar/a"]


@pytest.fixture
def table(tmp_path):
    for number in range(4):
        write_photo(tmp_path / f"{number}.png", seed=number)

    def write(text):
        (tmp_path / "t.csv").write_bytes(text)
        return tmp_path / "t.csv"

    return write


def test_rows_that_are_not_utf8_are_told_of(table, tmp_path):
    source = table("image,identity\n0.png,Ä\n1.png,Ö\n2.png,\n3.png, \n".encode("latin-1"))
    assert build(source, tmp_path / "out") == 0
    found = rejected(tmp_path / "out")
    assert found == {f"t.csv:{i}": ("row", f"t.csv:{i}: it is not UTF-8 text") for i in range(2)}
    # A label of blanks is none.
    people = {row["identity"].decode() for row in records(tmp_path / "out")}
    assert people == {"only 2.png", "only 3.png"}


def test_an_open_quote_is_told_of(table, tmp_path):
    source = table(b'image,text\n0.png,plain\n1.png,"tall\n2.png,a "man"\n3.png,plain\n')
    assert build(source, tmp_path / "out") == 0
    (name,) = rejected(tmp_path / "out")
    assert name == "t.csv:1"
    assert rejected(tmp_path / "out")[name][0] == "row"


def test_a_root_that_is_no_folder_is_one_line(table, tmp_path, capsys):
    source = table(b"image\n0.png\n")
    assert build(source, tmp_path / "out", "--root", str(tmp_path / "no")) == 2
    assert capsys.readouterr().err == f"error: --root {tmp_path / 'no'} is no folder\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"image,identity,image\n0.png,a,1.png\n", "t.csv has several columns named image"),
        (b'image,"identity\n0.png,a\n', "t.csv: its first line is not CSV"),
        (b"", "t.csv holds no photo"),
    ],
)
def test_first_lines_that_say_no_columns_are_one_line(table, tmp_path, capsys, text, line):
    assert build(table(text), tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_absolute_names_in_the_folder_of_the_images_are_read(table, tmp_path):
    text = f"image\n{tmp_path}/0.png\n{tmp_path}/../1.png\n{tmp_path}x/2.png\n"
    assert build(table(text.encode()), tmp_path / "out") == 0
    assert [row["name"].decode() for row in records(tmp_path / "out")] == ["0.png"]
    told = rejected(tmp_path / "out")
    assert all("outside the folder of the images" in told[f"t.csv:{i}"][1] for i in (1, 2))


def test_parquet_without_rows_holds_no_photo(tmp_path, capsys):
    empty = pa.table({"image": pa.array([], pa.binary())})
    pyarrow.parquet.write_table(empty, tmp_path / "t.parquet")
    assert build(tmp_path / "t.parquet", tmp_path / "out") == 2
    assert "t.parquet holds no photo" in capsys.readouterr().err


def test_captions_and_people_are_text(tmp_path):
    """A list of captions is no caption; bytes that are a name are that name."""
    rows = {
        "image": [png(i) for i in range(3)],
        "points": [POINTS.reshape(-1).tolist()] * 3,
        "caption": pa.array([["a", "b"], ["c"], None]),
        "identity": pa.array([b"anna", b"bo", "cy\u00e9".encode()]),
    }
    pyarrow.parquet.write_table(pa.table(rows), tmp_path / "t.parquet")
    assert build(tmp_path / "t.parquet", tmp_path / "out") == 0
    found = rejected(tmp_path / "out")
    assert found == {
        f"t.parquet:{i}": ("caption", f"t.parquet:{i}: its caption is no text") for i in range(2)
    }
    assert [row["identity"].decode() for row in records(tmp_path / "out")] == ["cy\u00e9"]


def test_links_to_folders_are_counted(tmp_path, capsys):
    write_photo(tmp_path / "in" / "anna" / "1.png", seed=1)
    write_photo(tmp_path / "bo" / "1.png", seed=2)
    (tmp_path / "in" / "bo").symlink_to(tmp_path / "bo")
    assert build(tmp_path / "in", tmp_path / "out") == 0
    assert "ignored files: 1 link to a folder, or folder too deep" in capsys.readouterr().out


def test_who_was_removed_stays_out_of_a_set_that_is_replaced(tmp_path, capsys):
    for number in range(4):
        write_photo(tmp_path / "in" / f"p{number // 2}" / f"{number}.png", seed=number)
    write_photo(tmp_path / "in" / "p0" / "too.png", seed=2)
    out = tmp_path / "out"
    assert build(tmp_path / "in", out) == 0
    assert "p1" in (out / "suspects.jsonl").read_text()
    assert main(["data", "remove", str(out), "--person", "p1"]) == 0
    log = (out / "log.jsonl").read_bytes()
    assert build(tmp_path / "in", out, "--force") == 0
    assert "rejected: 2 removed" in capsys.readouterr().out
    assert {row["identity"] for row in records(out)} == {b"p0"}
    assert rejected(out)["p1/2.png"] == (
        "removed",
        "p1/2.png: p1 was removed from this set, log.jsonl says",
    )
    assert "thumbnail" not in (out / "rejected.jsonl").read_text()
    assert (out / "suspects.jsonl").read_text() == ""  # p0's photo that is p1's, too
    assert (out / "log.jsonl").read_bytes() == log
    assert main(["data", "verify", str(out)]) == 0


def test_numbers_of_the_made_up_are_not_remembered(tmp_path):
    """Another build may give them to others."""
    for number in range(4):
        path = tmp_path / "in" / f"{number}.png"
        write_photo(path, seed=number)
        np.save(path.with_suffix(".embedding.npy"), np.eye(2)[number // 2])
    out = tmp_path / "out"
    assert build(tmp_path / "in", out) == 0
    assert main(["data", "remove", str(out), "--person", "person-0000001"]) == 0
    assert build(tmp_path / "in", out, "--force") == 0
    assert len(Records(out)) == 4
