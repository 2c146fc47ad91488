"""A built set later: verified, split, merged, without a person, and its page."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from fact_convert import load_encoder, load_pipeline
from fact_jax.utils.errors import UserError
from fact_train.cli.main import main
from fact_train.data.cached_dataset import ORIGIN, CachedDataset, CacheWriter
from fact_train.data.frozen_encoders import FrozenEncoders
from fact_train.data.pixel_dataset import open_records
from fact_train.data.records import Records
from fact_train.prepare.build import build
from fact_train.prepare.settings import BuildSettings
from tests.train.prepare.conftest import write_photo


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six people of three photos; a copy, a bad file, and one picture under two names."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(18):
        write_photo(folder / f"p{number // 3}" / f"{number % 3}.png", seed=number)
    write_photo(folder / "p0" / "copy.png", seed=1)
    write_photo(folder / "p5" / "other.png", seed=2)
    (folder / "p0" / "bad.png").write_bytes(b"none")
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    settings = BuildSettings(source=str(source), size=16, crop=16, shard_megabytes=0.02)
    summary = build(settings, str(out)).summary
    assert (summary["in"], summary["records"], summary["rejected"]) == (21, 19, 2)
    return out


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


def run(capsys, *arguments):
    status = main(["data", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out + said.err


def people(folder, split="train"):
    lines = []
    for path in sorted((folder / "about").glob(f"{split}-*")):
        lines += map(json.loads, path.read_text().splitlines())
    return [line["identity"] for line in lines]


def test_verify_reads_everything(out, capsys):
    assert run(capsys, "verify", out) == (0, f"{out}: whole; 19 train, 2 rejected\n")
    shard = sorted(out.rglob("*.array_record*"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    status, said = run(capsys, "verify", out)
    assert (status, said.count("\n")) == (2, 1)
    assert "damaged" in said
    status, said = run(capsys, "report", out)
    assert (status, said.count("\n")) == (2, 1)
    assert "damaged" in said
    shard.write_bytes(content[:-10])
    assert "bytes, " in run(capsys, "verify", out)[1]
    shard.unlink()
    assert "is missing" in run(capsys, "verify", out)[1]


def test_verify_finds_lost_lines_and_mixed_up_people(out, capsys):
    rejected = (out / "rejected.jsonl").read_text()
    (out / "rejected.jsonl").write_text(rejected + "{")
    status, said = run(capsys, "verify", out)
    assert (status, said.count("\n")) == (2, 1)
    assert "rejected.jsonl: line 3 is damaged" in said
    (out / "rejected.jsonl").write_text(rejected)
    identities = np.load(next(out.rglob("identities.npy")))
    np.save(next(out.rglob("identities.npy")), identities[::-1])
    assert "does not name" in run(capsys, "verify", out)[1]
    np.save(next(out.rglob("identities.npy")), identities)
    (out / "rejected.jsonl").write_text("")
    assert "21 photos in, but 19 records and 0 rejected" in run(capsys, "verify", out)[1]


def test_verify_finds_what_tensorflow_datasets_and_the_other_commands_stumble_over(out, capsys):
    def said(name, content):
        path = next(out.rglob(name))
        kept = path.read_bytes()
        path.write_bytes(content if isinstance(content, bytes) else content(kept))
        status, line = run(capsys, "verify", out)
        path.write_bytes(kept)
        assert (status, line.count("\n")) == (2, 1), line
        return line

    assert "cannot be opened" in said("dataset_info.json", b"")
    assert "cannot be opened" in said("features.json", b"")
    assert "cannot be read" in said("sizes.json", b"[]")
    assert "suspects.jsonl: line 1 is damaged" in said("suspects.jsonl", b"[]\n")
    assert "counts other suspects" in said("suspects.jsonl", b"")
    assert "counts other people" in said("summary.json", edited(people=7))
    assert "counts other reasons" in said("summary.json", edited(reasons={"no file": 2}))
    assert "counts other licences" in said("summary.json", edited(licences={}))
    assert run(capsys, "verify", out)[0] == 0


def edited(**changes):
    return lambda content: json.dumps(json.loads(content) | changes).encode()


def test_verify_finds_a_photo_that_is_lost_and_another_that_is_there_twice(
    source, tmp_path, capsys
):
    out = tmp_path / "out"
    settings = BuildSettings(source=str(source), size=16, crop=16, shard_megabytes=0.0001)
    build(settings, str(out))
    first, second = sorted(out.rglob("*.array_record-*"))[:2]
    second.write_bytes(first.read_bytes())
    sizes = next(out.rglob("sizes.json"))
    sizes.write_text(
        json.dumps(json.loads(sizes.read_text()) | {second.name: first.stat().st_size})
    )
    status, said = run(capsys, "verify", out)
    assert status == 2
    assert "it is p0/0.png, the line about it says p0/1.png" in said


def test_split_and_merge(out, tmp_path, capsys):
    """People, not photos, are set apart; the one picture under two names raises the alarm."""
    status, said = run(capsys, "split", out, "--to", tmp_path / "s", "--split", "test=0.5")
    train, test = people(tmp_path / "s"), people(tmp_path / "s", "test")
    assert len(train) + len(test) == 19
    assert not set(train) & set(test)
    alarm = ("p0" in train) != ("p5" in train)
    assert status == (1 if alarm else 0)
    assert ("one face may be in two splits" in said) == alarm
    assert run(capsys, "verify", tmp_path / "s")[0] == 0
    records = Records(tmp_path / "s")
    assert len(records) == len(train)
    # Another set of other people, and back to one.
    other = tmp_path / "photos"
    for number, seed in enumerate((100, 3)):  # the second is p1's, too
        write_photo(other / "q" / f"{number}.png", seed=seed)
    build(BuildSettings(source=str(other), size=16, crop=16), str(tmp_path / "q"))
    status, said = run(capsys, "merge", out, tmp_path / "q", "--to", tmp_path / "m")
    assert status == 0
    assert "warning: 1 photos are in several of the sets (by SHA-256): all are kept" in said
    assert people(tmp_path / "m") == [*people(out), "q", "q"]
    assert run(capsys, "verify", tmp_path / "m") == (
        0,
        f"{tmp_path / 'm'}: whole; 21 train, 2 rejected\n",
    )
    np.testing.assert_array_equal(
        Records(tmp_path / "m").identities, [*Records(out).identities, 6, 6]
    )


def test_made_up_names_in_two_sets_are_told_of(tmp_path, capsys):
    """Each of the sets has a person-0000001, and somebody of their own."""
    for number in range(2):
        for photo in range(2):
            path = tmp_path / f"in{number}" / f"{number}{photo}.png"
            write_photo(path, seed=10 * number + photo)
            if photo == 0:
                np.save(path.with_suffix(".embedding.npy"), np.eye(2)[number])
        source, out = str(tmp_path / f"in{number}"), str(tmp_path / f"out{number}")
        build(BuildSettings(source=source, size=16, crop=16), out)
    sets = [tmp_path / "out0", tmp_path / "out1"]
    status, said = run(capsys, "merge", *sets, "--to", tmp_path / "m")
    assert status == 0
    assert "warning: 1 names, as person-0000001, are of people without a label in" in said
    assert people(tmp_path / "m") == ["person-0000001", "only 01.png"] + [
        "person-0000001",
        "only 11.png",
    ]
    assert "warning" not in run(capsys, "merge", sets[0], "--to", tmp_path / "one")[1]


def test_a_shared_face_across_splits_raises_the_alarm(source, tmp_path, capsys):
    """Of all shares at least one parts p0 from p5, who share a picture."""
    from fact_train.prepare.decide import split_of

    share = next(
        share
        for share in np.linspace(0.05, 0.95, 19)
        if split_of("p0", {"test": share}) != split_of("p5", {"test": share})
    )
    sizes = ["--size", "16", "--crop", "16"]
    command = ["build", source, tmp_path / "out", *sizes, "--split", f"test={share}"]
    status, said = run(capsys, *command)
    assert status == 1
    assert "one face may be in two splits" in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "suspects.jsonl").open()]
    assert [line["alarm"] for line in lines] == [True]
    assert lines[0]["people"] == ["p0", "p5"]


def test_a_person_is_removed_with_all_that_is_left_of_them(out, miniature, tmp_path, capsys):
    """Records, lines, thumbnails, and the rows of a cache; what others have is untouched."""
    pipeline, encoder = load_pipeline(miniature / "base"), load_encoder(miniature / "encoder")
    records = open_records(str(out), pipeline, encoder)
    frozen = FrozenEncoders(pipeline, encoder)
    writer = CacheWriter(
        records, frozen, pipeline.tokenizer, tmp_path / "cache", cell=2, rows_per_shard=4
    )
    assert writer.write((0, 1), lambda line: None)
    before = CachedDataset(tmp_path / "cache", "head")
    rows = [before.load(i, i)["tokens"] for i in range(19)]
    theirs = records.identities == 0
    (tmp_path / "link").symlink_to(tmp_path / "cache" / "face_cache" / "1.0.0")
    command = ("remove", out, "--person", "p0", "--cache", tmp_path / "link")
    status, said = run(capsys, *command)
    assert (status, said.splitlines()[0]) == (0, f"{out}: 3 records removed")
    assert "the same pictures stay under other names: p5/other.png of p5: remove these" in said
    assert run(capsys, "verify", out)[0] == 0
    assert (tmp_path / "link").is_symlink()
    after = CachedDataset(tmp_path / "cache", "head")
    after.check(frozen, Records(out))
    assert len(after.identities) == 16
    for i, row in enumerate(np.flatnonzero(~theirs)):
        np.testing.assert_array_equal(after.load(i, i)["tokens"], rows[row])
    for path in out.rglob("*"):
        assert path.is_dir() or b"p0" not in path.read_bytes(), path
    (log,) = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert (log["records"], log["rejected"], log["caches"]) == (3, 2, 1)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["in"], summary["records"], summary["removed"]) == (16, 16, 3)
    told = (out / "README.md").read_text()
    assert "3 photos were removed or left out" in told
    assert "duplicate" not in told  # their own copy, which went too
    status, said = run(capsys, *command)
    assert status == 2
    assert "holds nobody of the name p0" in said


def test_the_page_opens_offline(out, capsys):
    assert run(capsys, "report", out, "--photos", "4") == (0, f"{out / 'report.html'}\n")
    page = (out / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:image/jpeg;base64,)""", page)
    assert page.count("<figure><img") >= 4
    for text in ("photos a person", "duplicate: 1", "not readable: 1", "same picture: p0/2.png"):
        assert text in page
    thumbnails = re.findall(r"base64,([^\"]+)", page)
    assert len(thumbnails) == 2 * 4 + 1 + 2  # photo and crop; the copy; the shared picture twice


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["verify", "NONE"], "holds no whole set"),
        (["report", "NONE"], "holds no whole set"),
        (["remove", "NONE", "--person", "x"], "holds no whole set"),
        (["remove", "OUT", "--person", "x"], "holds nobody of the name x"),
        (["remove", "OUT", "--person", "p1", "--cache", "NONE"], "does not exist"),
        (["remove", "OUT", "--person", "p1", "--shard-mb", "-1"], "--shard-mb -1"),
        (["merge", "OUT", "OUT", "--to", "NEW"], "named twice"),
        (["merge", "OUT", "NONE", "--to", "NEW"], "holds no whole set"),
        (["merge", "OUT", "--to", "OUT"], "exists already; choose another name\n"),
        (["merge", "OUT", "--to", "IN"], "lies in the set"),
        (["split", "OUT", "--to", "IN"], "lies in the set"),
        (["split", "OUT", "--to", "NEW", "--split", "a"], "give NAME=VALUE"),
        (["split", "OUT", "--to", "NEW", "--split", "a=2"], "split a=2"),
        (["split", "OUT", "--to", "NEW", *["--split", "a=0.2"] * 2], "--split a is given twice"),
    ],
)
def test_wrong_input_is_one_line(out, tmp_path, capsys, arguments, line):
    places = {"OUT": out, "NONE": tmp_path / "none", "NEW": tmp_path / "new"}
    places["IN"] = out / "in"
    status, said = run(capsys, *(places.get(text, text) for text in arguments))
    assert (status, said.count("\n")) == (2, 1), said
    assert line in said
    assert not (tmp_path / "new").exists()
    assert not (out / "in").exists()
    assert run(capsys, "verify", out)[0] == 0


