"""The API over a socket: forms and JSON, many clients, clients that leave, who may ask."""

import asyncio
import base64
import io
import json
import socket
import struct
import time
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image

from fact_infer.service.http.api import prefers_png
from tests.infer.service.conftest import points_of, start
from tests.infer.service.stubs import picture_of


def draw(client, form, wait=20, **fields):
    data, files = form
    return client.post(f"/v1/generate?wait={wait}", data=data | fields, files=files)


def pixels(client, picture):
    response = client.get(picture["url"])
    assert response.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(response.content)))


def test_form_and_json_are_the_same_request(client, form, astronaut):
    sent = draw(client, form, seed="4", count="2", block_scale="up=0.5", face_scale="0.2,1")
    assert sent.status_code == 200
    points = points_of(astronaut)
    same = {
        "photo": base64.b64encode(astronaut.read_bytes()).decode(),
        "points": points,
        **{"prompt": ["a cat"], "steps": 3, "sampler": "ddim", "seed": 4, "count": 2},
        **{"block_scale": {"up": 0.5}, "face_scale": [0.2, 1]},
    }
    other = client.post("/v1/generate?wait=20", json=same)
    one, two = (answer.json()["pictures"] for answer in (sent, other))
    # The points' file has another name: its bytes are others.
    assert [picture["record"] for picture in one] == [picture["record"] for picture in two]
    assert one[0]["record"]["face"]["block_scales"] == [["up", 0.5]]
    for seed, picture in enumerate(one, start=4):
        np.testing.assert_array_equal(pixels(client, picture), picture_of("a cat", seed))


def test_head_is_get_without_a_body(client):
    """What a load balancer may ask with; OpenAPI names the methods of each path once."""
    for path, status in (("/healthz", 200), ("/readyz", 200), ("/v1/jobs/none", 404)):
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (status, b"")
        assert answer.headers["content-length"] == client.get(path).headers["content-length"]
    assert client.head("/v1/generate").status_code == 405


def test_a_job_from_post_to_delete(client, form, stub):
    stub.gate.clear()
    posted = draw(client, form, wait=0)
    assert posted.status_code == 202
    place = posted.headers["location"]
    assert client.get(place).json()["state"] in ("queued", "running")
    assert client.get(f"{place}/pictures/0").status_code == 404
    stub.gate.set()
    done = client.get(f"{place}?wait=20").json()
    assert done["state"] == "done"
    assert done["progress"]["step"] == done["progress"]["steps"] == 3
    assert client.delete(place).json()["state"] == "done"
    assert client.get(place).status_code == 404


def test_a_preview_on_the_way(client, form, stub):
    """Of both pictures of a batch, side by side, while they are drawn."""
    data, files = form
    asked = {"data": data | {"count": "2"}, "files": files}

    stub.gate.clear()
    place = client.post("/v1/generate?preview=1", **asked).headers["location"]
    assert client.get(f"{place}/preview").status_code == 404
    job = client.engine.find(place.rpartition("/")[2])
    stub.gate.wait = lambda seconds: time.sleep(0.3)
    stub.gate.set()
    until = time.monotonic() + 10
    while job.preview is None and time.monotonic() < until:
        time.sleep(0.005)
    shown = client.get(f"{place}/preview")
    seen = np.asarray(Image.open(io.BytesIO(shown.content)))
    both = np.concatenate([picture_of("a cat", 0), picture_of("a cat", 1)], axis=1)
    np.testing.assert_array_equal(seen, both)
    assert client.engine.wait(job, 20)
    assert client.get(f"{place}/preview").status_code == 404


@pytest.mark.parametrize("accept", ["image/png", "image/png,*/*", "text/html, image/*;q=0.8"])
def test_a_picture_alone_for_those_who_want_no_json(client, form, accept):
    data, files = form
    accept = {"Accept": accept}
    answer = client.post("/v1/generate?wait=20", data=data, files=files, headers=accept)
    image = Image.open(io.BytesIO(answer.content))
    np.testing.assert_array_equal(image, picture_of("a cat", 0))
    assert json.loads(image.text["fact_jax"])["prompt"] == "a cat"


