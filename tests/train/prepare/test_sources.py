"""Every kind of source gives the same records: folders, tables, Parquet, tar shards."""

import csv
import io
import json
import os
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fact_train.cli.main import main
from fact_train.data.records import Records
from fact_train.prepare.build import build
from fact_train.prepare.settings import BuildSettings
from fact_train.prepare.sources import list_chunks, tables
from tests.train.prepare.conftest import POINTS, noise, rejected

NAMES = ("a", "b", "c")


def photo(seed) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def rows():
    """What a table says of three photos of two people."""
    for seed, name in enumerate(NAMES):
        yield {
            "file_name": f"images/{name}.png",
            "who": "anna" if seed < 2 else "bo",
            "text": f"caption {name}",
            "points": POINTS.tolist(),
            "license": "cc0-1.0",
            "url": f"https://example.org/{name}",
            "consent": "signed",
        }


def write_images(folder):
    (folder / "images").mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        (folder / "images" / f"{name}.png").write_bytes(photo(seed))


def jsonl(folder):
    write_images(folder)
    lines = [json.dumps(row) for row in rows()]
    (folder / "list.jsonl").write_text(
        "\n".join([*lines, "{no json", "[]", '{"text": "no image"}'])
    )
    return folder / "list.jsonl", ["list.jsonl:3", "list.jsonl:4", "list.jsonl:5"]


def image_folder(folder):
    write_images(folder)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows()))
    return folder, []


def table_csv(folder):
    write_images(folder)
    with open(folder / "list.csv", "w", newline="") as opened:
        writer = csv.DictWriter(opened, list(next(rows())))
        writer.writeheader()
        writer.writerows(row | {"points": json.dumps(row["points"])} for row in rows())
    return folder / "list.csv", []


def ip_adapter(folder):
    """``image_file`` and ``text``; the points beside the images, and a name that leads outside."""
    write_images(folder)
    lines = []
    for row in rows():
        path = row.pop("file_name")
        (folder / path).with_suffix(".points.json").write_text(
            json.dumps({"points": row.pop("points")})
        )
        lines.append({"image_file": path, **row})
    lines.append({"image_file": "../../etc/passwd", "text": "outside"})
    lines.append({"image_file": "images/gone.png", "text": "not there"})
    (folder / "data.json").write_text(json.dumps(lines))
    return folder / "data.json", ["data.json:3", "images/gone.png"]


def parquet(folder):
    arrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    table = [
        {"image": {"bytes": photo(seed), "path": f"{seed}.png"}}
        | {key: value for key, value in row.items() if key != "file_name"}
        for seed, row in enumerate(rows())
    ]
    table.append({**table[0], "image": {"bytes": None, "path": "x"}})
    pq.write_table(arrow.Table.from_pylist(table), folder / "0.parquet", row_group_size=2)
    (folder / "1.parquet").write_bytes(b"PAR1 no parquet")
    return folder, ["0.parquet:3", "1.parquet"]


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def tars(folder):
    """As img2dataset writes them; one is cut off in its third sample, one holds no photo."""
    folder.mkdir()
    for shard, seeds in enumerate(((0, 1), (2, 2))):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number, seed in enumerate(seeds):
                row = list(rows())[seed]
                key = f"{shard:05d}{number:04d}"
                add(archive, f"{key}.png", photo(seed))
                add(archive, f"{key}.json", json.dumps(row).encode())
                add(archive, f"{key}.txt", row["text"].encode())
            if shard == 0:
                add(archive, "lonely.txt", b"no photo")
    whole = (folder / "00001.tar").read_bytes()
    second = whole.rindex(b"000010001.png") + 512 + 1000
    (folder / "00001.tar").write_bytes(whole[:second])
    (folder / "00000.parquet").touch()  # beside the shards lie tables, which are not read
    return folder, ["00000.tar/lonely", "00001.tar"]


@pytest.mark.parametrize("kind", [jsonl, image_folder, table_csv, ip_adapter, parquet, tars])
def test_every_source_gives_the_same_records(tmp_path, kind):
    source, bad = kind(tmp_path / "source")
    columns = {"identity": "who"}
    settings = BuildSettings(source=str(source), size=64, crop=48, columns=columns, chunk=2)
    summary = build(settings, str(tmp_path / "out")).summary
    assert summary["records"] == 3
    assert summary["in"] == 3 + len(bad)
    assert sorted(rejected(tmp_path / "out")) == sorted(bad)
    records = Records(tmp_path / "out")
    np.testing.assert_array_equal(records.identities, [0, 0, 1])
    assert [records[i]["caption"].decode() for i in range(3)] == [f"caption {n}" for n in NAMES]
    assert [records[i]["identity"].decode() for i in range(3)] == ["anna", "anna", "bo"]
    # 80 px become 64, so the middle of the face is where the square puts it, in every source.
    first = records[0]["points"]
    np.testing.assert_allclose(first[1] - first[0], (POINTS[1] - POINTS[0]) * 0.8, atol=1e-4)
    assert summary["licences"] == {"cc0-1.0": 3}
    assert summary["sources"] == {"example.org": 3}
    assert summary["consent"] == {"signed": 3}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc0-1.0\n")


