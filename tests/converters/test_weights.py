"""load_state and dump_state: bit-exact both ways, strict both ways."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

from fact_convert import dump_state, load_state
from fact_convert.mapping import match_module
from fact_convert.models.validation import check_fits
from fact_convert.weights import parameters
from fact_jax.models.resampler import Resampler, ResamplerConfig
from fact_jax.models.transface import TransFaceConfig
from fact_jax.utils.errors import UserError

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LN = f"{BLOCK}.attn2.processor.ln.weight"


def dtypes(module: nnx.Module) -> set[np.dtype]:
    return {np.dtype(var.get_value().dtype) for var in parameters(module).values()}


@pytest.mark.parametrize("kind", ["unet", "vae", "clip_text"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_peers_round_trip(peer_state, same_bits, kind, dtype):
    state, config = peer_state(kind)
    state = {key: array.astype(np.dtype(dtype)) for key, array in state.items()}
    module = load_state(kind, state, config)
    assert dtypes(module) == {np.dtype(np.float32)}
    dumped = dump_state(module)
    assert list(dumped) == list(state)
    same_bits(state, dumped)


@pytest.mark.parametrize(
    ("kind", "file", "prefix", "key"),
    [
        ("transface", "transface", "state.", "config"),
        ("resampler", "resampler", "state.", "config"),
        ("unet", "unet_adapter", "unet.", "unet_config"),
    ],
)
def test_golden_states_round_trip(golden, same_bits, kind, file, prefix, key):
    state, metadata = golden(file, prefix)
    same_bits(state, dump_state(load_state(kind, state, json.loads(metadata[key]))))


def test_values_land_where_they_belong(peer_state):
    state, config = peer_state("unet")
    unet = load_state("unet", state, config)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    weight = state[f"{BLOCK}.ff.net.0.proj.weight"]
    assert np.array_equal(block.ff.net[0].proj.kernel[...], weight.T)
    conv = state["conv_in.weight"]
    assert unet.conv_in.kernel[2, 0, 1, 5] == conv[5, 1, 2, 0]


def test_a_loaded_module_does_not_see_later_changes_of_the_source(peer_state):
    state, config = peer_state("clip_text")
    model = load_state("clip_text", state, config)
    before = dump_state(model)["final_layer_norm.weight"].copy()
    state["final_layer_norm.weight"][:] = 7
    assert np.array_equal(dump_state(model)["final_layer_norm.weight"], before)


def test_dtype_can_be_asked_for(peer_state):
    state, config = peer_state("clip_text")
    model = load_state("clip_text", state, config, dtype=jnp.bfloat16)
    assert dtypes(model) == {np.dtype(ml_dtypes.bfloat16)}


def test_adapter_keys_give_an_adapted_unet(golden, unet_config, same_bits):
    state = golden("unet_adapter", "unet.")[0] | golden("unet_adapter", "adapter.")[0]
    unet = load_state("unet", state, unet_config)
    assert unet.config.face_dim == 24
    same_bits(state, dump_state(unet))
    linear = state[f"{BLOCK}.attn2.processor.linear.weight"]
    face = unet.down_blocks[0].attentions[0].transformer_blocks[0].face
    assert np.array_equal(face.linear.kernel[...], linear.T.astype(np.float32))


@pytest.fixture
def doubled_state(golden, released_checkpoint):
    """A base with the released adapter, which holds the base's norm2 a second time."""
    released = torch.load(released_checkpoint, weights_only=True)
    adapter = {key: value.numpy().copy() for key, value in released.items() if "attn2" in key}
    return golden("unet_adapter", "unet.")[0] | adapter


def test_a_second_norm2_that_differs_wins(doubled_state, unet_config, same_bits, caplog):
    doubled_state[LN][3] += 0.25
    unet = load_state("unet", doubled_state, unet_config)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.text.rstrip().endswith(f"as in the released code: {LN}")
    norm = unet.down_blocks[0].attentions[0].transformer_blocks[0].norm2
    assert np.array_equal(norm.scale[...], doubled_state[LN])
    same_bits(doubled_state, dump_state(unet))


def test_a_second_norm2_that_is_the_same_is_only_mentioned(
    doubled_state, unet_config, same_bits, caplog
):
    caplog.set_level(logging.INFO)
    same_bits(doubled_state, dump_state(load_state("unet", doubled_state, unet_config)))
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "32 tensors repeat" in caplog.text