@pytest.mark.parametrize(
    ("accept", "picture"),
    [
        *(("image/png", True), ("image/*", True), ("IMAGE/PNG", True), ("image/png,*/*", True)),
        *(("*/*, image/png", True), ("image/png;q=0.9,application/json;q=0.8", True)),
        *(("image/png, application/json", True), ("*/*;q=0.1, image/*;q=0.2", True)),
        *(("", False), ("*/*", False), ("application/json", False), ("text/html", False)),
        *(("application/json, image/png", False), ("image/png;q=0.5, */*", False)),
        *(("image/png;q=0, */*;q=0.1", False), ("image/png;q=0", False)),
        *(("image/png;q=0, image/*", False), ("image/png;q=nan", False), ("image/png;q=2", False)),
        *((",;,=;q", False), ("image/jpeg", False), ("application/*, image/png", True)),
    ],
)
def test_what_an_accept_header_prefers(accept, picture):
    assert prefers_png(accept) is picture


def test_faces(client, astronaut):
    files = {
        "photo": astronaut.read_bytes(),
        "points": json.dumps({"points": points_of(astronaut)}),
    }
    found = client.post("/v1/faces", files=files).json()
    assert (found["height"], found["width"]) == (512, 512)
    (face,) = found["faces"]
    np.testing.assert_allclose(face["points"], points_of(astronaut), atol=0.01)
    crop = Image.open(io.BytesIO(base64.b64decode(face["crop"])))
    assert crop.size == (64, 64) or crop.size[0] == crop.size[1]
    without = client.post("/v1/faces", files={"photo": astronaut.read_bytes()})
    assert without.status_code == 422
    assert "no face detector" in without.json()["detail"]


@pytest.mark.parametrize("clients", [200])
def test_many_clients_at_a_short_queue(stub, form, clients):
    """Eight places are taken, all others are told when to come again, nothing is mixed up."""
    client, end = start(stub, queue=8)
    stub.gate.clear()
    data, files = form

    async def ask(session, i):
        fields = data | {"prompt": f"picture {i}", "seed": str(i)}
        return i, await session.post("/v1/generate", data=fields, files=files)

    async def everyone():
        limits = httpx.Limits(max_connections=clients)
        base = {"base_url": client.base_url, "timeout": 60, "limits": limits}
        async with httpx.AsyncClient(**base) as session:
            return await asyncio.gather(*(ask(session, i) for i in range(clients)))

    try:
        answers = asyncio.run(everyone())
        taken = [(i, answer) for i, answer in answers if answer.status_code == 202]
        full = [answer for _, answer in answers if answer.status_code == 429]
        assert (len(taken), len(full)) == (8, clients - 8)
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in full)
        stub.gate.set()
        for i, answer in taken:
            job = client.get(f"{answer.headers['location']}?wait=30").json()
            (picture,) = job["pictures"]
            assert (picture["record"]["seed"], picture["record"]["prompt"]) == (i, f"picture {i}")
            np.testing.assert_array_equal(pixels(client, picture), picture_of(f"picture {i}", i))
        assert draw(client, form).status_code == 200
    finally:
        end()


def test_clients_that_leave_free_their_places(client, form, stub):
    """One whose picture is drawn, and one that waits."""
    stub.gate.clear()
    data, files = form
    for _ in range(2):
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/generate?wait=60", data=data, files=files, timeout=0.5)
    jobs = list(client.engine._jobs.values())
    until = time.monotonic() + 10
    while not all(job.cancel_asked for job in jobs) and time.monotonic() < until:
        time.sleep(0.02)
    stub.gate.set()
    assert all(client.engine.wait(job, 10) for job in jobs)
    assert [job.state for job in jobs] == ["cancelled", "cancelled"]
    assert stub.calls == 1
    assert not sum(client.engine.counts().values())


