"""A Stable Diffusion 1.5 base as a diffusers pipeline folder, read and written."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fact_convert.io.hub import local_folder
from fact_convert.io.json_io import read_json, write_json
from fact_convert.io.lazy_tensor import State
from fact_convert.io.output_paths import output_folder
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.weight_files import part_variants, read_weights
from fact_convert.lora import LORA_PARTS, Lora, merge_into_model
from fact_convert.mapping import key_prefix
from fact_convert.models.tokenizer import Tokenizer, read_tokenizer, write_tokenizer
from fact_convert.models.validation import check_fits
from fact_convert.rules.key_tables import ADAPTER_INFIX
from fact_convert.weights import abstract_module, cast_state, dump_some, load_state, read_config
from fact_jax.diffusion.noise_schedules import NoiseSchedule, alphas_cumprod_numpy
from fact_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from fact_jax.models.unet import UNet, UNetConfig
from fact_jax.models.vae import AutoencoderKL, VAEConfig
from fact_jax.portraits.vocabulary import caption_vocabulary
from fact_jax.utils.errors import UserError, error_context

log = logging.getLogger(__name__)

PARTS = {
    "unet": ("unet", "diffusion_pytorch_model"),
    "vae": ("vae", "diffusion_pytorch_model"),
    "text_encoder": ("clip_text", "model"),
}
"""Folder of each model: its kind, and what its weight files are called."""
_SD15 = {"unet": UNetConfig.sd15(), "vae": VAEConfig.sd15(), "text_encoder": CLIPTextConfig.sd15()}
SMALL_FILES = ("model_index.json", "*/*.json", "*/merges.txt")
"""Patterns of a pipeline's files that hold no weights."""
_INPAINT_CLASSES = ("StableDiffusionInpaintPipeline",)
_EDIT_CLASSES = ("StableDiffusionInstructPix2PixPipeline",)
DEFAULT_CLASS = "StableDiffusionPipeline"
_TEXT_CLASSES = (DEFAULT_CLASS, "StableDiffusionImg2ImgPipeline", *_INPAINT_CLASSES)
"""Pipelines that are made of the parts here, the usual one first, by what their UNets take."""
_LAYOUT = "0.42.0"
"""The diffusers whose layout of folders is written, which some of its pipelines look for."""
MOST_STEPS = 100_000
"""Training timesteps that a noise schedule may have."""
_SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A base model's parts. ``scheduler_class`` is the name of diffusers' scheduler."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    scheduler_class: str = "DDIMScheduler"


def find_pipeline(
    path: str | os.PathLike, variant: str | None = None, *, weights: bool = True
) -> Path:
    """The folder of a whole pipeline, fetched from the Hub if it is a repository's name.

    Without ``weights`` only the small files are. Raises UserError if a part is missing.
    """
    folder = local_folder(path, SMALL_FILES, variant, weights=weights)
    absent = [part for part in (*PARTS, "tokenizer", "scheduler") if not (folder / part).is_dir()]
    if absent:
        raise UserError(f"{folder}: not a whole diffusers pipeline: it has no {', '.join(absent)}")
    return folder


def load_pipeline(
    path: str | os.PathLike,
    *,
    variant: str | None = None,
    dtype=jnp.float32,
    loras: Sequence[tuple[Lora, float]] = (),
) -> Pipeline:
    """Read a diffusers folder, or a Hub repository of that name if there is no such folder.

    ``variant`` (as fp16) picks the weight files of that name, where a part has any; parameters are
    of ``dtype`` whatever the files hold. ``loras`` are added to them, each times its scale, before
    they are rounded to it. Raises UserError naming the folder and what is wrong with it.
    """
    folder = find_pipeline(path, variant)
    variants, lines = part_variants(folder, {part: PARTS[part][1] for part in PARTS}, variant)
    for line in lines:
        log.warning(line)
    models = {
        part: load_part(folder / part, variant=variants[part], dtype=dtype, loras=loras)
        for part in PARTS
    }
    check_channels(folder, models["unet"].config, models["vae"].config)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    text = models["text_encoder"].config
    tokenizer = read_tokenizer(folder / "tokenizer", text.max_position_embeddings, text.vocab_size)
    return Pipeline(
        **models,
        tokenizer=tokenizer,
        schedule=read_schedule_config(scheduler),
        scheduler_class=scheduler.get("_class_name", "DDIMScheduler"),
    )


def abstract_pipeline(path: str | os.PathLike) -> tuple[Pipeline, list[str]]:
    """A pipeline without weights, from the small files of a diffusers folder, and what was assumed.

    Where there is no such folder it has the shapes of Stable Diffusion 1.5, and a tokenizer of any
    words. Parameters are zeros: call it under ``jax.eval_shape``, where they take no memory.
    """
    folder = Path(path)
    if not folder.is_dir():
        vocab, merges = caption_vocabulary()
        pipeline = Pipeline(
            **{part: abstract_module(PARTS[part][0], config) for part, config in _SD15.items()},
            tokenizer=Tokenizer(vocab=vocab, merges=merges),
            schedule=NoiseSchedule.sd15(),
        )
        note = f"{path} is no folder here: the shapes of Stable Diffusion 1.5 are assumed"
        return pipeline, [note]
    models = {
        part: abstract_module(kind, read_config(kind, read_json(folder / part / "config.json")))
        for part, (kind, _) in PARTS.items()
    }
    text = models["text_encoder"].config
    tokenizer = read_tokenizer(folder / "tokenizer", text.max_position_embeddings, text.vocab_size)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    schedule = read_schedule_config(scheduler)
    return Pipeline(**models, tokenizer=tokenizer, schedule=schedule), []


