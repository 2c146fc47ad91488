"""The parts of a pipeline: found, opened and checked against each other before weights are read.

Each is a file, a folder or a repository on the Hub. The folder that ``save_face_models`` writes,
like a repository with the same in it, holds ``adapter.safetensors``, ``encoder/config.json`` and
``encoder/model.safetensors``.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fact_convert.io.hub import fetch_snapshot
from fact_convert.io.json_io import read_json, write_json
from fact_convert.io.lazy_tensor import State
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.weight_files import file_format
from fact_convert.lora import Lora, read_lora
from fact_convert.models.adapter import check_blocks, read_adapter, split_state, write_adapter
from fact_convert.models.controlnet import find_controlnet
from fact_convert.models.face_encoder import read_encoder
from fact_convert.models.pipeline import check_channels, find_pipeline, read_schedule_config
from fact_convert.models.tokenizer import Tokenizer, read_tokenizer, tokenize
from fact_convert.weights import read_config
from fact_infer.request import GenerationParams, check_prompt
from fact_jax.diffusion.noise_schedules import NoiseSchedule
from fact_jax.diffusion.samplers import model_calls
from fact_jax.fact import condition_shape
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.models.transface import TransFaceConfig
from fact_jax.models.unet import UNetConfig
from fact_jax.models.vae import VAEConfig
from fact_jax.utils.errors import UserError, error_context
from fact_jax.utils.miniature import require_miniature

ADAPTER, ENCODER = "adapter.safetensors", "encoder"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# OWNER/REPOSITORY, and perhaps a path in it.
_HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/([\w./-]+))?")
# diffusers refuses other sizes, whatever the models are.
_DIFFUSERS_FACTOR = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseModel:
    """Configuration of a base model without its weights; ``name`` is what it was asked for by.

    ``folder`` holds the small files; :meth:`weights_folder` is the folder with the weights.
    """

    name: str
    folder: Path
    unet: UNetConfig
    vae: VAEConfig
    schedule: NoiseSchedule
    tokenizer: Tokenizer

    @functools.cached_property
    def has_safety_checker(self) -> bool:
        """Whether it comes with one, as its index says."""
        index = self.folder / "model_index.json"
        entry = read_json(index).get("safety_checker") if index.is_file() else None
        return isinstance(entry, list) and all(entry)

    def weights_folder(self) -> Path:
        """The folder with the weights; from the Hub they are fetched only now."""
        return find_pipeline(self.name)

    @functools.cached_property
    def factor(self) -> int:
        """Height and width of pictures are multiples of this; a UNet takes latents of any size."""
        return math.lcm(self.vae.downscale, _DIFFUSERS_FACTOR)

    def latent_size(self, params: GenerationParams) -> tuple[int, int]:
        """Height and width of the latents of a picture."""
        own = self.unet.sample_size * self.vae.downscale
        height, width = params.height or own, params.width or own
        for name, pixels in (("height", height), ("width", width)):
            if pixels % self.factor:
                raise UserError(
                    f"{name} {pixels}: with this base it must be a multiple of {self.factor}"
                )
        return height // self.vae.downscale, width // self.vae.downscale

    def picture_size(self, params: GenerationParams) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        height, width = self.latent_size(params)
        return height * self.vae.downscale, width * self.vae.downscale

    def check(self, params: GenerationParams) -> None:
        """Raises UserError if this base cannot do what the parameters say."""
        self.latent_size(params)
        params.guidance.block_factors(list(self.unet.block_channels()))
        model_calls(params.sampler, self.schedule, params.steps)

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """One line for each prompt that is longer than the text encoder takes."""
        for prompt in prompts:
            check_prompt(prompt)
        _, cut = tokenize(self.tokenizer, prompts)
        longest = self.tokenizer.model_max_length
        return [f"prompt longer than {longest} tokens: cut {end!r}" for end in cut if end]


def read_base(name: str | os.PathLike) -> BaseModel:
    """Read what is known of a diffusers folder (or Hub repository) without its weights."""
    folder = find_pipeline(name, weights=False)
    text = read_json(folder / "text_encoder" / "config.json")
    longest, rows = text.get("max_position_embeddings", 77), text.get("vocab_size")
    unet, vae = (
        _read(folder / kind / "config.json", functools.partial(read_config, kind))
        for kind in ("unet", "vae")
    )
    check_channels(folder, unet, vae)
    return BaseModel(
        name=str(name),
        folder=folder,
        unet=unet,
        vae=vae,
        schedule=_read(folder / "scheduler" / "scheduler_config.json", read_schedule_config),
        tokenizer=read_tokenizer(folder / "tokenizer", longest, rows),
    )


def _read(path: Path, read: Callable[[dict], Any]) -> Any:
    with error_context(path):
        return read(read_json(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaceModels:
    """An adapter and a face encoder, opened (memory maps) and checked."""

    adapter: Path
    adapter_state: State
    metadata: dict[str, object]
    resampler_config: ResamplerConfig
    encoder: Path
    encoder_state: State
    encoder_config: TransFaceConfig


def read_face_models(adapter: str | os.PathLike, encoder: str | os.PathLike) -> FaceModels:
    """Open an adapter and an encoder; UserError if either is something else, or they do not fit."""
    trained = read_adapter(adapter, variations=True)
    encoder_state, config = read_encoder(encoder)
    taken = trained.config.embedding_dim
    with error_context(adapter):
        _, width = condition_shape(config, trained.config)
    if taken != width:
        raise UserError(
            f"{adapter} was trained with another encoder: it takes tokens of width {taken}, "
            f"{encoder} gives {width}"
        )
    return FaceModels(
        adapter=trained.path,
        adapter_state=trained.state(),
        metadata=trained.metadata,
        resampler_config=trained.config,
        encoder=Path(encoder),
        encoder_state=encoder_state,
        encoder_config=config,
    )


def find_face_models(
    adapter: str | os.PathLike, encoder: str | os.PathLike | None = None
) -> tuple[Path, Path]:
    """The adapter's file, and the encoder's file or folder.

    Each may be a path, or ``OWNER/REPOSITORY`` or ``OWNER/REPOSITORY/PATH/IN/IT`` on the Hub. Where
    ``encoder`` is None it lies in the folder ``encoder`` beside the adapter. Raises UserError if
    there is no such thing.
    """
    found = _locate(adapter, (ADAPTER,), beside=f"{ENCODER}/*" if encoder is None else None)
    found = found / ADAPTER if found.is_dir() else found
    if not found.exists():
        raise UserError(f"{adapter}: holds no {ADAPTER}")
    if encoder is not None:
        return found, _locate(encoder, (CONFIG, WEIGHTS))
    if not (found.parent / ENCODER / WEIGHTS).exists():
        raise UserError(f"{adapter}: no {ENCODER}/{WEIGHTS} beside it: name the encoder too")
    return found, found.parent / ENCODER


def has_encoder(adapter: str | os.PathLike) -> bool:
    """Whether an encoder lies beside an adapter; one that is not here is taken to have it."""
    path = Path(adapter)
    folder = path if path.is_dir() else path.parent
    return not path.exists() or (folder / ENCODER / WEIGHTS).exists()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a pipeline is made of; each LoRA is added to the base times its factor."""

    base: BaseModel
    face: FaceModels | None = None
    loras: Sequence[tuple[Lora, float]] = ()
    controlnet: str | os.PathLike | None = None

    def check_photos(self, photos: int) -> None:
        """UserError unless photos and an adapter come together."""
        if self.face is not None and not photos:
            raise UserError("an adapter was given but no photo: whose face shall it be?")
        if self.face is None and photos:
            raise UserError("a photo was given but no adapter and encoder to put its face in")


