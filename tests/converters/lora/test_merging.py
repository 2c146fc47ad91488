"""LoRA files of every layout merged into a base, against diffusers and peft."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from fact_convert.cli.inspection import summary
from fact_convert.cli.opening import open_weights
from fact_convert.lora import add_lora, merge_lora, read_lora
from fact_convert.weights import dump_state, load_state
from fact_jax.utils.errors import UserError
from tests.pipelines import pndm_scheduler, small_parts

ATTENTION = "down_blocks.0.attentions.1.transformer_blocks.0.attn2"


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def saved(path, state, metadata=None):
    save_file({key: np.ascontiguousarray(array) for key, array in state.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def parts():
    """A UNet of two levels with two layers each, as the original block names want it."""
    import torch

    torch.manual_seed(0)
    return small_parts(vocab_size=60, special=(0, 1), unet={"layers_per_block": 2})


@pytest.fixture(scope="module")
def base(parts):
    """The states of UNet and text encoder by kind."""
    kinds = {"unet": "unet", "clip_text": "text_encoder"}
    return {
        kind: {key: tensor.numpy().copy() for key, tensor in parts[name].state_dict().items()}
        for kind, name in kinds.items()
    }


def kohya(base, rank: int = 3) -> dict[str, np.ndarray]:
    """A LoRA of every linear layer and convolution in kohya's layout."""
    state = {}
    matrices = [
        (prefix, key, array)
        for prefix, kind in (("lora_unet_", "unet"), ("lora_te_", "clip_text"))
        for key, array in base[kind].items()
        if array.ndim > 1 and "embedding.weight" not in key
    ]
    for seed, (prefix, key, array) in enumerate(matrices):
        words = key.removesuffix(".weight")
        words = words if prefix == "lora_unet_" or "text_model" in words else f"text_model.{words}"
        name = prefix + words.replace(".", "_")
        outer, inner, *kernel = array.shape
        ones = (1,) * len(kernel)
        state[f"{name}.lora_down.weight"] = normal(2 * seed, rank, inner, *kernel) / 4
        state[f"{name}.lora_up.weight"] = normal(2 * seed + 1, outer, rank, *ones) / 4
        # One alpha for all: of several, diffusers 0.42 drops those of the attention layers.
        state[f"{name}.alpha"] = np.array(2.0, np.float32)
    return state


def in_diffusers(parts, file, scale: float) -> dict[str, dict[str, np.ndarray]]:
    """What diffusers makes of the same file in copies of the same models."""
    import copy

    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        **copy.deepcopy(parts),
        tokenizer=None,
        scheduler=pndm_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # Told the configuration, diffusers knows the original block names too.
    pipe.load_lora_weights(file, unet_config=pipe.unet.config)
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    models = {"unet": pipe.unet, "clip_text": pipe.text_encoder}
    return {
        kind: {key: tensor.numpy() for key, tensor in model.state_dict().items()}
        for kind, model in models.items()
    }


def assert_same(ours, theirs, base):
    """The same numbers, and every matrix has moved."""
    for kind in base:
        assert set(ours[kind]) == set(theirs[kind])
        for key, array in ours[kind].items():
            np.testing.assert_allclose(array, theirs[kind][key], rtol=0, atol=1e-5, err_msg=key)
    return [
        f"{kind}/{key}"
        for kind in base
        for key, array in base[kind].items()
        if np.abs(np.asarray(ours[kind][key]) - array).max() > 1e-3
    ]


def test_kohya_as_diffusers(parts, base, tmp_path):
    pytest.importorskip("peft")
    state = kohya(base)
    file = saved(tmp_path / "kohya.safetensors", state)
    ours = merge_lora(base, read_lora(file), 0.7)
    moved = assert_same(ours, in_diffusers(parts, file, 0.7), base)
    assert len(moved) == len(state) // 3


def test_original_block_names_as_diffusers(parts, base, tmp_path):
    """kohya's files of models in the original layout: attention and feed-forward layers."""
    pytest.importorskip("peft")
    renamed = {
        "down_blocks_0_attentions_1_": "input_blocks_2_1_",
        "mid_block_attentions_0_": "middle_block_1_",
        "up_blocks_1_attentions_2_": "output_blocks_5_1_",
    }
    state = {
        f"lora_unet_{theirs}{key.split(ours)[1]}": array
        for key, array in kohya(base).items()
        for ours, theirs in renamed.items()
        if f"lora_unet_{ours}" in key
    }
    file = saved(tmp_path / "original.safetensors", state)
    lora = read_lora(file)
    assert len(lora.layers) == len(state) // 3 == 36
    assert len(assert_same(merge_lora(base, lora, 1.0), in_diffusers(parts, file, 1.0), base)) == 36


