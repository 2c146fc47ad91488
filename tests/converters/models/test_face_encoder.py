"""TransFace files: the released pickle and our folder."""

import json

import numpy as np
import pytest

from fact_convert import dump_state, load_encoder, save_encoder
from fact_convert.io.torch_io import write_torch_file
from fact_convert.models.face_encoder import infer_encoder
from fact_convert.models.validation import encoder_shape
from fact_jax.models.transface import TransFaceConfig
from fact_jax.utils.errors import UserError


@pytest.fixture
def released(golden, tmp_path):
    """A pickle as the released ones are, and the configuration that it does not hold."""
    state, metadata = golden("transface", "state.")
    write_torch_file(tmp_path / "transface.pt", state)
    return tmp_path / "transface.pt", state, json.loads(metadata["config"])


def test_a_pickle_to_a_folder_and_back(released, same_bits, tmp_path):
    file, state, config = released
    encoder = load_encoder(file, config=config)
    save_encoder(encoder, tmp_path / "encoder")
    again = load_encoder(tmp_path / "encoder")
    assert again.config == encoder.config == TransFaceConfig.from_dict(config)
    same_bits(state, dump_state(again))


def test_the_shapes_say_all_but_the_heads(released):
    file, state, config = released
    shape = encoder_shape(state)
    # 36 of the golden model's 40 pixels are covered by patches; the rest leaves no trace.
    assert shape.pop("img_size") == 36
    assert shape.pop("num_heads") == 1
    assert shape.items() <= config.items()
    # Its heads are 4, where the public ones have 8.
    with pytest.raises(UserError, match="of width 32 do not tell its heads"):
        load_encoder(file)


@pytest.mark.parametrize(
    ("config", "dim", "depth"),
    [
        (TransFaceConfig.vit_t(), 256, 12),
        (TransFaceConfig.vit_s(), 512, 12),
        (TransFaceConfig(depth=24), 512, 24),
        (TransFaceConfig.vit_l(), 768, 24),
    ],
)
def test_public_sizes_are_recognised(config, dim, depth):
    shapes = {
        "pos_embed": (1, 144, dim),
        "patch_embed.proj.weight": (dim, 3, 9, 9),
        "feature.2.weight": (512, dim),
    } | {f"blocks.{i}.norm1.weight": (dim,) for i in range(depth)}
    state = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    found, note = infer_encoder(state)
    assert found == config.to_dict()
    assert "num_heads 8 taken" in note


def test_what_is_no_encoder(tmp_path):
    write_torch_file(tmp_path / "x.pt", {"weight": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"x\.pt: not a TransFace model \('pos_embed'"):
        load_encoder(tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_encoder(tmp_path)