def load_parts(
    base: str | os.PathLike | BaseModel,
    adapter: str | os.PathLike | None = None,
    encoder: str | os.PathLike | None = None,
    *,
    loras: Sequence[tuple[str | os.PathLike, float]] = (),
    controlnet: str | os.PathLike | None = None,
) -> Parts:
    """Open everything that a pipeline is made of; UserError unless it fits together.

    No weights of the base or the ControlNet are read; of the others there are memory maps.
    """
    opened, face = base if isinstance(base, BaseModel) else read_base(base), None
    if adapter is not None:
        face = read_face_models(*find_face_models(adapter, encoder))
        check_fit(opened, face)
    if controlnet is not None:
        check_controlnet(opened, controlnet)
    added = [(read_lora(file), factor) for file, factor in loras]
    return Parts(base=opened, face=face, loras=added, controlnet=controlnet)


def check_fit(base: BaseModel, face: FaceModels) -> None:
    """UserError if an adapter is for another base, before the weights of either are read."""
    _, blocks = split_state(face.adapter_state, face.adapter)
    check_blocks(blocks, base.unet.block_channels(), face.adapter, base.name)
    config = face.metadata.get("config", {})
    made_for = config.get("unet", {}) if isinstance(config, dict) else None
    if not isinstance(made_for, dict):
        raise UserError(f"{face.adapter}: metadata 'config' does not hold an object 'unet'")
    wanted = made_for.get("cross_attention_dim", base.unet.cross_attention_dim)
    if wanted != base.unet.cross_attention_dim:
        raise UserError(
            f"{face.adapter} is for another base model: its text is {wanted} wide, that of "
            f"{base.name} {base.unet.cross_attention_dim}"
        )


