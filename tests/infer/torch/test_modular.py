"""FACT as blocks of Modular Diffusers, opened from the folder as a user opens it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ModularPipeline, StableDiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fact_infer import with_fact
from fact_infer.torch.loading import FactAdapter
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "infer" / "modular_diffusers"


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """diffusers copies the code of a folder to its cache and imports it from there."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield ModularPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    for name in set(sys.modules) - before:
        if name.startswith("diffusers_modules"):
            del sys.modules[name]


@pytest.fixture
def pipe(opened, files):
    opened.load_components(
        # It takes text alone.
        pretrained_model_name_or_path={
            "fact_adapter": str(files.adapter),
            "default": str(files.base),
        },
        image_encoder={"fact_adapter": files.encoder},
    )
    return opened


CALL = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_picture_is_that_of_the_pipeline(pipe, files):
    """To the bit, by photo, by embeddings and by a state that goes on."""
    stock = with_fact(StableDiffusionPipeline).from_pretrained(files.base, safety_checker=None)
    stock.load_fact_adapter(files.adapter, image_encoder=files.encoder)
    stock.set_progress_bar_config(disable=True)
    stock.set_fact_adapter_scale({"down": 0.5, "up": 1.0})
    settings = {"fact_adapter_kwargs": {"stop": 0.5}, "generator": seeded()}
    wanted = stock("a man", fact_adapter_image=files.photo, **settings, **CALL).images
    scale = {"fact_adapter_scale": {"down": 0.5, "up": 1.0}, "prompt": "a man"} | settings
    scale["generator"] = seeded()
    state = pipe(fact_adapter_image=files.photo, **scale, **CALL)
    np.testing.assert_array_equal(state.get("images"), wanted)
    tokens = state.get("fact_adapter_image_embeds")
    scale["generator"] = seeded()
    again = pipe(fact_adapter_image_embeds=tokens, output="images", **scale, **CALL)
    np.testing.assert_array_equal(again, wanted)


def test_people_and_pictures_in_memory(pipe, files):
    from PIL import Image

    from tests.infer.conftest import POINTS

    masks = [np.zeros((8, 8), np.float32) for _ in range(2)]
    masks[0][:, :4], masks[1][:, 4:] = 1.0, 1.0
    settings = {"prompt": "a man", "fact_adapter_masks": masks, "output": "images"} | CALL
    paths = [[files.photo], [files.other_photo]]
    one = pipe(fact_adapter_image=paths, generator=seeded(), **settings)
    pictures = [[Image.open(path) for path in person] for person in paths]
    points = [[POINTS], [POINTS]]
    two = pipe(
        fact_adapter_image=pictures, fact_adapter_points=points, generator=seeded(), **settings
    )
    np.testing.assert_array_equal(one, two)


def test_blocks_alone(pipe, files):
    """The face's block is a program of its own; one that lacks its parts says so."""
    face = pipe.blocks.sub_blocks["face"].init_pipeline()
    with pytest.raises(ValueError, match=r"no unet, .*fact_adapter: call load_components first"):
        face(fact_adapter_image=files.photo)
    face.update_components(**pipe.components)
    tokens = face(fact_adapter_image=files.photo, output="fact_adapter_image_embeds")
    assert tokens[0].shape == (1, 5, 20)
    with pytest.raises(ValueError, match="one of the two"):
        face()


def test_another_adapter_takes_the_place_of_the_first(pipe, files, tmp_path):
    """By ``update_components``: the picture is that of the new one."""
    settings = {"prompt": "a man", "fact_adapter_image": files.photo, "output": "images"} | CALL
    first = pipe(generator=seeded(), **settings)
    state = load_file(files.adapter)
    with safe_open(files.adapter, "np") as opened:
        about = {key: opened.metadata()[key] for key in ("format", "version", "config")}
    silent = {
        key: np.zeros_like(value) if "alpha" in key else value for key, value in state.items()
    }
    save_file(silent, tmp_path / "silent.safetensors", about)
    other = FactAdapter.from_pretrained(
        tmp_path / "silent.safetensors", image_encoder=files.encoder
    )
    pipe.update_components(fact_adapter=other)
    second = pipe(generator=seeded(), **settings)
    np.testing.assert_array_equal(
        second, pipe(generator=seeded(), fact_adapter_scale=0.0, **settings)
    )
    assert np.abs(first - second).mean() > 0.01
    with pytest.raises(UserError, match="at least one photo"):
        pipe(**(settings | {"fact_adapter_image": []}))


def test_the_index_names_what_is_shipped(opened, monkeypatch):
    index = json.loads((FOLDER / "modular_model_index.json").read_text())
    parts = {name: entry[2] for name, entry in index.items() if isinstance(entry, list)}
    assert set(parts) == set(opened.component_names)
    for part in parts.values():
        assert (ROOT / part["pretrained_model_name_or_path"] / part["subfolder"]).exists()
    # Its encoder lies beside the adapter's folder.
    found = FactAdapter.from_pretrained(ROOT / "miniature" / "adapter" / "adapter.safetensors")
    assert found.files.encoder == ROOT / "miniature" / "encoder"
    assert "a photo" in opened.doc
