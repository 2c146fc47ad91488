"""What a damaged, joined or mistyped table or tar holds is told of, and joins nobody."""

import csv
import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from fact_train.cli.main import main
from fact_train.data.records import Records
from fact_train.prepare.sources import tables
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
    # The sample before the header may have had more files.
    assert "2 photos in, 1 records of 1 people, 1 rejected" in capsys.readouterr().out
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


def test_a_row_of_too_many_cells_joins_nobody(table, tmp_path):
    source = table(b"image,caption,identity\n0.png,a man,anna\n1.png,a man, tall,anna\n")
    assert build(source, tmp_path / "out") == 0
    assert rejected(tmp_path / "out") == {
        "t.csv:1": ("row", "t.csv:1: it has more cells than the first line")
    }


def test_what_follows_a_cell_without_end_is_not_read(table, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_MAX_CELL", 1000)
    long = "".join(f"line {i}, and\n" for i in range(200))
    source = table(f'image,caption\n0.png,a\n1.png,"{long}"\n2.png,b\n'.encode())
    assert build(source, tmp_path / "out") == 0
    ((name, (reason, line)),) = rejected(tmp_path / "out").items()
    assert (name, reason) == ("t.csv:1", "row")
    assert line.endswith("the rest is not read")


def test_a_column_of_empty_cells_is_there(table, tmp_path):
    source = table(b"image,q\n0.png,\n1.png,\n")
    assert build(source, tmp_path / "out", "--column", "quality=q") == 0


def test_urls_are_not_taken_for_names(table, tmp_path):
    source = table(b"image\nhttp://h/0.png\nfile:///0.png\n0.png\n")
    assert build(source, tmp_path / "out") == 0
    assert {reason for reason, _ in rejected(tmp_path / "out").values()} == {"row"}


def parquet(path, captions, images, identities, names=("image", "caption", "identity")):
    arrays = [pa.array(images, pa.binary()), captions, pa.array(identities, pa.binary())]
    pyarrow.parquet.write_table(pa.Table.from_arrays(arrays, list(names)), path)
    return path


def test_text_that_is_not_utf8_in_parquet_is_one_rows(tmp_path):
    text = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).view(pa.string())
    source = parquet(tmp_path / "t.parquet", text, [png(i) for i in range(3)], [b"a", b"b", b"c"])
    out = tmp_path / "out"
    assert build(source, out) == 2  # no points: what is asked is how each row was rejected
    reasons = {name: reason for name, (reason, _) in rejected(out).items()}
    assert reasons == {
        "t.parquet:0": "no points",
        "t.parquet:1": "row",
        "t.parquet:2": "no points",
    }


def test_names_of_people_in_parquet_are_text_where_a_row_is_rejected(tmp_path):
    text = pa.array(["a", "b"])
    source = parquet(tmp_path / "t.parquet", text, [png(0), None], [b"anna", b"anna"])
    assert build(source, tmp_path / "out") == 2
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert {json.loads(line)["identity"] for line in lines} == {"anna"}


def test_two_columns_of_one_name_in_parquet_are_one_line(tmp_path, capsys):
    names = ("image", "caption", "image")
    source = parquet(tmp_path / "t.parquet", pa.array(["a"]), [png(0)], [b"a"], names)
    assert build(source, tmp_path / "out") == 2
    assert "has several columns named image" in capsys.readouterr().err


@pytest.mark.parametrize("kept", ["within the JSON", "before it", "its header"])
def test_the_sample_in_which_a_tar_is_cut_off_is_no_record(tmp_path, kept):
    path = tar(tmp_path / "a.tar", *((str(i), i, {"identity": "anna"}) for i in range(3)))
    with tarfile.open(path) as archive:
        last = archive.getmember("2.json")
    end = {"within the JSON": last.offset_data + 9, "before it": last.offset}
    path.write_bytes(path.read_bytes()[: end.get(kept, last.offset + 99)])
    assert build(path, tmp_path / "out") == 0
    assert [row["identity"] for row in records(tmp_path / "out")] == [b"anna"] * 2
    assert rejected(tmp_path / "out")["a.tar"][0] == "damaged shard"


