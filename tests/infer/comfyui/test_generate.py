"""The node that draws by our own pipeline: the command line's bits."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fact_infer.cli.main import main
from fact_jax.face import ASTRONAUT_POINTS
from fact_jax.utils.errors import UserError
from tests.infer.comfyui import stub
from tests.infer.service.conftest import MINIATURE, OPERATOR, astronaut  # noqa: F401

pytestmark = pytest.mark.heavy
ASKED = {
    "base": "base",
    "adapter": "adapter/adapter.safetensors",
    "encoder": "encoder/model.safetensors",
    "backend": "torch",
    "precision": "float32",
    "prompt": "a portrait of a smiling person wearing a red shirt",
    "negative": "blurred",
    "seed": 7,
    "count": 2,
    "sampler": "ddim",
    "steps": 3,
    "guidance": 3.0,
    "face_scale": 0.8,
    "width": 0,
    "height": 0,
    "points": ASTRONAUT_POINTS.read_text(),
}


@pytest.fixture
def node(comfy):
    """With the miniature in ``models/fact``."""
    folders = sys.modules["folder_paths"]
    before = folders.get_full_path_or_raise("fact", "")
    folders.add_model_folder_path("fact", str(MINIATURE))
    yield comfy.nodes._own_pipeline()[0]
    folders.add_model_folder_path("fact", before)


def saved(images):
    """The bytes that ComfyUI's own SaveImage writes, by its arithmetic."""
    return [np.clip(255.0 * image.cpu().numpy(), 0, 255).astype(np.uint8) for image in images]


def command_line(out, *words, backend="torch"):
    words = ["generate", *words, "--base", OPERATOR["base"], "--backend", backend, "--out", out]
    words += ["--prompt", ASKED["prompt"], "--negative", "blurred", "--guidance", 3, "--seed", 7]
    words += ["--steps", 3, "--sampler", "ddim"]
    assert main([str(word) for word in words]) == 0
    return [np.asarray(Image.open(path)) for path in sorted(out.iterdir())]


def test_every_byte_passes_through_a_picture_of_floats():
    values = torch.arange(256)
    np.testing.assert_array_equal(saved([values.float() / 255.0])[0], values)


def test_the_bits_of_the_command_line(node, astronaut, tmp_path):  # noqa: F811
    face = ["--adapter", OPERATOR["adapter"], "--encoder", OPERATOR["encoder"]]
    face += ["--photo", astronaut, "--face-scale", 0.8]
    wanted = command_line(tmp_path / "two", *face, "--count", 2)
    photo = torch.from_numpy(np.asarray(Image.open(astronaut)) / np.float32(255))[None]
    with torch.inference_mode():  # as ComfyUI runs its nodes
        (images,) = node.execute(**ASKED, image=photo).args
    assert images.dtype == torch.float32
    np.testing.assert_array_equal(saved(images), wanted)
    bar = stub.ProgressBar.made[-1]
    assert bar.current == bar.total == 3
    # A head mask of one's own is that of --mask.
    mask = np.zeros((512, 512), np.uint8)
    mask[40:200, 140:300] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    wanted = command_line(tmp_path / "masked", *face, "--mask", tmp_path / "mask.png")
    head = torch.from_numpy(mask / np.float32(255))[None]
    (images,) = node.execute(**ASKED | {"count": 1}, image=photo, head_mask=head).args
    np.testing.assert_array_equal(saved(images), wanted)


@pytest.mark.parametrize("backend", ["torch", pytest.param("flax", marks=pytest.mark.slow)])
def test_the_base_alone(node, backend, tmp_path):
    wanted = command_line(tmp_path / "alone", "--width", 32, backend=backend)
    (images,) = node.execute(**ASKED | {"count": 1, "width": 32, "backend": backend}).args
    np.testing.assert_array_equal(saved(images), wanted)


def test_the_models_are_those_of_the_folder(node):
    base, adapter, *_ = node.define_schema().inputs
    assert base.said["options"] == ["base"]
    assert "adapter/adapter.safetensors" in adapter.said["options"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "x" * 5000}, "at most 4,000 characters"),
        ({"points": "[[1, 2]]"}, "five points"),
        ({"points": json.dumps([[1, 2]] * 5)}, "mirrored or out of order"),
        ({"points": "[[90, 9], [99, 9], [95, 15], [91, 20], [99, 20]]"}, "^photo0.points.json: "),
        ({"width": 33}, "multiple of"),
    ],
)
def test_wrong_settings_are_one_sentence(node, changes, message):
    photo = torch.zeros((1, 64, 64, 3))
    with pytest.raises((UserError, ValueError), match=message):
        node.execute(**ASKED | changes, image=photo)


def test_a_black_mask_is_refused(node):
    with pytest.raises(ValueError, match="mask is black"):
        node.execute(**ASKED, image=torch.ones((1, 64, 64, 3)), head_mask=torch.zeros((1, 64, 64)))


def test_a_cancelled_prompt_ends_between_two_steps(node, comfy, monkeypatch):
    class InterruptedError(Exception): ...

    def interrupted():
        raise InterruptedError

    name = "throw_exception_if_processing_interrupted"
    monkeypatch.setattr(comfy.management, name, interrupted)
    with pytest.raises(InterruptedError):
        node.execute(**ASKED)
    assert stub.ProgressBar.made[-1].current == 0