def test_probes_and_documentation(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").status_code == 200
    schema = client.get("/openapi.json").json()
    assert {"/v1/generate", "/v1/redraw", "/v1/faces", "/v1/jobs/{number}"} <= set(schema["paths"])
    page = client.get("/docs").text
    assert "face_guidance" in page
    # Nothing is loaded from anywhere.
    assert not any(word in page for word in ("src=", "<link", "@import", "<script"))


def test_who_may_ask(stub, form):
    client, end = start(stub, token="a secret")
    try:
        assert client.get("/metrics").status_code == 401
        assert client.get("/healthz").status_code == 200
        assert draw(client, form).status_code == 401
        client.headers["Authorization"] = "Bearer another secret"
        assert client.get("/metrics").status_code == 401
        client.headers["Authorization"] = "Bearer a secret"
        assert draw(client, form).status_code == 200
        # A page of another site, and a name that another site has for this machine.
        assert client.get("/metrics", headers={"Origin": "http://evil.test"}).status_code == 403
        assert client.get("/metrics", headers={"Host": "evil.test"}).status_code == 403
    finally:
        end()


def test_no_path_of_a_request_is_opened(client, form, monkeypatch, tmp_path):
    import builtins

    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 64)).save(secret)
    opened, real = [], builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda f, *a, **k: opened.append(str(f)) or real(f, *a, **k)
    )
    data, files = form
    for name in ("photo", "image", "region", "control"):
        answer = client.post("/v1/generate", data=data | {name: str(secret)}, files=files[1:])
        assert answer.status_code == 422
        assert (
            client.post("/v1/generate", json={"prompt": "x", name: str(secret)}).status_code == 422
        )
    named = [("photo", (str(secret), files[0][1][1])), files[1]]
    assert client.post("/v1/generate?wait=20", data=data, files=named).status_code == 200
    for path in ("/v1/jobs/..%2f..%2fetc%2fpasswd", "/v1/jobs/x/pictures/..%2f..%2fpasswd"):
        assert client.get(path).status_code in (404, 422)
    assert not any("secret" in path or "passwd" in path for path in opened)


def bomb(width, height):
    """A PNG of a few bytes that claims a size."""

    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({"steps": "9999"}, 422, "steps: at most 200"),
        ({"count": "1000000000"}, 422, "pictures: at most 16"),
        ({"width": "80000"}, 422, "width must lie"),
        ({"width": "4096", "height": "4096"}, 422, "at most 8,388,608 pixels"),
        ({"steps": "3.5"}, 422, "steps must be a whole number"),
        ({"sampler": "unknown"}, 422, "no sampler 'unknown'"),
        ({"block_scale": "(a+)+$=1"}, 422, "a pattern has letters"),
        ({"detector": "/etc"}, 422, "no field 'detector'"),
        ({"base": "/etc"}, 422, "no field 'base'"),
        ({"prompt": "x" * 5000}, 422, "at most 4,000 characters"),
        ({"face_index": "7"}, 422, "no face 7"),
        ({"photo": bomb(60000, 60000)}, 422, "photo is too large"),
        ({"photo": bomb(600, 600)}, 422, "truncated or damaged"),
        ({"photo": b"%!PS-Adobe-3.0 EPSF-3.0\n"}, 422, "not a picture that can be read"),
        ({"points": b"[" * 100000}, 422, "not JSON"),
        ({"points": b'{"points": [[1, 2]]}'}, 422, "five [x, y]"),
    ],
)
def test_what_is_refused(client, form, changes, status, text):
    data, files = form
    kept = [(name, content) for name, content in files if name not in changes]
    files = kept + [(k, ("x", v)) for k, v in changes.items() if isinstance(v, bytes)]
    data = data | {k: v for k, v in changes.items() if isinstance(v, str)}
    answer = client.post("/v1/generate", data=data, files=files)
    assert (answer.status_code, text in answer.json()["detail"]) == (status, True), answer.text
    assert "/tmp" not in answer.text
    assert client.engine.counts() == {"preparing": 0, "queued": 0, "running": 0}


