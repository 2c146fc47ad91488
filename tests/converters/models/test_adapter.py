"""Adapter files: the released checkpoint, our own, and attaching them to a base."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fact_convert import attach_adapter, dump_state, load_adapter, load_state, save_adapter
from fact_convert.io.safetensors_io import read_safetensors, write_safetensors
from fact_convert.io.torch_io import write_torch_file
from fact_convert.weights import parameters
from fact_jax.utils.errors import UserError

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture
def base(golden, unet_config):
    return load_state("unet", golden("unet_adapter", "unet.")[0], unet_config)


@pytest.fixture
def released(released_checkpoint, resampler_config):
    return load_adapter(released_checkpoint, resampler_config=resampler_config)


@pytest.fixture
def released_state(released_checkpoint):
    loaded = torch.load(released_checkpoint, weights_only=True)
    return {key: tensor.numpy().copy() for key, tensor in loaded.items()}


def test_the_released_checkpoint(released, released_state, same_bits):
    assert len(released.blocks) == 16
    assert released.face_dim == 24
    assert released.metadata == {}
    state = {key: array for key, array in released_state.items() if "attn2" in key}
    same_bits(state, released.state())
    own = {f"local_fac_prj.{key}": array for key, array in dump_state(released.resampler).items()}
    same_bits({k: v for k, v in released_state.items() if k not in state}, own)


def test_heads_that_nothing_says_are_asked_for(released_checkpoint):
    with pytest.raises(UserError, match=r"how wide a head of its resampler is \(24 channels"):
        load_adapter(released_checkpoint)


@pytest.mark.heavy
def test_attached_to_its_base(base, released, golden, unet_config, same_bits):
    unet = attach_adapter(base, released)
    assert unet.config == dataclasses.replace(base.config, face_dim=24)
    assert base.config.face_dim is None
    same_bits(golden("unet_adapter", "unet.")[0] | released.state(), dump_state(unet))
    same_bits(golden("unet_adapter", "unet.")[0], dump_state(base))
    wanted = load_state("unet", dump_state(unet), unet_config)
    for one, other in zip(parameters(unet).values(), parameters(wanted).values(), strict=True):
        assert np.array_equal(one.get_value(), other.get_value())


def test_attaching_shares_the_base(base, released):
    unet = attach_adapter(base, released)
    kernel = unet.conv_in.kernel.get_value()
    assert kernel.unsafe_buffer_pointer() == base.conv_in.kernel.get_value().unsafe_buffer_pointer()


def test_a_second_adapter_is_refused(base, released):
    with pytest.raises(UserError, match="has an adapter already"):
        attach_adapter(attach_adapter(base, released), released)


def test_adapter_and_base_have_one_precision_and_gates_float32(golden, unet_config, released):
    base = load_state("unet", golden("unet_adapter", "unet.")[0], unet_config, dtype=jnp.bfloat16)
    unet = attach_adapter(base, released)
    values = [var.get_value() for var in parameters(unet).values()]
    assert {value.dtype for value in values if value.ndim} == {np.dtype("bfloat16")}
    assert {value.dtype for value in values if not value.ndim} == {np.dtype("float32")}


def test_a_norm2_of_its_own_replaces_the_bases_and_is_written_back(
    base, released_state, resampler_config, golden, same_bits, tmp_path, caplog
):
    key = f"{BLOCK}.attn2.processor.ln.weight"
    released_state[key][2] += 0.5
    write_torch_file(tmp_path / "x.ckpt", released_state)
    adapter = load_adapter(tmp_path / "x.ckpt", resampler_config=resampler_config)
    unet = attach_adapter(base, adapter)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert key in caplog.text
    norm = unet.down_blocks[0].attentions[0].transformer_blocks[0].norm2
    assert np.array_equal(norm.scale[...], released_state[key])
    same_bits(golden("unet_adapter", "unet.")[0] | adapter.state(), dump_state(unet))
    save_adapter(unet, adapter.resampler, tmp_path / "again.safetensors")
    same_bits(released_state, read_safetensors(tmp_path / "again.safetensors")[0])


def test_our_file_round_trips(base, released, released_state, same_bits, tmp_path):
    file = tmp_path / "adapter.safetensors"
    unet = attach_adapter(base, released)
    about = {"step": 1200, "encoder": "abc", "extra": [1, 2]}
    save_adapter(unet, released.resampler, file, about)
    state, text = read_safetensors(file)
    same_bits(released_state, state)
    assert (text["format"], text["version"], text["step"]) == ("fact-adapter", "1", "1200")
    assert text["encoder"] == "abc"
    assert json.loads(text["config"])["unet"] == {
        "block_out_channels": [16, 32, 32, 32],
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    }
    again = load_adapter(file)
    assert again.metadata["step"] == 1200
    assert again.resampler.config == released.resampler.config
    same_bits(released.state(), again.state())


def test_an_adapter_that_was_never_loaded_is_saved(base, released, tmp_path):
    unet = attach_adapter(base, released)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.face.alpha_attn[...] = jnp.asarray(0.125)
    del unet.origin
    save_adapter(unet, released.resampler, tmp_path / "adapter.safetensors")
    again = load_adapter(tmp_path / "adapter.safetensors")
    assert again.blocks[BLOCK]["alpha_attn"] == np.float32(0.125)
    # A copy of the base's norm2 is only written where a released file had one.
    assert "ln.weight" not in again.blocks[BLOCK]


def test_an_adapter_for_another_base(released, peer_state):
    other = load_state("unet", *peer_state("unet"))
    with pytest.raises(UserError, match="is for another base model") as caught:
        attach_adapter(other, released)
    assert "made for 16 transformer blocks" in str(caught.value)
    assert "this UNet has 4 transformer blocks" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_with_a_part_missing(released_state, resampler_config, tmp_path):
    gone = f"{BLOCK}.attn2.processor.ff.net.2.bias"
    del released_state[gone]
    write_torch_file(tmp_path / "x.ckpt", released_state)
    with pytest.raises(UserError, match=rf"x\.ckpt: .*1 missing \({gone}\)"):
        load_adapter(tmp_path / "x.ckpt", resampler_config=resampler_config)


def test_what_is_no_adapter(released_state, resampler_config, golden, tmp_path):
    file = tmp_path / "x.safetensors"
    write_safetensors(file, golden("unet_adapter", "unet.")[0], {})
    with pytest.raises(UserError, match=r"x\.safetensors: not a FACT adapter"):
        load_adapter(file)
    write_safetensors(file, released_state | {"surplus": np.zeros(1)}, {})
    with pytest.raises(UserError, match=r"1 unexpected \(surplus\)"):
        load_adapter(file)
    del released_state["local_fac_prj.proj_out.bias"]
    write_safetensors(file, released_state, {})
    with pytest.raises(UserError, match=r"x\.safetensors: .*1 missing \(proj_out\.bias\)"):
        load_adapter(file, resampler_config=resampler_config)


def test_a_resampler_that_does_not_fit_the_blocks(released_state, resampler_config, tmp_path):
    key = f"{BLOCK}.attn2.processor.linear.weight"
    released_state[key] = released_state[key][:, :8]
    write_safetensors(tmp_path / "x.safetensors", released_state, {})
    with pytest.raises(UserError, match="does not take face tokens of width 24"):
        load_adapter(tmp_path / "x.safetensors", resampler_config=resampler_config)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"format": "something"}, "says that it is 'something'"),
        ({"version": "9"}, "version 9"),
        ({"config": "{"}, "'config' is not JSON"),
        ({"config": "[]"}, "'config' is not an object"),
    ],
)
def test_bad_metadata(released_state, tmp_path, metadata, reason):
    write_safetensors(tmp_path / "x.safetensors", released_state, metadata)
    with pytest.raises(UserError, match=reason):
        load_adapter(tmp_path / "x.safetensors")


def test_saving_what_has_no_adapter(base, released, tmp_path):
    with pytest.raises(UserError, match="no adapter"):
        save_adapter(base, released.resampler, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        save_adapter(attach_adapter(base, released), released.resampler, tmp_path / "x.ckpt")
