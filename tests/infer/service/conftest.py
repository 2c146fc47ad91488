"""The API over a real socket, before a pipeline that draws at once; a photo of the astronaut."""

import argparse
import json
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn
from PIL import Image

from fact_infer.cli.serve import operations
from fact_infer.parts import load_parts
from fact_infer.service.engine import Engine, Limits
from fact_infer.service.http.api import build_app
from fact_infer.service.operations import Service
from fact_jax.face import ASTRONAUT_POINTS
from tests.infer.service.stubs import StubPipeline

MINIATURE = Path(__file__).parents[3] / "miniature"
OPERATOR = {
    "base": str(MINIATURE / "base"),
    "adapter": str(MINIATURE / "adapter" / "adapter.safetensors"),
    "encoder": str(MINIATURE / "encoder"),
    "lora": [],
    "controlnet": None,
    "backend": "flax",
    "precision": "float32",
    "safety_checker": False,
    "detector": None,
    "batch": 4,
}


@pytest.fixture(scope="session")
def astronaut(tmp_path_factory) -> Path:
    """scikit-image's photo with its points beside it."""
    from skimage import data

    path = tmp_path_factory.mktemp("photo") / "astronaut.png"
    Image.fromarray(data.astronaut()).save(path)
    path.with_suffix(".points.json").write_text(ASTRONAUT_POINTS.read_text())
    return path


@pytest.fixture(scope="session")
def parts():
    """The miniature, opened; no weights are read."""
    return load_parts(*(OPERATOR[name] for name in ("base", "adapter", "encoder")))


@pytest.fixture
def stub(parts, monkeypatch, tmp_path):
    """The pipeline; no detector of this machine takes part."""
    monkeypatch.setattr("fact_jax.face.landmarks._PACKS", tmp_path / "none")
    stub = StubPipeline()
    stub.parts, stub.base, stub.face = parts, parts.base, parts.face
    return stub


def service_of(parts, load=None, **limits):
    """The service of some models; ``load`` gives the pipeline when the engine starts."""
    operator = argparse.Namespace(**OPERATOR)
    return Service(Engine(load, Limits(**limits)), parts, operations(True), operator)


def start(stub, **options):
    """A client of the API, and the function that ends it."""
    token, page = options.pop("token", None), options.pop("page", False)
    service = service_of(stub.parts, lambda: stub, **{"body_seconds": 5.0} | options)
    engine, app = service.engine, build_app(service, token=token)
    if page:
        from fact_infer.ui.page import mount

        app = mount(app, service, token, [])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not (server.started and engine.ready):
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
    client.engine = engine

    def end():
        client.close()
        stub.gate.set()
        server.should_exit = True
        thread.join(20)

    return client, end


@pytest.fixture
def client(stub):
    found, end = start(stub)
    yield found
    end()


@pytest.fixture
def form(astronaut):
    """The smallest request with a face, as a form: fields and files."""
    files = [
        ("photo", ("../../x.png", astronaut.read_bytes())),
        ("points", ("p.json", astronaut.with_suffix(".points.json").read_bytes())),
    ]
    return {"prompt": "a cat", "steps": "3", "sampler": "ddim"}, files


def points_of(photo: Path) -> list:
    """The five points beside a photo."""
    return json.loads(photo.with_suffix(".points.json").read_text())["points"]


def mirrored(photo, path):
    """A photo's mirror image, with its points."""
    with Image.open(photo) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
        points = [[image.width - x, y] for x, y in points_of(photo)]
    points = [points[i] for i in (1, 0, 2, 4, 3)]
    path.with_suffix(".points.json").write_text(json.dumps({"points": points}))
    return path