def check_controlnet(base: BaseModel, controlnet: str | os.PathLike) -> None:
    """UserError if a ControlNet is for another base, before its weights are read."""
    _, config = find_controlnet(controlnet, weights=False)
    names = ("in_channels", "block_out_channels", "down_attention", "layers_per_block")
    wrong = [
        f"{name} {getattr(config, name)} (the base's: {getattr(base.unet, name)})"
        for name in (*names, "cross_attention_dim")
        if getattr(config, name) != getattr(base.unet, name)
    ]
    if config.stride != base.vae.downscale:
        wrong.append(f"its picture is {config.stride} (the base's: {base.vae.downscale}) times")
    if wrong:
        raise UserError(f"{controlnet} is for another base model than {base.name}: {wrong[0]}")


def _locate(name: str | os.PathLike, files: Sequence[str], beside: str | None = None) -> Path:
    """The file or folder of that name; of a repository only ``files``, or one, are fetched."""
    path = Path(name)
    if path.exists():
        return path
    require_miniature({"": path})
    match = _HUB_NAME.fullmatch(str(name))
    if not match or Path(path.parts[0]).exists():
        raise UserError(f"{path}: no such file or folder")
    repository, inner = match[1], PurePosixPath(match[2] or ".")
    if file_format(inner) is not None:
        folder, files = inner.parent, (inner.name,)
    else:
        folder = inner
    wanted = [str(folder / file) for file in (*files, *([beside] if beside else ()))]
    found = fetch_snapshot(name, "file or folder", repository, wanted) / inner
    if not found.exists():
        raise UserError(f"{name}: the repository {repository} holds no {inner}")
    return found


def save_face_models(
    files: FaceModels, folder: str | os.PathLike, config: Mapping[str, object]
) -> None:
    """Write both as ``find_face_models`` finds them; ``config`` is what the adapter fits."""
    folder = Path(folder)
    write_adapter(folder / ADAPTER, files.adapter_state, config, files.metadata)
    write_safetensors(folder / ENCODER / WEIGHTS, files.encoder_state, {"format": "pt"})
    encoder = {"model_type": "transface", **files.encoder_config.to_dict()}
    write_json(folder / ENCODER / CONFIG, encoder)
