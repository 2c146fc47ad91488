"""The examples of docs/diffusers.md, as a reader runs them."""

import re
import sys
from pathlib import Path

import pytest
from diffusers.utils import dynamic_modules_utils

from fact_infer.cli.main import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def test_examples_of_diffusers(tmp_path, monkeypatch):
    """With the shipped miniature and a made-up person."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    for name in ("miniature", "infer"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert main(["portraits", "--people", "1", "--out", "photos"]) == 0
    text = (ROOT / "docs" / "diffusers.md").read_text()
    first, second, third = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(first, names)
    exec(second, names)
    assert names["picture"].size == names["images"][0].size
    models = {"BASE": "miniature/base", "ENCODER": "miniature/encoder"}
    models["ADAPTER"] = "miniature/adapter/adapter.safetensors"
    exec(third, names | models)
