"""The README's example runs as it stands there."""

import re
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]


def test_the_library_in_a_few_lines(files, tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"In your own diffusers code:\n\n```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "miniature").symlink_to(ROOT / "miniature")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    shutil.copy(files.photo, "photos/080000-0.png")
    shutil.copy(files.photo.with_suffix(".points.json"), "photos/080000-0.points.json")
    # Fewer steps take less time.
    code, count = re.subn("num_inference_steps=25", "num_inference_steps=2", code)
    assert count == 1
    names = {}
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), names)
    drawn = np.asarray(Image.open("portrait.png"))
    np.testing.assert_array_equal(drawn, names["picture"])
    # By an adapter that is silent the same noise becomes another picture.
    torch.manual_seed(0)
    with names["fact"].face(names["tokens"], scale=0.0):
        silent = names["pipe"](names["prompt"], num_inference_steps=2, guidance_scale=3).images[0]
    assert np.abs(drawn - np.asarray(silent, np.float32)).mean() > 1.0