def old_names(state: dict, conv_shaped: bool) -> dict:
    """A VAE state as diffusers wrote it before 0.17, or with 1 x 1 convolutions for matrices."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, array in state.items():
        for new, old in names.items():
            if f"attentions.0.{new}." in key:
                key = key.replace(new, old)
                array = array[:, :, None, None] if conv_shaped and array.ndim == 2 else array
        renamed[key] = array
    return renamed


@pytest.mark.parametrize("conv_shaped", [False, True])
def test_old_vae_attention(peer_state, same_bits, conv_shaped):
    state, config = peer_state("vae")
    old = old_names(state, conv_shaped)
    assert set(old) != set(state)
    vae, reference = load_state("vae", old, config), load_state("vae", state, config)
    same_bits(old, dump_state(vae))
    pairs = zip(parameters(vae).values(), parameters(reference).values(), strict=True)
    assert all(np.array_equal(a.get_value(), b.get_value()) for a, b in pairs)


def test_the_same_weight_under_two_names_is_refused(peer_state):
    state, config = peer_state("vae")
    key = "encoder.mid_block.attentions.0.query.weight"
    with pytest.raises(UserError, match=f"to_q.weight and {key} are the same weight twice"):
        load_state("vae", state | {key: np.zeros((16, 16), np.float32)}, config)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_clip_text_with_and_without_prefix_and_position_ids(peer_state, same_bits, prefix):
    state, config = peer_state("clip_text")
    state = {prefix + key.removeprefix("text_model."): array for key, array in state.items()}
    state[f"{prefix}embeddings.position_ids"] = np.arange(77)[None]
    same_bits(state, dump_state(load_state("clip_text", state, config)))


def test_resampler_under_its_released_prefix(golden, resampler_config, same_bits):
    state, _ = golden("resampler", "state.")
    state = {f"local_fac_prj.{key}": array for key, array in state.items()}
    same_bits(state, dump_state(load_state("resampler", state, resampler_config)))


def test_origin_survives_split_and_merge(golden, same_bits):
    state, metadata = golden("transface", "state.")
    module = load_state("transface", state, json.loads(metadata["config"]))
    graph, params = nnx.split(module)
    hash(graph)
    copy = nnx.merge(graph, jax.tree.map(lambda x: x, params))
    same_bits(state, dump_state(copy))
    assert jax.tree.all(jax.tree.map(lambda leaf: isinstance(leaf, jax.Array), params))


def test_what_half_precision_cannot_hold_after_training_stays_single(peer_state):
    state, config = peer_state("clip_text")
    state = {key: array.astype(np.float16) for key, array in state.items()}
    model = load_state("clip_text", state, config)
    model.final_layer_norm.scale[...] = model.final_layer_norm.scale[...] + 1e-6
    dumped = dump_state(model)
    changed = {key for key, array in dumped.items() if array.dtype == np.float32}
    assert changed == {"final_layer_norm.weight"}
    assert dumped["final_layer_norm.weight"].min() > 1


def test_a_new_module_dumps_under_the_peers_names(resampler_config):
    config = ResamplerConfig.from_dict(resampler_config)
    state = dump_state(Resampler(config, rngs=nnx.Rngs(0)))
    assert state["layers.1.0.to_kv.weight"].shape == (48, 32)
    again = load_state("resampler", state, config)
    tokens = jnp.ones((1, 3, 32))
    assert np.array_equal(Resampler(config, rngs=nnx.Rngs(0))(tokens), again(tokens))


def test_everything_wrong_is_said_at_once(peer_state):
    state, config = peer_state("unet")
    bad = dict(state)
    del bad["conv_out.bias"], bad["mid_block.resnets.1.conv2.weight"]
    bad["surplus.weight"] = np.zeros(3, np.float32)
    bad["conv_in.weight"] = np.zeros((8, 4, 3, 5), np.float32)
    bad["conv_in.bias"] = np.zeros(8, np.int32)
    with pytest.raises(UserError) as caught:
        load_state("unet", bad, config)
    message = str(caught.value)
    assert "2 missing (conv_out.bias, mid_block.resnets.1.conv2.weight)" in message
    assert "1 unexpected (surplus.weight)" in message
    assert "1 misshapen (conv_in.weight: is (8, 4, 3, 5), wanted (8, 4, 3, 3))" in message
    assert "1 unusable (conv_in.bias: int32, wanted floating point)" in message
    assert "\n" not in message


def test_everything_wrong_is_said_at_once_in_the_other_direction(golden):
    state, metadata = golden("transface", "state.")
    module = load_state("transface", state, json.loads(metadata["config"]))
    module.norm.scale = nnx.Param(jnp.ones(5))
    module.extra = nnx.Param(jnp.ones(2))
    del module.mask_token
    with pytest.raises(UserError) as caught:
        dump_state(module)
    message = str(caught.value)
    assert "1 missing (mask_token)" in message
    assert "1 unexpected (extra)" in message
    assert "1 misshapen (norm.scale: is (5,), wanted (32,))" in message


def test_a_path_without_a_rule_is_refused():
    with pytest.raises(UserError, match=r"1 unexpected \(nobody.knows\)"):
        match_module("unet", {"nobody.knows": (1,)}, {"nobody.knows": (1,)}, "")


def test_half_an_adapter_is_refused(golden, unet_config):
    state = golden("unet_adapter", "unet.")[0]
    adapter = golden("unet_adapter", "adapter.")[0]
    gone = [key for key in adapter if "mid_block" in key]
    with pytest.raises(UserError) as caught:
        load_state("unet", state | {k: v for k, v in adapter.items() if k not in gone}, unet_config)
    assert f"{len(gone)} missing" in str(caught.value)
    assert sum(key in str(caught.value) for key in gone) == 10


def test_weights_of_another_kind_are_named(peer_state):
    state, _ = peer_state("unet")
    with pytest.raises(UserError, match=r"^these are unet weights, but vae weights were wanted$"):
        load_state("vae", state, peer_state("vae")[1])


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="known: unet, vae"):
        load_state("lora", {}, {})
    with pytest.raises(UserError, match="Linear is none of"):
        dump_state(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))


def test_double_precision_only_if_single_can_hold_it(golden, resampler_config, same_bits):
    state, _ = golden("resampler", "state.")
    state = {key: array.astype(np.float64) for key, array in state.items()}
    same_bits(state, dump_state(load_state("resampler", state, resampler_config)))
    state["latents"][0, 0, 0] = 0.1
    with pytest.raises(UserError, match="latents: float64 that float32 cannot hold exactly"):
        load_state("resampler", state, resampler_config)


def test_special_numbers_survive(golden, resampler_config, same_bits):
    state, _ = golden("resampler", "state.")
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        tiny = ml_dtypes.finfo(dtype).smallest_subnormal
        state["norm_out.bias"] = np.array([np.nan, np.inf, -np.inf, -0.0, tiny] + [0] * 19, dtype)
        same_bits(state, dump_state(load_state("resampler", state, resampler_config)))


def test_configurations_that_cannot_be(peer_state, golden):
    state, config = peer_state("unet")
    with pytest.raises(UserError, match="class_embed_type='timestep'"):
        load_state("unet", state, config | {"class_embed_type": "timestep"})
    for odd in ({"layers_per_block": [1, 2]}, {"sample_size": {}}, {"block_out_channels": []}):
        with pytest.raises(UserError, match="unet"):
            load_state("unet", state, config | odd)
    with pytest.raises(UserError, match="not a dictionary"):
        load_state("unet", state, None)
    with pytest.raises(UserError, match="transface"):
        load_state("transface", golden("transface", "state.")[0], {"patch_size": "nine"})


def test_our_own_config_and_harmless_extra_keys_do(golden, same_bits):
    state, metadata = golden("transface", "state.")
    config = json.loads(metadata["config"])
    own = TransFaceConfig.from_dict(config)
    assert dataclasses.asdict(own).items() <= config.items()
    same_bits(state, dump_state(load_state("transface", state, own)))
    same_bits(state, dump_state(load_state("transface", state, config | {"_name_or_path": "x"})))


def test_batch_statistics_are_statistics(golden):
    state, metadata = golden("transface", "state.")
    module = load_state("transface", state, json.loads(metadata["config"]))
    statistics = nnx.state(module, nnx.BatchStat)
    assert len(jax.tree.leaves(statistics)) == 4
    assert np.array_equal(module.feature[1].var[...], state["feature.1.running_var"].astype("f4"))


@pytest.mark.parametrize(("key", "value"), [("in_channels", 10**400), ("out_channels", 2**62)])
def test_a_configuration_of_huge_numbers(key, value, peer_state):
    state, config = peer_state("unet")
    with pytest.raises(UserError) as caught:
        check_fits("unet", state, {**config, key: value})
    assert "\n" not in str(caught.value)