@pytest.mark.parametrize(
    ("flat", "key"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_7_0_skip_connection", "down_blocks.2.resnets.0.conv_shortcut"),
        ("input_blocks_11_0_emb_layers_1", "down_blocks.3.resnets.1.time_emb_proj"),
        ("middle_block_2_in_layers_2", "mid_block.resnets.1.conv1"),
        ("output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_8_2_conv", "up_blocks.2.upsamplers.0.conv"),
        ("output_blocks_10_0_out_layers_3", "up_blocks.3.resnets.1.conv2"),
        (
            "output_blocks_11_1_transformer_blocks_0_ff_net_0_proj",
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
        ),
        ("time_embed_2", "time_embedding.linear_2"),
        ("out_2", "conv_out"),
    ],
)
def test_original_names(flat, key, tmp_path):
    state = {f"lora_unet_{flat}.lora_down.weight": normal(0, 2, 6)}
    state[f"lora_unet_{flat}.lora_up.weight"] = normal(1, 5, 2)
    (layer,) = read_lora(saved(tmp_path / "one.safetensors", state)).layers
    assert (layer.kind, layer.key, layer.shape) == ("unet", f"{key}.weight", (5, 6))
    np.testing.assert_allclose(layer.delta(), normal(1, 5, 2) @ normal(0, 2, 6), atol=1e-5)


def test_peft_as_diffusers(parts, base, tmp_path):
    """What diffusers saves of trained layers, with alpha in the metadata; two ranks of alpha."""
    peft = pytest.importorskip("peft")
    import copy

    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    models = copy.deepcopy(parts)
    unet = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        alpha_pattern={f"{ATTENTION}.to_q": 2},
        target_modules=["to_q", "to_v", "to_out.0", "conv1", "proj_in"],
    )
    text = peft.LoraConfig(r=3, lora_alpha=1, target_modules=["q_proj", "out_proj", "fc1"])
    models["unet"].add_adapter(unet)
    models["text_encoder"].add_adapter(text)
    layers = {}
    for name in ("unet", "text_encoder"):
        found = peft.get_peft_model_state_dict(models[name])
        layers[name] = {key: torch.randn_like(tensor) / 4 for key, tensor in found.items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=convert_state_dict_to_diffusers(layers["text_encoder"]),
        unet_lora_adapter_metadata=unet.to_dict(),
        text_encoder_lora_adapter_metadata=text.to_dict(),
    )
    lora = read_lora(tmp_path)
    assert {(x.kind, x.rank, x.alpha) for x in lora.layers} == {
        ("unet", 4, 6),
        ("unet", 4, 2),
        ("clip_text", 3, 1),
    }
    theirs = in_diffusers(parts, tmp_path / "pytorch_lora_weights.safetensors", 1.0)
    assert len(assert_same(merge_lora(base, lora), theirs, base)) == len(lora.layers)