def test_what_no_build_wrote_is_not_removed_with_a_person(out, capsys):
    """A licence, or a cache that was written into the set's folder."""
    (out / "LICENSE").write_text("mine")
    status, said = run(capsys, "remove", out, "--person", "p1")
    assert status == 2
    assert "holds LICENSE, which no build wrote: move that elsewhere" in said
    assert (out / "LICENSE").read_text() == "mine"
    (out / "LICENSE").unlink()
    assert run(capsys, "remove", out, "--person", "p1")[0] == 0


def test_thumbnails_are_of_the_rejected_photo(made):
    lines = map(json.loads, (made / "rejected.jsonl").read_text().splitlines())
    (copy,) = [line for line in lines if "thumbnail" in line]
    assert copy["name"] == "p0/copy.png"
    import base64
    import io

    with Image.open(io.BytesIO(base64.b64decode(copy["thumbnail"]))) as small:
        assert small.size == (16, 16)


def test_what_killed_removals_left_goes_with_the_next(out, capsys):
    """A whole old set that lay aside when the process died."""
    left = out.with_name(f".{out.name}.0123abcd.tmp")
    shutil.copytree(out, left)
    assert run(capsys, "remove", out, "--person", "p0")[0] == 0
    shutil.copytree(out, left)
    status, said = run(capsys, "remove", out, "--person", "p0")
    assert status == 2
    assert "removed before; a cache that was not named then is to be written again" in said
    assert not left.exists()


