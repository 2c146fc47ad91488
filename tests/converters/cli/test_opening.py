"""Files and folders of every layout, opened without being told what they are."""

import json
import shutil

import numpy as np
import pytest
import torch

from fact_convert.cli.opening import open_weights
from fact_convert.io.weight_files import read_weights
from fact_convert.models.pipeline import load_pipeline
from fact_jax.utils.errors import UserError

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "pytorch_model",
}


def states_of(weights) -> dict[str, np.ndarray]:
    """Every tensor of every kind under one name."""
    return {
        f"{kind}/{key}": a for kind, state in weights.states.items() for key, a in state.items()
    }


@pytest.fixture
def legacy_folder(pipeline_folder, tmp_path):
    """The pipeline with pickled weights, as folders were before safetensors."""
    folder = shutil.copytree(pipeline_folder, tmp_path / "legacy")
    for part, stem in STEMS.items():
        name = stem.removeprefix("pytorch_")
        state = read_weights(folder / part, name)
        torch.save({k: torch.from_numpy(v.copy()) for k, v in state.items()}, tmp_path / "x.bin")
        (folder / part / f"{name}.safetensors").unlink()
        shutil.move(tmp_path / "x.bin", folder / part / f"{stem}.bin")
    return folder


def test_a_legacy_folder(legacy_folder, pipeline_folder, same_bits):
    same_bits(states_of(open_weights(pipeline_folder)), states_of(open_weights(legacy_folder)))
    assert load_pipeline(legacy_folder).unet.config.block_out_channels == (8, 16)
    (legacy_folder / "unet" / f"{STEMS['unet']}.bin").rename(
        legacy_folder / "unet" / f"{STEMS['unet']}.fp16.bin"
    )
    with pytest.raises(UserError, match=r"no diffusion_pytorch_model\.bin.* of variant fp16"):
        open_weights(legacy_folder)


def test_legacy_shards(legacy_folder, pipeline_folder, same_bits):
    folder, stem = legacy_folder / "text_encoder", STEMS["text_encoder"]
    state = torch.load(folder / f"{stem}.bin", weights_only=True)
    (folder / f"{stem}.bin").unlink()
    where = {key: f"{stem}-0000{1 + i % 2}-of-00002.bin" for i, key in enumerate(state)}
    for name in set(where.values()):
        torch.save({key: state[key] for key in state if where[key] == name}, folder / name)
    index = folder / f"{stem}.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    same_bits(states_of(open_weights(pipeline_folder)), states_of(open_weights(legacy_folder)))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(where, next(iter(where.values())))}))
    with pytest.raises(UserError, match="does not fit its shards"):
        open_weights(legacy_folder)