LAYOUTS = {
    "diffusers, old": (
        ATTENTION + ".processor.to_out_lora.{}.weight",
        "text_encoder.text_model.encoder.layers.1.self_attn.to_k_lora.{}.weight",
        ("down", "up"),
    ),
    "diffusers, with prefix": (
        f"unet.{ATTENTION}.to_out.0.lora.{{}}.weight",
        "text_encoder.text_model.encoder.layers.1.self_attn.k_proj.lora_linear_layer.{}.weight",
        ("down", "up"),
    ),
    "peft": (
        f"base_model.model.{ATTENTION}.to_out.0.lora_{{}}.weight",
        "base_model.model.text_model.encoder.layers.1.self_attn.k_proj.lora_{}.default.weight",
        ("A", "B"),
    ),
    "kohya": (
        f"lora_unet_{ATTENTION.replace('.', '_')}_to_out_0.lora_{{}}.weight",
        "lora_te_text_model_encoder_layers_1_self_attn_k_proj.lora_{}.weight",
        ("down", "up"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_names_of_each_layout(layout, tmp_path):
    unet, text, (down, up) = layout
    state = {name.format(down): normal(0, 2, 6) for name in (unet, text)}
    state |= {name.format(up): normal(1, 5, 2) for name in (unet, text)}
    if unet.startswith("base_model"):
        (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    lora = read_lora(saved(tmp_path / "x.safetensors", state))
    assert {(layer.kind, layer.key) for layer in lora.layers} == {
        ("unet", f"{ATTENTION}.to_out.0.weight"),
        ("clip_text", "encoder.layers.1.self_attn.k_proj.weight"),
    }
    assert [layer.alpha for layer in lora.layers] == [2, 2]


def test_convolutions_by_hand(tmp_path):
    """kohya's three-part convolution is its parts one after the other; alpha counts by rank."""
    import torch
    from torch.nn.functional import conv2d

    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = normal(0, 2, 4, 1, 1), normal(1, 3, 2, 3, 5), normal(2, 6, 3, 1, 1)
    state = {f"{name}.lora_{part}.weight": a for part, a in (("down", down), ("up", up))}
    state |= {f"{name}.lora_mid.weight": mid, f"{name}.alpha": np.array(3.0, np.float32)}
    (layer,) = read_lora(saved(tmp_path / "x.safetensors", state)).layers
    x = torch.from_numpy(normal(3, 1, 4, 7, 9))
    steps = x
    for weight in (down, mid, up):
        steps = conv2d(steps, torch.from_numpy(weight))
    whole = conv2d(x, torch.from_numpy(layer.delta()))
    assert steps.std() > 1
    torch.testing.assert_close(whole, steps * 3.0 / 2, rtol=0, atol=1e-4)


def test_rank_stabilised_scale(tmp_path):
    folder = tmp_path / "peft"
    folder.mkdir()
    name = f"base_model.model.{ATTENTION}.to_q"
    state = {f"{name}.lora_A.weight": normal(0, 4, 6), f"{name}.lora_B.weight": normal(1, 5, 4)}
    saved(folder / "adapter_model.safetensors", state)
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "use_rslora": True}))
    (layer,) = read_lora(folder).layers
    product = normal(1, 5, 4) @ normal(0, 4, 6)
    np.testing.assert_allclose(layer.delta(), product * 3 / 4**0.5, atol=1e-5)


def test_taken_out_again(base, tmp_path):
    """Back to the base but for the rounding of two additions."""
    lora = read_lora(saved(tmp_path / "x.safetensors", kohya(base)))
    merged = merge_lora(base, lora, 0.25)
    back = merge_lora(merged, lora, -0.25)
    for kind, state in base.items():
        for key, array in state.items():
            # Half a unit in the last place of numbers up to 2, twice.
            np.testing.assert_allclose(back[kind][key], array, rtol=0, atol=2.5e-7, err_msg=key)


def test_half_precision_stays_half(base, tmp_path):
    """The sum is taken in float32 and rounded once; what half precision cannot hold is said."""
    lora = read_lora(saved(tmp_path / "x.safetensors", kohya(base)))
    half = {"unet": {k: a.astype(np.float16) for k, a in base["unet"].items()}}
    lora = dataclasses.replace(lora, layers=[x for x in lora.layers if x.kind == "unet"])
    exact = {"unet": {k: a.astype(np.float32) for k, a in half["unet"].items()}}
    merged, wanted = (merge_lora(state, lora, 0.5)["unet"] for state in (half, exact))
    for key, array in merged.items():
        rounded = np.asarray(wanted[key]).astype(np.float16)
        np.testing.assert_array_equal(np.asarray(array), rounded, strict=True)
    key = lora.layers[0].key
    with pytest.raises(UserError, match=f"{key}: .*no longer finite in float16"):
        np.asarray(merge_lora(half, lora, 1e6)["unet"][key])


def test_added_to_a_module_as_to_its_file(parts, base, tmp_path):
    lora = read_lora(saved(tmp_path / "x.safetensors", kohya(base)))
    configs = {
        "unet": dict(parts["unet"].config),
        "clip_text": parts["text_encoder"].config.to_dict(),
    }
    merged = merge_lora(base, lora, 0.5)
    for kind, config in configs.items():
        module = load_state(kind, base[kind], config)
        ours = dump_state(add_lora(module, lora, 0.5))
        assert list(ours) == list(base[kind])
        for key, array in ours.items():
            assert array.tobytes() == np.asarray(merged[kind][key]).tobytes(), key
        assert dump_state(module).keys() == base[kind].keys()


def wrong(tmp_path, state, message: str):
    with pytest.raises(UserError, match=message) as caught:
        read_lora(saved(tmp_path / "x.safetensors", state))
    assert len(str(caught.value).splitlines()) == 1


UNET = "lora_unet_" + ATTENTION.replace(".", "_")


def pair(name: str, inner: int = 6) -> dict[str, np.ndarray]:
    return {
        f"{name}.lora_down.weight": normal(0, 2, inner),
        f"{name}.lora_up.weight": normal(1, 5, 2),
    }


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "LoRA for SDXL .lora_te2"),
        (pair(f"{UNET}_to_k", inner=2048), "LoRA for SDXL"),
        ({f"{UNET}_to_q.hada_w1_a": normal(2, 5, 2)}, r"3 missing \(hada_w1_b of lora_unet"),
        (pair(f"{UNET}_to_q") | {f"{UNET}_to_q.lokr_w1": normal(2, 5, 2)}, "two algorithms"),
        (pair(f"{UNET}_to_q") | {f"{UNET}_to_q.dora_scale": normal(2, 5, 2)}, "1 misshapen"),
        (
            pair(f"{UNET}_to_q") | {f"{UNET}_to_q.dora_scale": np.full(5, np.inf)},
            "dora_scale holds",
        ),
        (pair(f"{UNET}_to_q") | {f"{UNET}_to_q.lora_mid.weight": np.float32(1)}, "1 misshapen"),
        ({f"{UNET}_to_q.lokr_w{i}": np.ones((2, 2)[i:]) for i in (1, 2)}, "1 misshapen"),
        (pair(f"{UNET}_to_q") | {f"{UNET}_to_q.scalar": np.float32(np.inf)}, "scalar is inf"),
        (pair(f"{UNET}_to_q") | {f"{UNET}_to_q.lora_A.weight": normal(2, 2, 6)}, "a second down"),
        ({f"{UNET}_to_q.oft_blocks": normal(2, 5, 2)}, "is OFT"),
        ({f"{UNET}_to_q.diff": normal(2, 5, 2)}, "is a full difference"),
        (pair("lora_unet_x") | pair("lora_unet_y"), r"2 unexpected \(lora_unet_x, lora_unet_y\)"),
        ({"conv_in.weight": normal(0, 2, 2)}, r"1 unexpected \(conv_in.weight\)"),
        ({f"{UNET}_to_q.lora_down.weight": normal(0, 2, 6)}, r"1 missing \(up of lora_unet_"),
        (pair(f"{UNET}_to_q") | {f"{UNET}_to_q.lora_up.weight": normal(0, 5, 3)}, "1 misshapen"),
        (pair(f"{UNET}_to_q") | {f"{UNET}_to_q.lora_up.weight": np.ones((5, 2), int)}, "int64"),
        (pair(f"{UNET}_to_q") | {f"{UNET}_to_q.alpha": np.float32(np.nan)}, "alpha is nan"),
        (pair(f"{UNET}_to_q") | pair(f"unet.{ATTENTION}.to_q"), "a second change of down_blocks"),
    ],
)
def test_what_is_no_lora_of_this_base_is_said(state, message, tmp_path):
    wrong(tmp_path, {key: np.asarray(array) for key, array in state.items()}, message)


def test_what_does_not_fit_the_base_is_said_at_once(base, tmp_path):
    state = pair(f"{UNET}_to_q") | pair("lora_unet_down_blocks_7_resnets_0_conv1")
    lora = read_lora(saved(tmp_path / "x.safetensors", state))
    with pytest.raises(
        UserError, match=r"1 missing \(unet/down_blocks.7.*1 misshapen .*wanted \(8, 8\)"
    ):
        merge_lora(base, lora)


def test_inspected(base, tmp_path):
    """What it changes; of one for another base, why it does not fit."""
    file = saved(tmp_path / "x.safetensors", kohya(base))
    about = summary(open_weights(file))
    count = {kind: sum(layer.kind == kind for layer in read_lora(file).layers) for kind in base}
    assert (about["kind"], about["layers"]) == ("LoRA", count)
    assert (about["ranks"], about["alphas"]) == ([3], [2.0])
    assert "base" not in about
    saved(file, pair(f"{UNET}_to_k", inner=768))
    assert summary(open_weights(file))["base"] == "for Stable Diffusion 1.x"
    saved(file, pair(f"{UNET}_to_k", inner=2048))
    assert "is a LoRA for SDXL" in summary(open_weights(file))["difference"]