def test_no_cache_is_changed_where_another_does_not_fit(out, miniature, tmp_path, capsys):
    pipeline, encoder = load_pipeline(miniature / "base"), load_encoder(miniature / "encoder")
    frozen = FrozenEncoders(pipeline, encoder)
    for name in ("cache", "other"):
        records = open_records(str(out), pipeline, encoder)
        writer = CacheWriter(records, frozen, pipeline.tokenizer, tmp_path / name, cell=2)
        assert writer.write((0, 1), lambda line: None)
    (origin,) = (tmp_path / "other").rglob(ORIGIN)
    told = json.loads(origin.read_text())
    origin.write_text(json.dumps(told | {"records": "others"}))
    caches = ("--cache", tmp_path / "cache", "--cache", tmp_path / "other")
    status, said = run(capsys, "remove", out, "--person", "p0", *caches)
    assert (status, said.count("\n")) == (2, 1)
    assert "is a cache with other records" in said
    CachedDataset(tmp_path / "cache", "head").check(frozen, Records(out))
    assert run(capsys, "verify", out)[0] == 0


def test_what_a_killed_report_left_goes_with_a_person(out, capsys):
    left = [out / f".{name}.0123abcd.tmp" for name in ("report.html", "rejected.jsonl")]
    for path in left:
        path.write_text("p0")
    assert run(capsys, "report", out)[0] == 0
    assert [path.exists() for path in left] == [False, True]
    assert run(capsys, "remove", out, "--person", "p0")[0] == 0
    assert not left[1].exists()


