"""The whole service on the shipped miniature: the command line's bits, and how it ends."""

import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from fact_infer.cli.main import main
from tests.infer.service.conftest import MINIATURE, OPERATOR, mirrored
from tests.infer.service.programs import program

pytestmark = pytest.mark.heavy
NAMES = ("base", "adapter", "encoder")


@pytest.fixture
def models(miniature, files):
    """The options that name the models."""
    found = OPERATOR if miniature else files._asdict()
    return [str(word) for name in NAMES for word in (f"--{name}", found[name])]


def command_line(out, photo, models, *words):
    """The files that ``fact-infer generate`` or ``redraw`` writes, in its order."""
    command, *rest = words
    more = ["--photo", photo, "--points", photo.with_suffix(".points.json"), "--out", out]
    assert main([str(word) for word in (command, *rest, *models, *more)]) == 0
    return sorted(out.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def assert_same(client, answer, wanted):
    """The API's pictures, and its sheet if there is one, are those of the files, bit for bit."""
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert job["state"] == "done", job
    sheet = [job["sheet"]] if job["sheet"] else []
    for said, path in zip([*job["pictures"], *sheet], wanted, strict=True):
        found = Image.open(io.BytesIO(client.get(said["url"]).content))
        with Image.open(path) as image:
            np.testing.assert_array_equal(found, image)
            mine, its = (json.loads(one.info.get("fact_jax", "{}")) for one in (found, image))
        assert mine.get("similarity") == its.get("similarity")


@pytest.mark.parametrize(
    ("backend", "miniature"),
    [
        ("flax", False),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("flax", "torch")),
    ],
)
def test_the_bits_of_the_command_line_and_a_clean_end(
    backend, miniature, models, astronaut, tmp_path
):
    files = {
        "photo": astronaut.read_bytes(),
        "points": astronaut.with_suffix(".points.json").read_bytes(),
    }
    how = {"sampler": "ddim", "steps": "4", "guidance": "3", "seed": "5"}
    words = [word for name, value in how.items() for word in (f"--{name}", value)]
    words += ["--backend", backend]
    asked = {**how, "prompt": "a portrait of a smiling person", "count": "2"}
    two = ("generate", "--prompt", asked["prompt"], "--count", 2, *words)
    best = {**asked, "count": "3", "best": "2", "sheet": "true"}
    wanted = command_line(tmp_path / "one", astronaut, models, *two)
    nearest = ("--count", 3, "--best", 2, "--sheet")
    nearest = command_line(tmp_path / "best", astronaut, models, *two, *nearest)
    with program("serve", *models, "--backend", backend, "--merge", "4") as (process, client):
        drawn = client.post("/v1/generate?wait=120", data=asked, files=files)
        assert_same(client, drawn, wanted)
        drawn = client.post("/v1/generate?wait=120", data=best, files=files)
        assert_same(client, drawn, nearest)
        assert all("similarity" in picture["record"] for picture in drawn.json()["pictures"])
        assert drawn.json()["sheet"]["width"] > drawn.json()["pictures"][0]["width"] * 2
        alone = {"Accept": "image/png"}
        drawn = client.post("/v1/generate?wait=120", data=best, files=files, headers=alone)
        np.testing.assert_array_equal(Image.open(io.BytesIO(drawn.content)), Image.open(nearest[2]))
        if miniature:
            other = mirrored(astronaut, tmp_path / "other.png")
            templates = "redraw", astronaut, other
            redrawn = command_line(tmp_path / "two", astronaut, models, *templates, *words)
            more = [
                (name, path.read_bytes())
                for photo in (astronaut, other)
                for name, path in (
                    ("templates", photo),
                    ("template_points", photo.with_suffix(".points.json")),
                )
            ]
            sent = [*files.items(), *more]
            drawn = client.post("/v1/redraw?wait=120", data=how, files=sent)
            assert len(redrawn) == 2
            assert_same(client, drawn, redrawn)
        # One is drawn while SIGTERM comes, one waits.
        long = asked | {"steps": "200", "count": "2"}
        running = client.post("/v1/generate", data=long, files=files).headers["location"]
        waiting = client.post("/v1/generate", data=asked, files=files).headers["location"]
        while client.get(running).json()["progress"]["step"] == 0:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        while client.get("/readyz").status_code == 200:
            time.sleep(0.02)
        assert client.post("/v1/generate", data=asked, files=files).status_code == 503
        assert client.get(f"{waiting}?wait=30").json()["state"] == "refused"
        job = client.get(f"{running}?wait=60").json()
        assert (job["state"], len(job["pictures"])) == ("done", 2)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "99999"], "--port 99999"),
        (["--queue", "0"], "--queue must be above 0"),
        (["--token-file", "nowhere"], "--token-file nowhere: No such file"),
        (["--adapter", "x"], "are for a base: --base"),
        (["--base", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_one_line(words, message, capsys, monkeypatch):
    monkeypatch.chdir(MINIATURE.parent)
    assert main(["serve", *words]) == 2
    assert message in capsys.readouterr().err


def test_no_miniature_here(tmp_path):
    command = [sys.executable, "-m", "fact_infer", "ui"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "run this in a clone of it" in ended.stderr