def test_a_tables_photo_that_changes_is_read_again(tmp_path):
    """An unfinished build goes on with the photos as they are now: image, side file and mask."""
    source, _ = image_folder(tmp_path / "source")
    Image.fromarray(np.full((80, 120), 255, np.uint8)).save(source / "m.png")
    lines = [json.dumps(row | {"mask": "m.png"}) for row in rows()]
    (source / "metadata.jsonl").write_text("\n".join(lines))
    settings = BuildSettings(source=str(source), size=64, crop=48, chunk=1)

    def listed():
        return [json.dumps(chunk) for chunk in list_chunks(settings, Counter())]

    def changed():
        before = listed()
        yield
        yield [i for i, (old, new) in enumerate(zip(before, listed(), strict=True)) if old != new]

    changes = {
        "images/b.png": (photo(7), [1]),  # another picture under the same name
        "images/c.quality.txt": (b"0.5", [2]),  # a side file that was not there
        "m.png": (photo(8), [0, 1, 2]),
        "unnamed.png": (photo(9), []),
    }
    for name, (content, wanted) in changes.items():
        seen = changed()
        next(seen)
        (source / name).write_bytes(content)
        assert next(seen) == wanted
    seen = changed()
    next(seen)
    os.utime(source / "metadata.jsonl", (1, 1))  # the same rows
    assert next(seen) == []
    (source / "images" / "a.png").unlink()
    assert json.loads(listed()[0])["rows"][0]["about"][0] is None


def test_a_flat_folder_has_no_people(tmp_path):
    source = tmp_path / "source"
    write_images(source)
    for name in NAMES:
        points = source / "images" / f"{name}.points.json"
        points.write_text(json.dumps({"points": POINTS.tolist()}))
    summary = build(
        BuildSettings(source=str(source / "images"), size=64, crop=48), str(tmp_path / "out")
    ).summary
    assert (summary["records"], summary["people"]) == (3, 3)
    flat = BuildSettings(source=str(source), size=64, crop=48, format="flat")
    assert build(flat, str(tmp_path / "other")).summary["people"] == 3
    people = BuildSettings(source=str(source), size=64, crop=48)
    assert build(people, str(tmp_path / "people")).summary["people"] == 1


