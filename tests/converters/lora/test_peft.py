"""LoRA, LoHa, LoKr and DoRA that the real peft saved, merged as peft merges them."""

import copy
import json

import numpy as np
import pytest

from fact_convert.cli.inspection import summary
from fact_convert.cli.opening import check_supported, open_weights
from fact_convert.io.weight_files import read_file
from fact_convert.lora import merge_lora, merge_loras, read_lora
from fact_jax.utils.errors import UserError
from tests.pipelines import small_parts

pytestmark = pytest.mark.heavy

peft = pytest.importorskip("peft")
LINEAR = ["to_q", "to_k", "to_out.0", "ff.net.2"]
LAYERS = [*LINEAR, "conv1", "proj_in", "time_emb_proj"]


@pytest.fixture(scope="module")
def models():
    import torch

    torch.manual_seed(0)
    parts = small_parts(vocab_size=60, special=(0, 1))
    return {"unet": parts["unet"], "clip_text": parts["text_encoder"]}


def state_of(model) -> dict[str, np.ndarray]:
    return {key: tensor.numpy().copy() for key, tensor in model.state_dict().items()}


def trained(model, config, seed: int = 0):
    """A copy of the model in peft with every number of the adapter drawn, as if trained."""
    import torch

    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in wrapped.named_parameters():
        if "lora_magnitude_vector" in name:
            tensor.data *= 1 + torch.rand(tensor.shape, generator=draw)
        elif any(mark in name for mark in ("lora_", "hada_", "lokr_")):
            tensor.data = torch.randn(tensor.shape, generator=draw) / 3
    return wrapped


def assert_as_peft(base, merged, wrapped, least: int) -> None:
    """To 1e-6 of the largest number, and so many weights have moved."""
    theirs = state_of(wrapped.merge_and_unload())
    moved = 0
    for key, array in theirs.items():
        ours = np.asarray(merged[key])
        scale = max(1.0, float(np.abs(array).max()))
        np.testing.assert_allclose(ours, array, rtol=0, atol=1e-6 * scale, err_msg=key)
        moved += bool(np.abs(ours - base[key]).max() > 1e-3)
    assert moved >= least


def lora(**settings):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LAYERS, **settings})


