"""Folders of photos with points beside them."""

import json

import numpy as np
import pytest
from PIL import Image

from fact_jax.face import ARCFACE_TEMPLATE

POINTS = ARCFACE_TEMPLATE / 2 + (40, 10)


def noise(seed=0, shape=(80, 120, 3)):
    """Detail at every scale, so that pictures of two seeds are unlike."""
    rng = np.random.default_rng(seed)
    layers = [
        np.kron(rng.normal(0, 30, (-(-shape[0] // s), -(-shape[1] // s), 3)), np.ones((s, s, 1)))
        for s in (1, 4, 16, 32)
    ]
    whole = sum(layer[: shape[0], : shape[1]] for layer in layers)
    return np.clip(whole + 128, 0, 255).astype(np.uint8)


def write_photo(path, *, points=POINTS, mask=True, seed=0):
    """A landscape photo, 120 x 80, with a face to the right of the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed)).save(path)
    path.with_suffix(".json").write_text(json.dumps({"points": points.tolist()}))
    if mask:
        head = np.zeros((80, 120), np.uint8)
        head[5:75, 40:100] = 255
        Image.fromarray(head).save(path.with_suffix(".mask.png"))


def rejected(out):
    """Name -> (reason, detail) of what a build rejected."""
    lines = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    return {line["name"]: (line["reason"], line["detail"]) for line in lines}


@pytest.fixture(autouse=True)
def _no_detector(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
