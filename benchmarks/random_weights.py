"""Models with random weights: in memory, or as files in the real formats."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from fact_convert.io.json_io import write_json
from fact_convert.io.lazy_tensor import LazyTensor
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.mapping import map_jax_path
from fact_convert.models.adapter import model_configs, write_adapter
from fact_convert.models.diffusers_folder import WeightFileOptions, write_pipeline
from fact_convert.models.pipeline import DEFAULT_CLASS, scheduler_config
from fact_convert.models.tokenizer import read_tokenizer
from fact_convert.rules.key_tables import ADAPTER_INFIX, RESAMPLER_PREFIX
from fact_convert.weights import abstract_state
from fact_jax.diffusion.noise_schedules import NoiseSchedule
from fact_jax.models.clip_text import CLIPTextConfig
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.models.transface import TransFaceConfig
from fact_jax.models.unet import UNetConfig
from fact_jax.models.vae import VAEConfig

_MINIATURE = Path("miniature/base")


def random_model(kind: str, config, dtype: str = "float32") -> tuple[nnx.GraphDef, Any]:
    """What ``nnx.merge`` makes a model of; the parameters are numpy arrays of ``dtype``."""
    graph, flat = abstract_state(kind, config)
    paths = (tuple(int(key) if key.isdigit() else key for key in path.split(".")) for path in flat)
    abstract = nnx.from_flat_state(zip(paths, flat.values(), strict=True))
    tree = random_tree(nnx.as_pure(abstract), np.random.default_rng(0))
    return graph, jax.tree.map(lambda array: array.astype(dtype), tree)


def random_tree(tree: Any, rng: np.random.Generator) -> Any:
    """Arrays of these shapes and dtypes, of unit gain: no number grows or dies on its way."""

    def one(path, leaf) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[2]
        if name in ("kernel", "embedding", "latents", "pos_embed"):
            fan = np.prod(leaf.shape[:-1]) if name == "kernel" else leaf.shape[-1]
            array = rng.standard_normal(leaf.shape, np.float32)
            array /= np.sqrt(fan, dtype=np.float32)
        else:
            value = 0.5 if name.startswith("alpha") else name in ("scale", "var")
            array = np.full(leaf.shape, value, np.float32)
        return array.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def random_state(kind: str, config, dtype: str = "float32") -> dict[str, LazyTensor]:
    """A flat PyTorch state whose tensors are drawn when they are wanted."""
    _, flat = abstract_state(kind, config)
    state = {}
    for seed, (name, variable) in enumerate(flat.items()):
        shape = variable.get_value().shape
        place = map_jax_path(kind, name, "")[0]
        turned = place.transform.to_torch(np.broadcast_to(np.int8(0), shape), len(shape)).shape

        def numbers(seed=seed, shape=turned) -> np.ndarray:
            drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
            return drawn.astype(dtype) if len(shape) < 2 else (0.02 * drawn).astype(dtype)

        state[place.torch] = LazyTensor(turned, np.dtype(dtype), numbers)
    return state


def write_everything(folder: Path, dtype: str) -> None:
    """Of SD 1.5's size: ``base/`` (with the miniature's tokenizer), ``adapter/`` with its encoder.

    The base and the adapter are of ``dtype``, the encoder (vit_s) float32, as it is computed.
    """
    unet, resampler = UNetConfig.sd15(), ResamplerConfig.sd15()
    encoder, text = TransFaceConfig.vit_s(), CLIPTextConfig.sd15()
    configs = {"unet": unet, "vae": VAEConfig.sd15(), "clip_text": text}
    states = {kind: random_state(kind, config, dtype) for kind, config in configs.items()}
    tokenizer = read_tokenizer(_MINIATURE / "tokenizer", text.max_position_embeddings)
    plan = (
        {kind: config.to_dict() for kind, config in configs.items()},
        tokenizer,
        scheduler_config("PNDMScheduler", NoiseSchedule.sd15()),
        DEFAULT_CLASS,
    )
    text = {"format": "pt"}
    write_pipeline(
        folder, folder / "base", states, plan, text, files=WeightFileOptions(), force=False
    )

    adapted = dataclasses.replace(unet, face_dim=resampler.output_dim)
    state = {k: a for k, a in random_state("unet", adapted, dtype).items() if ADAPTER_INFIX in k}
    own = random_state("resampler", resampler, dtype)
    state |= {RESAMPLER_PREFIX + key: array for key, array in own.items()}
    file = folder / "adapter" / "adapter.safetensors"
    write_adapter(file, state, model_configs(unet.to_dict(), resampler))
    beside = folder / "adapter" / "encoder"
    faces = random_state("transface", encoder)
    write_safetensors(beside / "model.safetensors", faces, {"format": "pt"})
    write_json(beside / "config.json", {"model_type": "transface", **encoder.to_dict()})