def test_a_set_may_lose_the_last_of_train_but_a_cache_keeps_somebody(
    out, miniature, tmp_path, capsys
):
    assert run(capsys, "split", out, "--to", tmp_path / "s", "--split", "val=0.8")[0] == 0
    (last,) = set(people(tmp_path / "s"))
    pipeline, encoder = load_pipeline(miniature / "base"), load_encoder(miniature / "encoder")
    records = open_records(str(tmp_path / "s"), pipeline, encoder)
    frozen = FrozenEncoders(pipeline, encoder)
    writer = CacheWriter(records, frozen, pipeline.tokenizer, tmp_path / "cache", cell=2)
    assert writer.write((0, 1), lambda line: None)
    command = ("remove", tmp_path / "s", "--person", last)
    status, said = run(capsys, *command, "--cache", tmp_path / "cache")
    assert (status, said.count("\n")) == (2, 1)
    assert f"{last} is everybody in train" in said
    CachedDataset(tmp_path / "cache", "head").check(frozen, Records(tmp_path / "s"))
    status, said = run(capsys, *command)
    assert status == 0
    assert "warning: nobody is in train" in said
    assert run(capsys, "verify", tmp_path / "s")[0] == 0


@pytest.mark.parametrize("command", ["split ../out --to . --split val=0.4", "merge ../out --to ."])
def test_the_folder_that_the_program_runs_in_is_not_replaced(
    out, tmp_path, capsys, monkeypatch, command
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    status, said = run(capsys, *command.split())
    assert (status, said.count("\n")) == (2, 1)
    assert "the folder where this program runs is not replaced" in said
    monkeypatch.chdir(out / "about")
    status, said = run(capsys, "remove", "..", "--person", "p0")
    assert (status, said.count("\n")) == (2, 1)
    assert run(capsys, "verify", "..")[0] == 0


def test_hidden_folders_are_not_removed_with_a_person(out, capsys):
    (out / ".git").mkdir()
    status, said = run(capsys, "remove", out, "--person", "p1")
    assert status == 2
    assert "holds .git, which no build wrote" in said
    assert (out / ".git").is_dir()


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("suspects.jsonl", None, "it has no suspects.jsonl"),
        ("face_fact/1.0.0/features.json", None, "features.json"),
        ("face_fact/1.0.0/identities.npy", b"", "is damaged"),
        ("about/train-00000.jsonl", b"\xff\n", "damaged"),
        ("about/train-00000.jsonl", b"{}\n", "damaged"),
        ("summary.json", b'{"people": 7}', "it is of another kind"),
    ],
)
def test_verify_of_a_set_that_is_not_whole_is_one_line(out, capsys, file, content, line):
    path = next(out.glob(file.replace("face_fact", "*")))
    path.unlink() if content is None else path.write_bytes(content)
    status, said = run(capsys, "verify", out)
    assert (status, said.count("\n")) == (2, 1), said
    assert line in said


def test_verify_counts_people(out, capsys):
    summary = json.loads((out / "summary.json").read_text())
    summary["splits"]["train"]["people"] += 1
    (out / "summary.json").write_text(json.dumps(summary))
    status, said = run(capsys, "verify", out)
    assert (status, "19 records of 6 people in train, not 19 of 7" in said) == (2, True)


def test_a_set_that_was_split_is_no_build_of_the_source(out, source, tmp_path, capsys):
    assert run(capsys, "split", out, "--to", tmp_path / "new", "--split", "a=0.4")[0] == 0
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert summary["settings"]["splits"] == {"a": 0.4}
    settings = BuildSettings(source=str(source), size=16, crop=16, shard_megabytes=0.02)
    with pytest.raises(UserError, match="holds records of another source"):
        build(settings, str(tmp_path / "new"))
