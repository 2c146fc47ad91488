"""What a request must agree with, read from small files before any model is loaded."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fact_convert.io.json_io import read_json
from fact_convert.io.lazy_tensor import State
from fact_convert.models.adapter import check_blocks, read_adapter, split_state
from fact_convert.models.controlnet import find_controlnet
from fact_convert.models.face_encoder import read_encoder
from fact_convert.models.pipeline import check_channels, find_pipeline, read_schedule_config
from fact_convert.models.tokenizer import Tokenizer, read_tokenizer, tokenize
from fact_convert.weights import read_config
from fact_infer.request import Settings, check_prompt
from fact_jax.diffusion.noise_schedules import NoiseSchedule
from fact_jax.diffusion.samplers import model_calls
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.models.transface import TransFaceConfig
from fact_jax.models.unet import UNetConfig
from fact_jax.models.vae import VAEConfig
from fact_jax.utils.errors import UserError

# diffusers refuses other sizes, whatever the models are.
_DIFFUSERS_FACTOR = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """The facts of a base model that a request depends on; ``name`` is what it was asked for by.

    ``folder`` holds the small files; :meth:`whole` is the folder with the weights.
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

    def whole(self) -> Path:
        """The folder with everything in it; from the Hub the weights are fetched only now."""
        return find_pipeline(self.name)

    @functools.cached_property
    def factor(self) -> int:
        """Height and width of pictures are multiples of this; a UNet takes latents of any size."""
        return math.lcm(self.vae.downscale, _DIFFUSERS_FACTOR)

    def latent_size(self, settings: Settings) -> tuple[int, int]:
        """Height and width of the latents of a picture."""
        own = self.unet.sample_size * self.vae.downscale
        height, width = settings.height or own, settings.width or own
        for name, pixels in (("height", height), ("width", width)):
            if pixels % self.factor:
                raise UserError(
                    f"{name} {pixels}: with this base it must be a multiple of {self.factor}"
                )
        return height // self.vae.downscale, width // self.vae.downscale

    def picture_size(self, settings: Settings) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        height, width = self.latent_size(settings)
        return height * self.vae.downscale, width * self.vae.downscale

    def check(self, settings: Settings) -> None:
        """Raises UserError if this base cannot do what the settings say."""
        self.latent_size(settings)
        settings.guidance.block_factors(self.unet.block_paths())
        model_calls(settings.sampler, self.schedule, settings.steps)

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """One line for each prompt that is longer than the text encoder takes."""
        for prompt in prompts:
            check_prompt(prompt)
        _, cut = tokenize(self.tokenizer, prompts)
        longest = self.tokenizer.model_max_length
        return [f"prompt longer than {longest} tokens: cut {end!r}" for end in cut if end]


def read_base(name: str | os.PathLike) -> Base:
    """Read what is known of a diffusers folder (or Hub repository) without its weights."""
    folder = find_pipeline(name, weights=False)
    text = read_json(folder / "text_encoder" / "config.json")
    longest, rows = text.get("max_position_embeddings", 77), text.get("vocab_size")
    unet, vae = (
        _read(folder / kind / "config.json", functools.partial(read_config, kind))
        for kind in ("unet", "vae")
    )
    check_channels(folder, unet, vae)
    return Base(
        name=str(name),
        folder=folder,
        unet=unet,
        vae=vae,
        schedule=_read(folder / "scheduler" / "scheduler_config.json", read_schedule_config),
        tokenizer=read_tokenizer(folder / "tokenizer", longest, rows),
    )


def _read(path: Path, read: Callable[[dict], Any]) -> Any:
    try:
        return read(read_json(path))
    except UserError as error:
        raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaceFiles:
    """The two files that a face needs, opened (memory maps) and checked for what they are."""

    adapter: Path
    adapter_state: State
    metadata: dict[str, object]
    resampler_config: ResamplerConfig
    encoder: Path
    encoder_state: State
    encoder_config: TransFaceConfig


def read_face_files(adapter: str | os.PathLike, encoder: str | os.PathLike) -> FaceFiles:
    """Open an adapter and an encoder; UserError if either is something else, or they do not fit."""
    trained = read_adapter(adapter)
    encoder_state, config = read_encoder(encoder)
    taken = trained.config.embedding_dim
    if taken != config.embed_dim:
        raise UserError(
            f"{adapter} was trained with another encoder: it takes tokens of width {taken}, "
            f"{encoder} gives {config.embed_dim}"
        )
    return FaceFiles(
        adapter=trained.path,
        adapter_state=trained.state(),
        metadata=trained.metadata,
        resampler_config=trained.config,
        encoder=Path(encoder),
        encoder_state=encoder_state,
        encoder_config=config,
    )


def check_fit(base: Base, face: FaceFiles) -> None:
    """UserError if an adapter is for another base, before the weights of either are read."""
    _, blocks = split_state(face.adapter_state, face.adapter)
    paths, own = base.unet.block_paths(), base.unet.block_out_channels
    widths = {}
    for path in paths:
        part, *rest = path.split(".")
        level = int(rest[0]) if part != "mid_block" else -1
        widths[path] = own[::-1][level] if part == "up_blocks" else own[level]
    check_blocks(blocks, widths, face.adapter, base.name)
    config = face.metadata.get("config", {}).get("unet", {})
    wanted = config.get("cross_attention_dim", base.unet.cross_attention_dim)
    if wanted != base.unet.cross_attention_dim:
        raise UserError(
            f"{face.adapter} is for another base model: its text is {wanted} wide, that of "
            f"{base.name} {base.unet.cross_attention_dim}"
        )


def check_controlnet(base: Base, controlnet: str | os.PathLike) -> None:
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


def check_crops(face: FaceFiles | None, crops: object) -> None:
    """Faces are drawn by an adapter alone."""
    if crops is not None and face is None:
        raise UserError("faces were given, but the pipeline was loaded without an adapter")


def check_faces(face: FaceFiles | None, photos: int) -> None:
    """Photos and an adapter come together or not at all."""
    if face is not None and not photos:
        raise UserError("an adapter was given but no photo: whose face shall it be?")
    if face is None and photos:
        raise UserError("a photo was given but no adapter and encoder to put its face in")
