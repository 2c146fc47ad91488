"""The tables themselves: every place of every model has one name that we write."""

import dataclasses
import re

import pytest

from fact_convert.mapping import map_jax_path, map_torch_key
from fact_convert.rules.key_tables import TABLES
from fact_convert.weights import abstract_state, read_config

CONFIGS = {
    "unet": {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "vae": {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "clip_text": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    "transface": {"img_size": 40, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 4},
    "resampler": {"dim": 8, "depth": 2, "dim_head": 4, "heads": 2},
    "controlnet": {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    },
}


def paths_of(kind: str) -> list[str]:
    """Every parameter of a small model."""
    if kind != "adapter":
        return list(abstract_state(kind, read_config(kind, CONFIGS[kind]))[1])
    config = dataclasses.replace(read_config("unet", CONFIGS["unet"]), face_dim=8)
    return [path for path in abstract_state("unet", config)[1] if ".face." in path]


@pytest.mark.parametrize("kind", TABLES)
def test_names_turn_into_paths_and_back(kind):
    prefix = TABLES[kind].prefixes[0]
    paths = paths_of(kind)
    assert paths
    for path in paths:
        names = map_jax_path(kind, path, prefix)
        assert names, path
        assert not names[0].overrides, path
        for name in names:
            assert map_torch_key(kind, name.torch, prefix).jax == path


@pytest.mark.parametrize("kind", TABLES)
def test_placeholders_are_the_same_on_both_sides(kind):
    for rule in TABLES[kind].rules:
        assert re.findall(r"\{\w+\}", rule.torch) == re.findall(r"\{\w+\}", rule.jax), rule


@pytest.mark.parametrize("kind", TABLES)
def test_no_two_rules_name_the_same_tensor(kind):
    torch = [rule.torch for rule in TABLES[kind].rules]
    assert len(torch) == len(set(torch))


def test_ignored_keys_say_why():
    ignored = [entry for table in TABLES.values() for entry in table.ignored]
    assert len(ignored) == 2
    assert all(len(entry.reason) > 10 for entry in ignored)


@pytest.mark.parametrize(
    ("kind", "key", "path"),
    [
        ("unet", "conv_in.weight", "conv_in.kernel"),
        (
            "unet",
            "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0.bias",
            "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0.bias",
        ),
        (
            "unet",
            "mid_block.attentions.0.transformer_blocks.0.attn2.processor.ff.net.0.proj.weight",
            "mid_block.attentions.0.transformer_blocks.0.face.ff.net.0.proj.kernel",
        ),
        (
            "unet",
            "mid_block.attentions.0.transformer_blocks.0.attn2.processor.alpha_attn",
            "mid_block.attentions.0.transformer_blocks.0.face.alpha_attn",
        ),
        (
            "vae",
            "decoder.mid_block.attentions.0.proj_attn.weight",
            "decoder.mid_block.attentions.0.to_out.0.kernel",
        ),
        ("transface", "feature.3.running_var", "feature.3.var"),
        ("resampler", "layers.3.1.0.weight", "layers.3.1.0.scale"),
        ("unet", "up_blocks.x.resnets.0.norm1.weight", None),
        ("unet", "conv_in.weight.weight", None),
        ("resampler", "layers.3.1.2.weight", None),
    ],
)
def test_where_keys_go(kind, key, path):
    place = map_torch_key(kind, key, "")
    assert (place and place.jax) == path