CONFIGS = {
    "alpha": lora(),
    "rank-stabilised": lora(use_rslora=True),
    "pattern": lora(alpha_pattern={r"down_blocks\.\d+\.attentions.*to_[qk]": 1}),
    "first of two patterns": lora(alpha_pattern={"attn1.to_q": 1, "attn2.to_q": 2, "to_q": 16}),
    "patterns of ranks": lora(rank_pattern={"attn1.to_(q|k)": 2, "to_q": 3}, use_rslora=True),
    "beginning": lora(alpha_pattern={"^mid_block.*to_q": 3, "block.attn1.to_q": 50}),
    "fan-in": lora(fan_in_fan_out=True, target_modules=LINEAR),
    "orthogonal": lora(init_lora_weights="orthogonal", target_modules=LINEAR),
    "gaussian": lora(init_lora_weights="gaussian"),
    "DoRA": lora(use_dora=True, alpha_pattern={"conv1": 2}),
    "LoHa": peft.LoHaConfig(r=3, alpha=2, target_modules=LAYERS, alpha_pattern={"to_[qk]": 5}),
    "LoHa, Tucker": peft.LoHaConfig(r=3, alpha=2, target_modules=LAYERS, use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(r=1, alpha=3, target_modules=LAYERS, decompose_factor=2),
    "LoKr, both": peft.LoKrConfig(r=1, alpha=3, target_modules=LAYERS, decompose_both=True),
    "LoKr, Tucker": peft.LoKrConfig(r=1, alpha=3, target_modules=LAYERS, use_effective_conv2d=True),
    "LoKr, full": peft.LoKrConfig(r=64, alpha=3, target_modules=LAYERS, rank_pattern={"to_q": 32}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_as_peft(models, config, tmp_path):
    wrapped = trained(models["unet"], config)
    wrapped.save_pretrained(tmp_path)
    base = state_of(models["unet"])
    read = read_lora(tmp_path)
    assert_as_peft(base, merge_lora({"unet": base}, read)["unet"], wrapped, len(read.layers))


def test_text_encoder_as_peft(models, tmp_path):
    """The file alone, too: peft's settings are read beside it."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "fc1"], alpha_pattern={"layers.1.*q_proj": 1}
    )
    wrapped = trained(models["clip_text"], config)
    wrapped.save_pretrained(tmp_path)
    base = state_of(models["clip_text"])
    read = read_lora(tmp_path / "adapter_model.safetensors")
    assert {layer.alpha for layer in read.layers} == {8, 1}
    assert_as_peft(base, merge_lora({"clip_text": base}, read)["clip_text"], wrapped, 4)


@pytest.mark.parametrize("scale", [0.5, -1.5])
def test_dora_at_a_scale_as_diffusers(models, scale, tmp_path):
    """diffusers multiplies the low-rank part; the magnitudes stay."""
    from diffusers.utils import scale_lora_layers

    wrapped = trained(models["unet"], lora(use_dora=True))
    wrapped.save_pretrained(tmp_path)
    scale_lora_layers(wrapped, scale)
    base = state_of(models["unet"])
    merged = merge_lora({"unet": base}, read_lora(tmp_path), scale)["unet"]
    assert_as_peft(base, merged, wrapped, 1)


def test_several_as_peft(models, tmp_path):
    """Their sum, and of DoRA the norms of the base without the others, in their order."""
    wrapped = trained(models["unet"], lora(), seed=1)
    wrapped.add_adapter("second", lora(use_dora=True, target_modules=LINEAR))
    wrapped.set_adapter("second")
    wrapped.base_model.set_adapter(["default", "second"])
    for name, tensor in wrapped.named_parameters():
        if ".second." in name and "lora_" in name:
            tensor.data += 0.1
    wrapped.save_pretrained(tmp_path)
    base = state_of(models["unet"])
    loras = [(read_lora(tmp_path), 1.0), (read_lora(tmp_path / "second"), 1.0)]
    assert [x.algorithm for x, _ in loras] == ["LoRA", "DoRA"]
    assert_as_peft(base, merge_loras({"unet": base}, loras)["unet"], wrapped, 20)


def settings(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    trained(models["unet"], lora(target_modules=["to_q"])).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    import shutil

    return shutil.copytree(saved, tmp_path / "lora")


REFUSED = {
    **{f"init_lora_weights={x}": ("init_lora_weights", x) for x in ("pissa", "pissa_niter_4")},
    **{f"init_lora_weights={x}": ("init_lora_weights", x) for x in ("olora", "loftq", "corda")},
    **{f"init_lora_weights={x}": ("init_lora_weights", x) for x in ("lora_ga", "unheard")},
    "peft_type": ("peft_type", "ADALORA"),
    "bias": ("bias", "lora_only"),
    "lora_bias": ("lora_bias", True),
    "modules_to_save": ("modules_to_save", ["conv_in"]),
    "target_parameters": ("target_parameters", ["conv_in.weight"]),
    "layer_replication": ("layer_replication", [[0, 1]]),
    "trainable_token_indices": ("trainable_token_indices", [1]),
    "alora_invocation_tokens": ("alora_invocation_tokens", [1]),
    "use_qalora": ("use_qalora", True),
    "use_bdlora": ("use_bdlora", {"nblocks": 2}),
    "arrow_config": ("arrow_config", {"top_k": 3}),
    "kasa_config": ("kasa_config", {"beta": 1}),
    "monteclora_config": ("monteclora_config", {"num_samples": 8}),
    "a rank of another file": ("r", 8),
    "no expression": ("alpha_pattern", {"to_q(": 3}),
    "a costly one": ("alpha_pattern", {"(a+)+b": 3}),
    "no table": ("alpha_pattern", [3]),
    "no number": ("lora_alpha", "8"),
    "a number that no float holds": ("lora_alpha", 10**400),
    "no rank": ("r", 0),
    "no whole rank": ("rank_pattern", {"to_q": 4.5}),
}


@pytest.mark.parametrize(("name", "value"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(folder, name, value):
    settings(folder, **{name: value})
    words = {"r": "is of rank 4, .*says 8|a rank of '0'", "lora_alpha": "alpha is (nan|inf)"}
    words |= {"rank_pattern": "a rank of '4.5'"}
    with pytest.raises(UserError, match=words.get(name, name)) as caught:
        read_lora(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone(folder, start):
    settings(folder, init_lora_weights=start)
    assert {layer.alpha for layer in read_lora(folder).layers} == {6}


def test_pickled_and_as_a_layer_of_diffusers(models, folder, tmp_path):
    """``adapter_model.bin``, and what ``UNet2DConditionModel.save_lora_adapter`` writes."""
    import torch

    layers = read_lora(folder).layers
    state, _ = read_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(
        {k: torch.tensor(np.array(a)) for k, a in state.items()}, folder / "adapter_model.bin"
    )
    unet = copy.deepcopy(models["unet"])
    unet.add_adapter(lora(target_modules=["to_q"], alpha_pattern={"attn1.*": 2}))
    unet.save_lora_adapter(tmp_path / "layer")
    one, other = read_lora(folder).layers, read_lora(tmp_path / "layer").layers
    assert [(x.key, x.alpha) for x in one] == [(x.key, 6) for x in layers]
    assert {(x.key, x.alpha) for x in other} == {
        (x.key, 2 if "attn1" in x.key else 6) for x in layers
    }
    for ours, theirs in zip(one, layers, strict=True):
        np.testing.assert_array_equal(ours.delta(), theirs.delta())


def test_file_without_its_settings(folder):
    """Its factor would be a guess: peft's file alone does not say alpha."""
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"no adapter_config.json stands beside it"):
        read_lora(folder / "adapter_model.safetensors")


def test_inspected(folder):
    about = summary(open_weights(folder))
    assert (about["kind"], about["ranks"], about["alphas"]) == ("LoRA", [4], [6.0])
    assert about["layers"]["unet"] > 0 == about["layers"]["clip_text"]
    with pytest.raises(UserError, match=r"is a LoRA.*merge-lora"):
        check_supported(open_weights(folder))
    settings(folder, init_lora_weights="pissa")
    assert "init_lora_weights" in summary(open_weights(folder))["difference"]