def test_links_and_sparse_files_in_a_tar_are_told_of(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:

        def add(name, content, kind=tarfile.REGTYPE, headers=()):
            member = tarfile.TarInfo(name)
            member.pax_headers = dict(headers)
            member.type, member.linkname, member.size = kind, "0.png", len(content)
            archive.addfile(member, io.BytesIO(content))

        points = json.dumps({"points": POINTS.tolist()}).encode()
        for key in ("0", "1", "2"):
            add(f"{key}.png", png(int(key)))
            add(f"{key}.json", points)
            if key == "1":
                add("1.mask.png", b"", tarfile.LNKTYPE)
        add("3.png", b"", tarfile.SYMTYPE)
        photo = png(4)  # sparse as GNU tar writes it: a list of its parts, then these
        sparse = {"major": "1", "minor": "0", "name": "4.png", "realsize": str(len(photo))}
        parts = f"1\n0\n{len(photo)}\n".encode().ljust(512, b"\0")
        about = {f"GNU.sparse.{key}": value for key, value in sparse.items()}
        add("sparse/4.png", parts + photo, headers=about)
        add("5.png", png(5))
        add("5.json", points)
    assert build(tmp_path / "a.tar", tmp_path / "out") == 0
    assert len(records(tmp_path / "out")) == 3
    told = rejected(tmp_path / "out")
    assert {name: reason for name, (reason, _) in told.items()} == {
        "a.tar/1": "no file",
        "a.tar/3.png": "no file",
        "a.tar/4.png": "no file",
    }


def test_a_size_that_no_file_has_is_a_damaged_tar(tmp_path, capsys):
    path = tar(tmp_path / "a.tar", *((str(i), i, {}) for i in range(2)))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        at = archive.getmember("1.png").offset
    content[at + 124 : at + 136] = b"\x80" + b"\x7f" * 11  # in base 256, as GNU tar writes
    content[at + 156 : at + 157] = b"L"  # a long name of that size
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    path.write_bytes(content)
    assert build(path, tmp_path / "out") in (0, 2)
    assert rejected(tmp_path / "out")["a.tar"][0] == "damaged shard"
    assert "Traceback" not in capsys.readouterr().err


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
    write_photo(tmp_path / "in" / "p1" / "blurred.png", seed=9)
    for photo in (tmp_path / "in").rglob("*.png"):
        photo.with_suffix(".quality.txt").write_text("0.9")
    (tmp_path / "in" / "p1" / "blurred.quality.txt").write_text("0.1")
    out, gate = tmp_path / "out", ("--gate", "quality=0.5")
    assert build(tmp_path / "in", out, *gate) == 0
    assert "p1" in (out / "suspects.jsonl").read_text()
    assert main(["data", "remove", str(out), "--person", "p1"]) == 0
    log = (out / "log.jsonl").read_bytes()
    assert build(tmp_path / "in", out, *gate, "--force") == 0
    assert "rejected: 3 removed" in capsys.readouterr().out
    assert {row["identity"] for row in records(out)} == {b"p0"}
    assert rejected(out)["p1/2.png"] == (
        "removed",
        "p1/2.png is of a person who was removed from this set, log.jsonl says when",
    )
    assert rejected(out)["p1/blurred.png"][0] == "removed"  # and would have been without this
    assert "thumbnail" not in (out / "rejected.jsonl").read_text()
    assert "3 photos were removed or left out" in (out / "README.md").read_text()
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


def test_spaces_after_commas_are_no_part_of_a_csv_file(tmp_path):
    for number in range(4):
        write_photo(tmp_path / f"{number}.png", seed=number)
    rows = [f"{number}.png, p{number // 2}" for number in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(["file_name, identity", *rows]))
    assert build(tmp_path / "t.csv", tmp_path / "out") == 0
    found = sorted(record["identity"] for record in records(tmp_path / "out"))
    assert found == [b"p0", b"p0", b"p1", b"p1"]


def test_spaces_that_other_programs_wrote_into_cells_stay_theirs(tmp_path):
    """``csv.writer`` does not quote a cell for its leading space."""
    for seed, name in enumerate((" a.png", "b.png", "c.png")):
        write_photo(tmp_path / name, seed=seed)
    rows = [("file_name", "identity", "text"), (" a.png", "anna", ' "open')]
    rows += [("b.png", "bo", ' "so" she said'), ("c.png", "bo", " Hello")]
    with open(tmp_path / "t.csv", "w", newline="") as opened:
        csv.writer(opened).writerows(rows)
    assert build(tmp_path / "t.csv", tmp_path / "out") == 0
    found = {record["caption"].decode() for record in records(tmp_path / "out")}
    assert found == {'"open', '"so" she said', "Hello"}  # outer spaces are no part of captions


def test_columns_that_have_a_role_are_not_asked_about(tmp_path):
    write_photo(tmp_path / "0.png", seed=0)
    row = {"image": "0.png", "Person": "https://a/0", "LICENSE": "?"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    assert build(tmp_path / "t.jsonl", tmp_path / "out", "--column", "source=Person") == 0


def test_one_row_in_another_spelling_is_asked_about(tmp_path, capsys):
    for number in range(2):
        write_photo(tmp_path / f"{number}.png", seed=number)
    rows = [{"image": "0.png", "identity": "p0"}, {"image": "1.png", "Identity": "p0"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert build(tmp_path / "t.jsonl", tmp_path / "out") == 2
    assert "t.jsonl:1: is the column 'Identity' the identity?" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["Identity", " identity", "PERSON"])
def test_a_column_in_another_spelling_is_asked_about(tmp_path, capsys, column):
    write_photo(tmp_path / "0.png", seed=0)
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": "0.png", column: "p0"}))
    assert build(tmp_path / "t.jsonl", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is the column {column!r} the identity?" in line
    command = ("--column", f"identity={column}")
    assert build(tmp_path / "t.jsonl", tmp_path / "out", *command) == 0
    assert [record["identity"] for record in records(tmp_path / "out")] == [b"p0"]


def test_a_file_whose_ending_is_not_utf8_is_ignored(tmp_path):
    write_photo(tmp_path / "in" / "p0" / "0.png", seed=0)
    with open(os.fsencode(tmp_path / "in" / "p0") + b"/x.\xff", "wb"):
        pass
    assert build(tmp_path / "in", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ignored"] == {".\\udcff": 1}


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gate_that_is_no_number_is_refused(tmp_path, capsys, value):
    write_photo(tmp_path / "in" / "0.png", seed=0)
    assert build(tmp_path / "in", tmp_path / "out", "--gate", f"quality={value}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "quality must be a finite number" in line
