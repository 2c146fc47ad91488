"""A tiny base folder that diffusers itself wrote, and a random face adapter that fits it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import ExifTags, Image

from fact_infer.output_images import PNG_XMP, SOURCE_TYPES
from tests.pipelines import save_pipeline, small_parts

POINTS = [[24.0, 28.0], [41.0, 27.0], [33.0, 38.0], [26.0, 46.0], [40.0, 45.0]]
FACE_TOKENS, FACE_DIM = 5, 20
ENCODER = {
    "img_size": 32,
    "patch_size": 9,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 8,
}


class Files(NamedTuple):
    """What a generation is given on the command line."""

    base: Path
    adapter: Path
    encoder: Path
    photo: Path
    other_photo: Path


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """UNet of two levels, VAE that halves once, text encoder and tokenizer; 32 x 32 pictures."""
    import torch
    from diffusers import DDIMScheduler
    from transformers import CLIPTokenizer

    from fact_convert.models.tokenizer import Tokenizer, write_tokenizer
    from fact_jax.portraits.vocabulary import caption_vocabulary

    torch.manual_seed(0)
    vocab, merges = caption_vocabulary()
    words = tmp_path_factory.mktemp("words")
    write_tokenizer(Tokenizer(vocab=vocab, merges=merges), words)
    parts = small_parts(
        vocab_size=len(vocab),
        special=(len(vocab) - 2, len(vocab) - 1),
        unet={"sample_size": 16},
        vae={"block_out_channels": (8, 8), "sample_size": 32},
        text={"num_hidden_layers": 1},
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    tokenizer = CLIPTokenizer.from_pretrained(words)
    return save_pipeline(tmp_path_factory.mktemp("base"), parts, tokenizer, scheduler)


@pytest.fixture(scope="session")
def files(base_folder, tmp_path_factory) -> Files:
    """The base with a random adapter, its gates open, an encoder, and two photos with points."""
    folder = tmp_path_factory.mktemp("face")
    _write_adapter(folder / "adapter.safetensors", base_folder)
    _write_encoder(folder / "encoder")
    photos = []
    for name, seed in (("one", 0), ("two", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
        photos.append(folder / f"{name}.png")
        Image.fromarray(pixels).resize((64, 72), Image.Resampling.BICUBIC).save(photos[-1])
        sidecar = photos[-1].with_suffix(".points.json")
        sidecar.write_text(json.dumps({"points": POINTS}))
    return Files(base_folder, folder / "adapter.safetensors", folder / "encoder", *photos)


@pytest.fixture(scope="module")
def flax(files):
    """The JAX backend with the face in it."""
    from fact_infer.jax.pipeline import FlaxPipeline

    return FlaxPipeline.load(files.base, files.adapter, files.encoder)


@pytest.fixture(scope="module")
def torch(files):
    """Its twin in PyTorch."""
    from fact_infer.torch.pipeline import TorchPipeline

    return TorchPipeline.load(files.base, files.adapter, files.encoder)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Of two arrays of 8-bit pictures: the mean, in 255ths."""
    assert one.shape == other.shape
    return float(np.abs(one.astype(float) - other).mean())


@pytest.fixture(scope="session")
def steered(base_folder, tmp_path_factory):
    """A random ControlNet for the base, and a LoRA of one layer of the UNet and one of the text."""
    from diffusers import ControlNetModel, UNet2DConditionModel
    from safetensors.numpy import save_file
    from torch import Generator, no_grad, randn

    folder, generator = tmp_path_factory.mktemp("steered"), Generator().manual_seed(5)
    unet = UNet2DConditionModel.from_pretrained(base_folder / "unet")
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    with no_grad():
        for weight in controlnet.parameters():
            # Convolutions that start at zero would hide everything before them.
            if weight.ndim == 4 and not weight.any():
                weight += randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
    controlnet.save_pretrained(folder / "controlnet")
    draw = np.random.default_rng(6)
    layers = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": 8,
        "lora_te_text_model_encoder_layers_0_self_attn_v_proj": 24,
    }
    state = {}
    for name, width in layers.items():
        state[f"{name}.lora_down.weight"] = draw.normal(size=(2, width)).astype(np.float32)
        state[f"{name}.lora_up.weight"] = draw.normal(size=(width, 2)).astype(np.float32)
        state[f"{name}.alpha"] = np.array(1.0, np.float32)
    save_file(state, folder / "lora.safetensors")
    return folder, controlnet, state


