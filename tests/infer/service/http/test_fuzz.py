"""Requests that nobody would send: each is answered by 4xx, none by 5xx, and the service lives."""

import base64
import io
import json
import math
import random

import numpy as np
import pytest
from PIL import Image

from tests.infer.service.conftest import points_of

_VALUES = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, math.inf, math.nan),
    *(
        "",
        " ",
        "0",
        "-1",
        "NaN",
        "inf",
        "1e999",
        "\0",
        "\ud800",
        "ü",
        "x" * 5000,
        "../../etc/passwd",
    ),
    *("=", "a=b", "up=1", "(a+)+=1", ",", "1,2", "1," * 200, "[]", "{}", "AAAA", "data:;base64,"),
    *([], {}, [[]], [None], [1, "a"], {"a": 1}, {"up": None}, [["x", 1]], [[[1]]], ["a"] * 100),
)


def mutated(draw, good):
    """A good JSON request with some fields made strange."""
    body = dict(good)
    for _ in range(draw.randint(0, 2)):
        name = draw.choice([*good, *FIELDS, "unknown", ""])
        body[name] = draw.choice(_VALUES)
        if draw.random() < 0.2:
            body[name] = [draw.choice(_VALUES) for _ in range(draw.randint(0, 4))]
        if draw.random() < 0.1:
            body.pop(draw.choice(list(body)))
    return body


FIELDS = (
    *(
        "photo",
        "points",
        "mask",
        "parsing",
        "face_index",
        "person",
        "region",
        "image",
        "image_mask",
    ),
    *("control", "strength", "control_scale", "prompt", "negative", "seed", "count", "sampler"),
    *(
        "steps",
        "guidance",
        "height",
        "width",
        "face_scale",
        "block_scale",
        "face_start",
        "face_stop",
    ),
    *("face_guidance", "negative_face", "combine", "face_cap", "adain", "templates", "face", "box"),
    *("area", "template_points", "fill", "grow", "soften"),
)


def broken(draw, text):
    """The bytes of a body with some of them changed, removed or doubled."""
    body = bytearray(text)
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(len(body))
        match draw.randrange(3):
            case 0:
                body[at] = draw.randrange(256)
            case 1:
                del body[at : at + draw.randint(1, 200)]
            case _:
                body[at:at] = body[at : at + draw.randint(1, 50)]
        if not body:
            body = bytearray(b"x")
    return bytes(body)


@pytest.mark.parametrize("count", [400, pytest.param(4000, marks=pytest.mark.slow)])
def test_strange_requests(client, astronaut, form, count):
    draw = random.Random(count)
    small = io.BytesIO()
    Image.open(astronaut).resize((128, 128)).save(small, format="JPEG")
    photo = base64.b64encode(small.getvalue()).decode()
    points = (np.asarray(points_of(astronaut)) / 4).tolist()
    faced = {"photo": photo, "points": points}
    good = {
        "generate": {"prompt": "a cat", "steps": 2, **faced},
        "redraw": {"templates": photo, "template_points": points, **faced},
        "faces": faced,
    }
    data, files = form
    form_body = client.build_request("POST", "/", data=data, files=files)
    form_body.read()
    kinds = (
        "application/json",
        form_body.headers["content-type"],
        *("multipart/form-data", "text/plain", "", "application/json; charset=x"),
    )
    statuses = set()
    for _ in range(count):
        path = draw.choice(list(good))
        body = mutated(draw, good[path])
        text = json.dumps(body).encode("utf-8", "surrogatepass")
        kind = kinds[0]
        if draw.random() < 0.4:
            kind = draw.choice(kinds)
            text = broken(draw, draw.choice([text, form_body.content[-3000:]]))
        wait = draw.choice(["", "?wait=5", "?wait=x", "?wait=-1", "?preview=7", "?wait=1e400"])
        answer = client.post(
            f"/v1/{path}{wait}", content=text, headers={"Content-Type": kind, "X-Odd": "1" * 50}
        )
        statuses.add(answer.status_code)
        assert answer.status_code < 500, (path, body, kind, text[:500], answer.text)
        assert 200 <= answer.status_code < 203 or answer.json()["detail"]
        if answer.status_code == 202:
            client.delete(answer.headers["location"])
    assert {400, 415, 422} <= statuses
    assert statuses & {200, 202}
    assert client.get("/readyz").status_code == 200
    assert client.engine.counts() == {"preparing": 0, "queued": 0, "running": 0}


@pytest.mark.slow
def test_schemathesis(client):
    """What a tool makes of our own schema: answers are as documented, none is 5xx."""
    import schemathesis
    from schemathesis.checks import not_a_server_error

    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")

    for operation in schema.get_all_operations():
        found = operation.ok()
        for generated in _cases(found):
            answer = generated.call(timeout=30)
            generated.validate_response(answer, checks=[not_a_server_error])


def _cases(operation, count=60):
    """Cases of an operation, as hypothesis draws them."""
    from hypothesis import HealthCheck, Phase, given, settings

    cases = []

    @settings(
        max_examples=count,
        database=None,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def collect(case):
        cases.append(case)

    collect()
    return cases