def test_bodies_are_bounded(stub):
    client, end = start(stub, body=100_000, body_seconds=0.5)
    kind = {"Content-Type": "application/json"}
    try:
        for body, status in (
            (b'{"prompt": "' + b"x" * 200_000 + b'"}', 413),
            (b"[" * 90_000, 413),
            (b"[" * 10_000, 400),
            (b'{"a":' + b"9" * 90_000 + b"}", 400),
            (b'"text"', 400),
            (b"\xff\xfe", 400),
        ):
            assert client.post("/v1/generate", content=body, headers=kind).status_code == status
        chunks = (b"x" * 50_000 for _ in range(4))
        assert client.post("/v1/generate", content=chunks, headers=kind).status_code == 413
        assert client.post("/v1/generate", content=b"x").status_code == 415
        # A body that trickles in.
        with socket.create_connection((client.base_url.host, client.base_url.port)) as slow:
            slow.settimeout(10)
            head = "POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
            slow.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
            assert b" 408 " in slow.recv(4096)
        assert client.engine.counts() == {"preparing": 0, "queued": 0, "running": 0}
    finally:
        end()


def head(length, *more):
    lines = ("POST /v1/generate HTTP/1.1", "Host: localhost", f"Content-Length: {length}", *more)
    return "\r\n".join([*lines, "", ""]).encode()


def test_answers_before_the_end_of_a_body_arrive(stub):
    """Whoever sends ten times what fits the buffers reads why it was refused, and is cut off."""
    client, end = start(stub, body=100_000, body_seconds=1.0, queue=1)
    kind, large = {"Content-Type": "application/json"}, 20 << 20
    place = client.base_url.host, client.base_url.port
    try:
        for body in (b"x" * 600_000, (b"x" * 1000 for _ in range(600))):
            answer = client.post("/v1/generate", content=body, headers=kind)
            assert answer.status_code == 413
            assert answer.json()["detail"] == "a request has at most 100,000 bytes"
        refused = {"Host": "evil.test", **kind}
        many = b"x" * 700_000
        assert client.post("/v1/generate", content=many, headers=refused).status_code == 403
        assert client.post("/v1/generate", content=many).status_code == 415
        held = client.engine.reserve("generate")
        assert client.post("/v1/generate", content=many, headers=kind).status_code == 429
        client.engine.drop(held)
        # As curl: the answer is there long before the body has been sent.
        for more in ((), ("Expect: 100-continue",)):
            with socket.create_connection(place, timeout=10) as asking:
                asking.sendall(head(large, "Content-Type: application/json", *more))
                asking.sendall(b"" if more else b"x" * 500_000)
                began = time.monotonic()
                first = asking.recv(4096)
                assert first.startswith(b"HTTP/1.1 413 ")
                assert b"connection: close" in first
                assert time.monotonic() - began < 0.9
        # One that never ends is cut off, by its size or by its time.
        for pause in (0.0, 0.05):
            with socket.create_connection(place, timeout=10) as endless:
                endless.sendall(head(large, "Content-Type: application/json"))
                began = time.monotonic()
                with pytest.raises(OSError):  # noqa: PT012
                    while time.monotonic() - began < 10:
                        endless.sendall(b"x" * (10_000 if pause else 100_000))
                        time.sleep(pause)
        assert client.engine.counts() == {"preparing": 0, "queued": 0, "running": 0}
    finally:
        end()


@pytest.mark.parametrize("query", ["wait=nan", "wait=-1", "preview=maybe"])
def test_a_wrong_query_is_one_sentence(client, form, query):
    data, files = form
    answer = client.post(f"/v1/generate?{query}", data=data, files=files)
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert isinstance(detail, str)
    assert detail.startswith(query.partition("=")[0] + ": ")


def test_a_body_of_two_lengths_is_refused(client):
    """Where a proxy goes by one of them, the rest of the body would be a request of its own."""
    lines = (
        *("POST /v1/faces HTTP/1.1", "Host: localhost", "Content-Type: application/json"),
        *("Content-Length: 4", "Transfer-Encoding: chunked", "Connection: close"),
    )
    with socket.create_connection(
        (client.base_url.host, client.base_url.port), timeout=10
    ) as asking:
        asking.sendall("\r\n".join([*lines, "", "2", "{}", "0", "", ""]).encode())
        answer = asking.recv(4096)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"not both" in answer