def _amplify(state: dict) -> dict:
    """Fresh layers whisper: a face must change a picture by far more than backends differ."""
    for tensor in state.values():
        if tensor.ndim > 1:
            tensor *= 3.0
    return state


def _write_adapter(path: Path, base_folder: Path) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    from fact_convert.io.json_io import read_json
    from fact_convert.models.adapter import model_configs, write_adapter
    from fact_infer.torch.attention_processors import FaceProcessor, text_blocks
    from fact_infer.torch.models import Resampler
    from fact_jax.models.resampler import ResamplerConfig

    torch.manual_seed(1)
    config = ResamplerConfig(
        dim=16,
        depth=1,
        dim_head=8,
        heads=2,
        num_queries=FACE_TOKENS,
        embedding_dim=ENCODER["embed_dim"],
        output_dim=FACE_DIM,
    )
    state = {f"local_fac_prj.{k}": v for k, v in _amplify(Resampler(config).state_dict()).items()}
    unet = UNet2DConditionModel.from_config(read_json(base_folder / "unet" / "config.json"))
    for i, (block, module) in enumerate(text_blocks(unet)):
        adapter = FaceProcessor(module.attn2.to_q.in_features, module.attn2.heads, FACE_DIM)
        own = adapter.state_dict()
        own["alpha_attn"] += 1.0 - 0.1 * i
        own["alpha_dense"] += 0.8 + 0.1 * i
        _amplify(own)
        state |= {f"{block}.attn2.processor.{k}": v for k, v in own.items()}
    arrays = {key: tensor.detach().numpy() for key, tensor in state.items()}
    write_adapter(path, arrays, model_configs(dict(unet.config), config))


def _write_encoder(folder: Path) -> None:
    import torch

    from fact_convert.io.json_io import write_json
    from fact_convert.io.safetensors_io import write_safetensors
    from fact_infer.torch.models import TransFaceTokens
    from fact_jax.models.transface import TransFaceConfig

    torch.manual_seed(2)
    state = _amplify(TransFaceTokens(TransFaceConfig(**ENCODER)).state_dict())
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    tokens, dim, classes = 9, ENCODER["embed_dim"], ENCODER["num_classes"]
    draw = np.random.default_rng(3)
    arrays["pos_embed"] = draw.normal(size=(1, tokens, dim)).astype(np.float32)
    arrays["mask_token"] = np.zeros((1, 1, dim), np.float32)
    shapes = {
        "senet.0.weight": (tokens, tokens * dim),
        "senet.2.weight": (tokens, tokens),
        "feature.0.weight": (dim, tokens * dim),
        "feature.2.weight": (classes, dim),
    }
    for layer, width in ((1, dim), (3, classes)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"feature.{layer}.{name}"] = (width,)
    arrays |= {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", arrays, {"format": "pt"})
    write_json(folder / "config.json", ENCODER)


def read_text(path: Path) -> dict[str, Any]:
    """What a file of either sort says: its texts, and under ``source`` the mark (or None)."""
    with Image.open(path) as opened:
        if opened.format == "PNG":
            text = {k: v for k, v in opened.text.items() if k != PNG_XMP}
            packet = opened.text.get(PNG_XMP, "")
        else:
            comment = opened.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
            text = json.loads(comment.removeprefix(b"UNICODE\0").decode("utf-16-be"))
            packet = opened.info.get("xmp", b"").decode()
    _, found, rest = packet.partition(SOURCE_TYPES)
    return text | {"source": rest.partition('"')[0] if found else None}