def test_object_stores(tmp_path):
    """Source and output under URLs of fsspec, here in memory."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for seed, name in enumerate(NAMES):
        memory.pipe_file(f"/photos/anna/{name}.png", photo(seed))
        points = json.dumps({"points": POINTS.tolist()}).encode()
        memory.pipe_file(f"/photos/anna/{name}.points.json", points)
    settings = BuildSettings(source="memory://photos", size=64, crop=48)
    summary = build(settings, "memory://made").summary
    assert (summary["in"], summary["records"], summary["people"]) == (3, 3, 1)
    assert not build(settings, "memory://made").fresh
    memory.get("/made", str(tmp_path / "made"), recursive=True)
    assert len(Records(tmp_path / "made")) == 3


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("list.json", "{", "is not JSON"),
        ("list.json", "{}", "is not a list of objects"),
        ("list.jsonl", "", "holds no photo"),
    ],
)
def test_tables_that_are_none(tmp_path, capsys, name, content, line):
    (tmp_path / name).write_text(content)
    assert main(["data", "build", str(tmp_path / name), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert line in said


def test_a_table_of_this_folder(tmp_path, monkeypatch):
    """A name without a folder; numbers too large for a float; files outside the folder."""
    write_images(tmp_path / "here")
    (tmp_path / "outside.png").write_bytes(photo(5))
    good, large, mask, many, dots = (dict(row) for row in [*rows(), *rows()][:5])
    large["points"] = [[10**400, 1]] * 5
    many["points"] = [10**400] * 10
    mask["mask"] = "../outside.png"
    dots["mask"] = str(tmp_path / "outside.png")
    lines = [json.dumps(row) for row in (good, large, mask, many, dots)]
    lines.append(json.dumps(good | {"quality": 10**400, "file_name": "images/b.png"}))
    (tmp_path / "here" / "list.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path / "here")
    settings = BuildSettings(source="list.jsonl", size=64, crop=48)
    summary = build(settings, str(tmp_path / "out")).summary
    assert (summary["in"], summary["records"]) == (6, 1)
    assert summary["reasons"] == {"points": 2, "row": 2, "quality": 1}


def test_a_compressed_tar_is_none(tmp_path):
    """Its samples have no place in the file."""
    tars(tmp_path / "source")
    with tarfile.open(tmp_path / "source" / "00002.tar", "w:gz") as archive:
        add(archive, "0.txt", b"small, so that it would lie within the compressed file")
        add(archive, "1.png", photo(7))
    settings = BuildSettings(source=str(tmp_path / "source"), size=64, crop=48)
    build(settings, str(tmp_path / "out"))
    assert rejected(tmp_path / "out")["00002.tar"][0] == "damaged shard"
    assert not any(name.startswith("00002.tar/") for name in rejected(tmp_path / "out"))


def built(source, out, *more):
    return main(["data", "build", str(source), str(out), "--size", "16", "--crop", "16", *more])


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (jsonl, "--column identity=wo: list.jsonl has no such column, only"),
        (table_csv, "--column identity=wo: list.csv has no such column, only"),
        (parquet, "has no such column, only"),
        (image_folder, "--column identity=wo: metadata.jsonl has no such column, only"),
    ],
)
def test_a_column_that_is_not_there_is_told_of(tmp_path, capsys, make, line):
    source, _ = make(tmp_path / "in")
    assert built(source, tmp_path / "out", "--column", "identity=wo") == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


def test_columns_are_of_tables(tmp_path, capsys):
    write_images(tmp_path / "in")
    assert built(tmp_path / "in", tmp_path / "out", "--column", "identity=who") == 2
    assert "--column and --root are of tables" in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["old.tar", "old.parquet"])
def test_shards_beside_folders_are_no_guess(tmp_path, capsys, shard):
    write_images(tmp_path / "in")
    (tmp_path / "in" / shard).write_bytes(b"")
    assert built(tmp_path / "in", tmp_path / "out") == 2
    assert "beside folders or photos: say by --format" in capsys.readouterr().err
    ignored = Counter()
    list(list_chunks(BuildSettings(source=str(tmp_path / "in"), format="people"), ignored))
    assert ignored[shard[3:]] == 1


def test_what_lies_beside_shards_is_counted(tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = len(photo(0))
        archive.addfile(info, io.BytesIO(photo(0)))
    (tmp_path / "in" / "0_stats.json").write_text("{}")
    ignored = Counter()
    assert len(list(list_chunks(BuildSettings(source=str(tmp_path / "in")), ignored))) == 1
    assert ignored == {".json": 1}


def test_nan_is_nobodys_name(tmp_path):
    write_images(tmp_path / "in")
    lines = [json.dumps(row | {"who": float("nan")}) for row in rows()]
    (tmp_path / "in" / "list.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    assert built(tmp_path / "in" / "list.jsonl", out, "--column", "identity=who") == 0
    records = Records(out)
    assert {records[i]["identity"] for i in range(3)} == {
        f"only images/{name}.png".encode() for name in NAMES
    }


def test_a_row_after_one_that_is_too_long_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_MAX_CELL", 100_000)
    source, _ = table_csv(tmp_path / "in")
    head, first, *rest = source.read_text().splitlines()
    source.write_text("\n".join([head, first, f"images/a.png,{'x' * 200_000}", *rest]))
    assert built(source, tmp_path / "out") == 0
    ((name, (reason, detail)),) = rejected(tmp_path / "out").items()
    assert (name, reason) == ("list.csv:1", "row")
    assert "field larger than field limit" in detail
    assert len(Records(tmp_path / "out")) == 3


def test_a_link_to_nothing_is_told_with_its_person(tmp_path):
    write_images(tmp_path / "in")
    for name in NAMES:
        (tmp_path / "in" / "images" / f"{name}.json").write_text(
            json.dumps({"points": POINTS.tolist()})
        )
    (tmp_path / "in" / "images" / "gone.png").symlink_to("/nonexistent")
    assert built(tmp_path / "in", tmp_path / "out") == 0
    (line,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert (line["reason"], line["identity"]) == ("no file", "images")


def test_an_address_that_is_none_stops_nothing(tmp_path):
    write_images(tmp_path / "in")
    lines = [json.dumps(row | {"url": "http://[bad/x.jpg"}) for row in rows()]
    (tmp_path / "in" / "list.jsonl").write_text("\n".join(lines))
    assert built(tmp_path / "in" / "list.jsonl", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["sources"] == {"http://[bad/x.jpg": 3}


def test_all_is_no_name_of_a_split(tmp_path, capsys):
    assert built(tmp_path, tmp_path / "out", "--split", "all=0.5") == 2
    assert "give a name but train and all" in capsys.readouterr().err


def test_links_and_second_photos_in_a_tar_are_told_of(tmp_path):
    (tmp_path / "in").mkdir()
    points = json.dumps({"points": POINTS.tolist()}).encode()
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as archive:

        def add(name, content):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        for number in range(2):
            add(f"{number}.png", photo(number))
            add(f"{number}.json", points)
        add("1.jpg", photo(2))
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.png")
            info.type, info.linkname = kind, "0.png"
            archive.addfile(info)
    assert built(tmp_path / "in", tmp_path / "out") == 0
    assert {name: why for name, (why, _) in rejected(tmp_path / "out").items()} == {
        "0.tar/1": "row",
        "0.tar/link1.png": "no file",
        "0.tar/link2.png": "no file",
    }