def load_part(
    folder: Path,
    *,
    variant: str | None = None,
    dtype=jnp.float32,
    loras: Sequence[tuple[Lora, float]] = (),
):
    """One model of a pipeline folder, by the folder's name."""
    with error_context(folder):
        kind, config, state = _read_part(folder, variant)
        if loras and kind in LORA_PARTS:
            check_fits(kind, state, config)
            state = merge_into_model(kind, state, loras, np.dtype(dtype).name)
        return load_state(kind, state, config, dtype=dtype)


def check_pipeline(folder: Path, variant: str | None = None) -> None:
    """UserError for a pipeline folder that :func:`load_pipeline` refuses; reads no tensor.

    For those who let diffusers open it, which fills what is missing with random numbers.
    """
    for part in PARTS:
        with error_context(folder / part):
            kind, config, state = _read_part(folder / part, variant)
            check_fits(kind, state, config)


def _read_part(folder: Path, variant: str | None) -> tuple[str, dict, State]:
    kind, stem = PARTS[folder.name]
    config = read_json(folder / "config.json")
    return kind, config, read_weights(folder, stem, variant)


def save_pipeline(
    pipeline: Pipeline, path: str | os.PathLike, *, force: bool = False, dtype: str | None = None
) -> None:
    """Write a diffusers folder that ``StableDiffusionPipeline.from_pretrained`` opens.

    Adapters in the UNet are left out: ``save_adapter`` writes those. Nothing appears at ``path``
    before it is whole. ``dtype`` (as float16) rounds the weights to that precision; else they keep
    theirs. Raises UserError if ``path`` exists, unless ``force`` is given and it was written here.
    """
    with output_folder(path, force=force) as folder:
        for part, (_, stem) in PARTS.items():
            save_part(getattr(pipeline, part), folder / part, stem, dtype)
        write_tokenizer(pipeline.tokenizer, folder / "tokenizer")
        scheduler = scheduler_config(pipeline.scheduler_class, pipeline.schedule)
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        write_json(folder / "model_index.json", index_of(pipeline.scheduler_class))


def save_part(module, folder: Path, stem: str, dtype: str | None = None) -> None:
    """Write one model's folder: its config and its weights, without adapters."""
    state = dump_some(module, lambda key: ADAPTER_INFIX not in key)
    stored = cast_state(state, dtype)
    write_safetensors(folder / f"{stem}.safetensors", stored, {"format": "pt"})
    config = module.config.to_dict()
    if isinstance(module, CLIPTextModel):
        # transformers opens the file in the precision named here, whatever is stored.
        dtypes = {str(array.dtype) for array in state.values()}
        config["torch_dtype"] = max(dtypes, key=lambda name: np.dtype(name).itemsize)
    write_json(folder / "config.json", config)


def check_channels(folder: Path, unet: UNetConfig, vae: VAEConfig) -> None:
    """UserError if a UNet takes something beside the latents, as for inpainting and editing."""
    if unet.in_channels != vae.latent_channels:
        raise UserError(
            f"{folder}: its UNet takes {unet.in_channels} channels, its latents have "
            f"{vae.latent_channels}: a base made for inpainting or editing cannot be used, its "
            "ordinary sister can, also to draw over pictures"
        )


def read_schedule_config(config: Mapping) -> NoiseSchedule:
    """The noise schedule of diffusers' ``scheduler_config.json``; UserError if it is none."""
    try:
        schedule = NoiseSchedule.from_dict(config)
        steps = schedule.num_train_timesteps
        if not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"num_train_timesteps is {steps!r:.40}")
        alphas_cumprod_numpy(schedule)
    except (TypeError, ValueError, AttributeError, OverflowError) as err:
        raise UserError(f"the scheduler's configuration does not make sense: {err}") from err
    return schedule


def pipeline_class(unet: State, said: str | None) -> str:
    """The diffusers class of a pipeline with this UNet: ``said`` if it fits, else the usual one.

    Raises UserError if the UNet's channels are those of none.
    """
    prefix = key_prefix("unet", unet)
    inputs = unet[f"{prefix}conv_in.weight"].shape[1]
    latents = unet[f"{prefix}conv_out.weight"].shape[0]
    classes = {
        latents: _TEXT_CLASSES,
        2 * latents: _EDIT_CLASSES,
        2 * latents + 1: _INPAINT_CLASSES,
    }
    if inputs not in classes:
        raise UserError(
            f"a UNet from {inputs} to {latents} channels belongs into no pipeline that is known "
            "here (text, inpainting, InstructPix2Pix)"
        )
    return said if said in classes[inputs] else classes[inputs][0]


def scheduler_config(name: str, schedule: NoiseSchedule) -> dict:
    """The ``scheduler_config.json`` of a diffusers scheduler of this name."""
    facts = schedule.to_dict()
    if name not in _SCHEDULERS:
        facts.pop("set_alpha_to_one")
    return {"_class_name": name, **facts, **_SCHEDULERS.get(name, {})}


def index_of(scheduler: str, name: str = DEFAULT_CLASS) -> dict:
    """The ``model_index.json`` of a pipeline with a scheduler of this name."""
    return {
        "_class_name": name,
        "_diffusers_version": _LAYOUT,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
