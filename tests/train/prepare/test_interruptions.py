"""Threads, interruptions and other commands do not mix photos up, nor what stands in a folder."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fact_jax.utils.errors import UserError
from fact_jax.utils.files import folder_lock
from fact_train.cli.main import main
from fact_train.data.records import Records
from fact_train.prepare.photos import decoder as decoders
from fact_train.prepare.photos.decoder import Decoder
from fact_train.prepare.product import dataset
from tests.train.prepare.conftest import noise, write_photo

SIZES = ["--size", "64", "--crop", "48"]


def build(source, out, *more):
    return main(["data", "build", str(source), str(out), *SIZES, *more])


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def people(tmp_path):
    for number in range(6):
        path = tmp_path / "in" / f"p{number // 2}" / f"{number}.png"
        write_photo(path, seed=number)
    return tmp_path / "in"


@pytest.fixture
def photos(tmp_path):
    found = []
    for seed in range(8):
        Image.fromarray(noise(seed)).save(tmp_path / f"{seed}.png")
        found.append((tmp_path / f"{seed}.png").read_bytes())
    return found


@pytest.fixture
def decode():
    one = Decoder()
    yield one
    one.close()


def test_threads_get_the_pixels_of_their_own_photos(photos, decode):
    def pixels(number):
        return decode(photos[number], str(number), 200)[0]

    with ThreadPoolExecutor(4) as pool:
        numbers = list(range(8)) * 6
        for number, found in zip(numbers, pool.map(pixels, numbers), strict=True):
            np.testing.assert_array_equal(found, noise(number))


def test_after_an_interruption_the_next_photo_gets_its_own_pixels(photos, decode, monkeypatch):
    decode(photos[0], "0", 200)

    def interrupt(stream):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoders, "_receive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode(photos[1], "1", 200)
    monkeypatch.undo()
    np.testing.assert_array_equal(decode(photos[2], "2", 200)[0], noise(2))


def test_a_decoder_that_ended_while_it_was_idle_costs_no_photo(photos, decode):
    decode(photos[0], "0", 200)
    decode._process.kill()
    decode._process.wait()
    np.testing.assert_array_equal(decode(photos[1], "1", 200)[0], noise(1))


def test_ctrl_c_of_a_terminal_does_not_reach_the_decoder(photos, decode):
    decode(photos[0], "0", 200)
    assert os.getpgid(decode._process.pid) != os.getpgid(0)


def test_a_forked_process_has_a_decoder_of_its_own(monkeypatch):
    own = decoders.decoder()
    assert decoders.decoder() is own
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert decoders.decoder() is not own


def test_beams_threads_give_the_same_bytes(people, tmp_path):
    assert build(people, tmp_path / "one", "--chunk", "1") == 0
    threads = "--beam=--direct_num_workers=3 --direct_running_mode=multi_threading"
    assert build(people, tmp_path / "many", "--chunk", "1", threads) == 0
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_files_of_somebody_else_are_no_leftovers(people, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.tmp").write_text("precious")
    assert build(people, out) == 2
    assert "holds mine.tmp, which no build wrote" in capsys.readouterr().err
    assert (out / "mine.tmp").read_text() == "precious"


@pytest.mark.parametrize(
    "command",
    [["build", "IN", "OUT", *SIZES], ["remove", "OUT", "--person", "p0"]],
)
def test_no_command_writes_where_another_does(people, tmp_path, capsys, command):
    out = tmp_path / "out"
    assert build(people, out) == 0
    before = files(out)
    words = [{"IN": str(people), "OUT": str(out)}.get(word, word) for word in command]
    with folder_lock(out, keep=False):
        done = subprocess.run(
            [sys.executable, "-m", "fact_train", "data", *words], capture_output=True, text=True
        )
    status, said = done.returncode, done.stderr
    assert status == 2, said
    assert f"another process is writing in {out}" in said
    assert files(out) == before


def test_a_removal_through_a_link_leaves_nothing_behind_it(people, tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    assert build(people, real) == 0
    link.symlink_to(real)
    assert main(["data", "remove", str(link), "--person", "p0"]) == 0
    assert link.is_symlink()
    read = Records(real)
    assert {read[i]["identity"] for i in range(len(read))} == {b"p1", b"p2"}


def test_settings_that_do_not_fit_can_be_mended(tmp_path, capsys):
    rows = [{"image": f"{i}.png", "who": "a"} for i in range(5)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for number in range(5):
        write_photo(tmp_path / f"{number}.png", seed=number)
    out = tmp_path / "out"
    chunks = ("--chunk", "2")
    assert build(tmp_path / "t.jsonl", out, *chunks, "--column", "identity=whom") == 2
    assert "has no such column" in capsys.readouterr().err
    assert build(tmp_path / "t.jsonl", out, *chunks, "--column", "identity=who") == 0


def test_after_a_forced_build_that_failed_the_set_is_known_again(people, tmp_path, capsys):
    out = tmp_path / "out"
    assert build(people, out) == 0
    before = files(out)
    assert build(people, out, "--gate", "sharpness=1e9", "--force") == 2
    assert build(people, out) == 0
    assert "there already" in capsys.readouterr().out
    assert files(out) == before


@pytest.mark.parametrize("name", ["summary.json", "work/build.json"])
@pytest.mark.parametrize("text", ["broken", "[]", "{}"])
def test_a_damaged_mark_is_one_line_and_force_goes_on(
    people, tmp_path, capsys, monkeypatch, name, text
):
    out = tmp_path / "out"
    if name == "summary.json":
        assert build(people, out) == 0
    else:
        monkeypatch.setattr(dataset, "finish", lambda *_: (_ for _ in ()).throw(UserError("full")))
        assert build(people, out) == 2
        monkeypatch.undo()
    (out / name).write_text(text)
    capsys.readouterr()
    assert build(people, out) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert build(people, out, "--force") == 0
    assert build(people, tmp_path / "fresh") == 0
    assert files(out) == files(tmp_path / "fresh")


def test_who_was_removed_from_one_set_does_not_come_back_by_a_merge(people, tmp_path, capsys):
    for name in ("a", "b"):
        assert build(people, tmp_path / name) == 0
    assert main(["data", "remove", str(tmp_path / "a"), "--person", "p0"]) == 0
    sets = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["data", "merge", *sets, "--to", str(tmp_path / "m")]) == 2
    assert "p0 was removed from one of these sets" in capsys.readouterr().err
    assert main(["data", "remove", sets[1], "--person", "p0"]) == 0
    assert main(["data", "merge", *sets, "--to", str(tmp_path / "m")]) == 0
    write_photo(tmp_path / "other" / "p9" / "0.png", seed=9)
    (tmp_path / "other" / "p0").mkdir()
    (tmp_path / "other" / "p0" / "bad.png").write_bytes(b"none")
    assert build(tmp_path / "other", tmp_path / "c") == 0
    capsys.readouterr()
    command = ["data", "merge", sets[0], str(tmp_path / "c"), "--to", str(tmp_path / "n")]
    assert main(command) == 2  # of p0 there is what was rejected
    assert "p0 was removed from one of these sets" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()
