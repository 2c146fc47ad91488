"""What the page does with files and requests, without a browser."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

pytest.importorskip("gradio")

from fact_infer.cli.serve import operations
from fact_infer.service.records import fields_of_record, read_record
from fact_infer.ui.controls import Controls
from fact_infer.ui.drawing import Desk, sentence
from fact_infer.ui.people import read_shots
from fact_jax.utils.errors import UserError
from tests.infer.service.conftest import parts, service_of, start, stub  # noqa: F401

pytestmark = pytest.mark.heavy

PIXELS = np.zeros((32, 32, 3), np.uint8)


def recorded(path, record):
    info = PngImagePlugin.PngInfo()
    info.add_text("fact_jax", record if isinstance(record, str) else json.dumps(record))
    Image.fromarray(PIXELS).save(path, pnginfo=info)
    return path


@pytest.fixture
def controls():
    (generate,) = (each for each in operations(True) if each.kind == "generate")
    made = Controls(generate.fields, {})
    made.add_rest(("person", "face_index"))
    return made


def test_settings_of_strangers_pictures(controls, tmp_path):
    """Those that are none are named, the others are taken, and all can be shown."""
    record = {
        "prompt": {"x": 1},
        "seed": 3,
        "steps": "many",
        "sampler": "<script>",
        "guidance": 2.5,
        "height": 1e400,
        "face": {"face_scale": [1, "x"], "block_scales": [1, 2], "start": 0.5, "adain": "maybe"},
    }
    path = recorded(tmp_path / "a.png", json.dumps(record))
    fields, wrong = controls.readable(fields_of_record(read_record(path)))
    assert fields == {"prompt": ["{'x': 1}"], "seed": 3, "guidance": 2.5, "face_start": 0.5}
    named = {line.partition(" must be ")[0] for line in wrong}
    assert named == {"steps", "sampler", "height", "face_scale", "block_scale", "adain"}
    for component, update in zip(controls.components, controls.updates(fields), strict=True):
        if "value" in update:
            component.postprocess(update["value"])
    own = {"prompt": "a cat", "face": {"block_scales": [["up_blocks", 0.5]], "cap": 0.5}}
    fields, wrong = controls.readable(fields_of_record(own))
    assert not wrong
    assert fields["block_scale"] == [("up_blocks", 0.5)]
    assert "up_blocks=0.5" in [update.get("value") for update in controls.updates(fields)]


@pytest.mark.parametrize("record", ["{", "[1]", "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"])
def test_broken_records(record, tmp_path):
    with pytest.raises(UserError, match="holds no record"):
        read_record(recorded(tmp_path / "a.png", record))


def test_only_png_and_jpeg_are_read_back(tmp_path, monkeypatch):
    """No other of Pillow's readers is asked: that of PostScript starts a program."""
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    )
    asked = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: asked.append(a))
    with pytest.raises(UserError, match=r"a.png is not a picture that can be read \(PNG, JPEG\)"):
        read_record(tmp_path / "a.png")
    assert not asked


def test_photos_that_are_none(stub, tmp_path):  # noqa: F811
    """One sentence each, with the photo's name and no place of this machine."""
    service = service_of(stub.parts)
    Image.new("1", (1, 1)).save(tmp_path / "one.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(PIXELS).save(tmp_path / "good.png")
    (tmp_path / "good.points.json").write_text("{")
    for names, words in (
        (["one.png"], "photo is too small: 1 x 1"),
        (["bomb.png"], "photo is too large: at most 50,000,000 pixels"),
        (["text.png"], "photo is not a picture that can be read"),
        (["good.png", "good.points.json"], "points is not JSON"),
        (["good.points.json"], "belongs to no photo"),
    ):
        with pytest.raises(UserError) as raised:
            read_shots(service, [tmp_path / name for name in names])
        text = sentence(raised.value)
        assert text.startswith(names[0])
        assert words in text
        assert str(tmp_path) not in text


def test_no_path_and_no_address_of_a_request_is_opened(stub, monkeypatch, tmp_path):  # noqa: F811
    """Only what was uploaded: the page asks Gradio for files by their place on this machine."""
    opened, fetched = [], []
    monkeypatch.setattr(
        "fact_infer.ui.page.read_record", lambda file: opened.append(file) or {"prompt": ""}
    )
    monkeypatch.setattr(
        "gradio.processing_utils.async_ssrf_protected_download",
        lambda *given, **more: fetched.append(given),
    )
    own = recorded(tmp_path / "own.png", {"prompt": "a cat"})
    client, end = start(stub, page=True)
    try:
        config = client.get("/config").json()
        (number,) = (each["id"] for each in config["dependencies"] if each["api_name"] == "_read")

        def read(session, path):
            file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
            asked = {"fn_index": number, "data": [file], "session_hash": session}
            assert client.post("/gradio_api/queue/join", json=asked).status_code == 200
            told = {"session_hash": session}
            with client.stream("GET", "/gradio_api/queue/data", params=told) as answer:
                lines = [line for line in answer.iter_lines() if "process_completed" in line]
            return json.loads(lines[0].removeprefix("data:"))

        (uploaded,) = client.post("/gradio_api/upload", files={"files": own.read_bytes()}).json()
        assert read("uploaded", uploaded)["success"]
        assert opened == [uploaded]
        outside = f"{uploaded}/../../../{'../' * 20}{own}"
        for place in (own, "/etc/passwd", outside, "http://example.com/x.png", "file:///x.png"):
            found = read(str(place)[-9:], place)
            assert not found["success"]
            assert "was not uploaded here" in found["output"]["error"]
    finally:
        end()
    assert opened == [uploaded]
    assert not fetched


def test_cancel_stops_all_that_a_page_draws():
    """A drawing that ends leaves the other one of the same page within reach."""
    cancelled, jobs = [], iter("ab")

    def reserve(kind, preview):
        return SimpleNamespace(name=next(jobs), state="queued", progress=None, notes=[])

    engine = SimpleNamespace(
        reserve=reserve,
        cancel=lambda job: cancelled.append(job.name),
        wait=lambda job, seconds: False,
        ready=False,
    )
    desk = Desk(SimpleNamespace(engine=engine, submit=lambda *given: None))
    first, second = (desk.draw("generate", {}, "page") for _ in range(2))
    for drawing in (first, second):
        next(drawing), next(drawing)
    first.close()
    assert cancelled == ["a"]
    desk.cancel(SimpleNamespace(session_hash="other"))
    desk.cancel(SimpleNamespace(session_hash="page"))
    assert cancelled == ["a", "b"]
    second.close()
    assert not desk.running
