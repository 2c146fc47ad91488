"""FACT in a Stable Diffusion pipeline of diffusers: ``load_fact``, ``unload_fact``."""

import contextlib
import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from fact_convert.models.adapter import (
    check_blocks,
    check_plain,
    model_configs,
    split_state,
)
from fact_infer.jax_config import pin_jax_to_cpu
from fact_infer.parts import FaceModels, find_face_models, read_face_models, save_face_models
from fact_infer.photos import prepare_crops
from fact_infer.request import MAX_SCALE, Photo, check_guidance, check_range
from fact_infer.torch.attention_processors import (
    FaceContext,
    FaceProcessor,
    installed,
    text_blocks,
    unwrap_compiled,
)
from fact_infer.torch.guidance_hooks import SEQUENTIAL, GuidanceHooks, Masks
from fact_infer.torch.models import Resampler, TransFaceTokens, encoder_from, load_strictly
from fact_jax.face.mask import read_mask
from fact_jax.fact import Combine, Guidance
from fact_jax.regions import Regions
from fact_jax.utils.errors import UserError

Scale: TypeAlias = float | Sequence[float] | Sequence[Sequence[float]] | Tensor
"""Strength of the adapter: of all, of each picture (b,), or of each person in it (b, k)."""
Mask: TypeAlias = str | os.PathLike | Image.Image | np.ndarray
"""Where a person is drawn, white or 1 there, of any size."""
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactTorch:
    """A pipe with an adapter in it, and what turns photos into its condition.

    Outside of :meth:`face` the pipe draws what it always drew.
    """

    pipe: Any
    encoder: TransFaceTokens
    resampler: Resampler
    context: FaceContext
    files: FaceModels

    def on(self, pipe: Any) -> "FactTorch":
        """The same for another pipe around the same UNet, as ``Other.from_pipe(pipe)`` gives."""
        if unwrap_compiled(pipe.unet) is not unwrap_compiled(self.pipe.unet):
            raise UserError("this pipe has another UNet: load_fact into it")
        return dataclasses.replace(self, pipe=pipe)

    def tokens(
        self, *photos: str | os.PathLike | Photo, combine: Combine = "concat"
    ) -> Float[Tensor, "1 m d"]:
        """Face tokens (1, m, d) of one person from photos; float32.

        A photo is a file whose five points of the face lie beside it or are found by an installed
        detector, as on the command line; ``fact_infer.request.Photo`` names points, masks and more.
        What a user should know of the photos is logged as a warning. Raises UserError where there
        is no face.
        """
        if not photos:
            raise UserError("face tokens need at least one photo")
        for photo in photos:
            if not isinstance(photo, str | os.PathLike | Photo):
                raise UserError(
                    "a photo is given by its path or as fact_infer.request.Photo, each by itself, "
                    f"not as a {type(photo).__name__}"
                )
        files = [p if isinstance(p, Photo) else Photo(path=Path(p)) for p in photos]
        crops, notes = prepare_crops(files, self.encoder.config.img_size)
        for note in notes:
            _LOG.warning(note)
        return self.face_tokens(crops[None], combine)

    @torch.no_grad()
    def face_tokens(
        self, crops: UInt8[np.ndarray, "b p s s 3"], combine: Combine = "concat", people: int = 1
    ) -> Float[Tensor, "b m d"]:
        """Face tokens (b, m, d) for pictures from ``p`` aligned crops each, in a row; float32.

        The crops are of ``people`` people, an equal number of each, one's after another's. Raises
        UserError for arrays that are no such crops.
        """
        self._check_crops(crops, combine, people)
        pictures, photos = crops.shape[:2]
        pixels = torch.from_numpy(np.ascontiguousarray(crops)).flatten(0, 1).permute(0, 3, 1, 2)
        device = self._device()
        tokens = self.encoder.to(device)(pixels.to(device, torch.float32) / 127.5 - 1)
        tokens = self.resampler.to(device)(tokens)
        tokens = tokens.unflatten(0, (pictures, people, photos // people))
        return _combine_photos(tokens, combine).flatten(1, 2)

    @torch.no_grad()
    def null_tokens(self, photos: int = 1) -> Float[Tensor, "1 m d"]:
        """The condition 'no face' (1, m, d): the resampler of all-zero encoder tokens."""
        config = self.encoder.config
        zeros = torch.zeros(1, config.tokens, config.embed_dim, device=self._device())
        return self.resampler.to(zeros.device)(zeros).repeat(1, photos, 1)

    @contextlib.contextmanager
    def face(
        self,
        face: Float[Tensor, "b m d"] | Sequence[Float[Tensor, "b _ d"]],
        guidance: Guidance | None = None,
        scales: Sequence[float] | None = None,
        regions: Regions | Sequence[Mask] | None = None,
        *,
        scale: Scale = 1.0,
        schedule: Sequence[float] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        face_guidance: float | None = None,
        negative_face: Literal["null", "same"] = "null",
        block_scales: Mapping[str, float] | Sequence[tuple[str, float]] = (),
        cap: float | None = None,
        adain: bool = False,
    ) -> Iterator[None]:
        """While this is entered, pipes around this UNet draw the faces (b, m, d).

        A pipe is called as ever, as often as you like, and so may be others that share the UNet
        (``Other.from_pipe(pipe)``): steps, strength and guidance scale are read from the call that
        runs. It draws a picture for each row of ``face``, or a multiple of them: the next row's
        come after the last of one, as ``num_images_per_prompt`` has it.

        ``scale``, 0 to 2, is the adapter's strength: a number, one for each row (b,), or one for
        each person in it (b, k); :meth:`set_scale` changes it on the way. ``schedule`` are factors
        of it over the steps that are drawn, with lines between; before ``start`` and from ``stop``
        on (fractions of those steps) the adapter is silent. ``face_guidance`` is a guidance scale
        of the face's own; see :class:`fact_jax.fact.Guidance` for the rest.

        With ``regions`` a row holds the tokens of several people, an equal share each, or ``face``
        is one tensor for each person: a mask for each person, of any size, as a file, a picture of
        Pillow or an array in [0, 1]; or what ``fact_jax.regions`` computes.

        ``guidance`` is all settings at once, its ``text`` included, which must then be the
        ``guidance_scale`` of the call. A loop of your own, that calls the UNet itself, needs it:
        above 1 a call holds two branches (negative, positive). ``scales`` are the strengths in each
        call of the UNet, in place of what follows from the scheduler's timesteps.

        Raises UserError for settings out of range, and within a call for one that does not fit.
        """
        inside = installed(self.pipe.unet).values()
        if not inside or any(processor.context is not self.context for processor in inside):
            raise UserError("this adapter is no longer in the pipe: load_fact it again")
        for name, fraction in {"start": start, "stop": stop}.items():
            check_range(name, fraction, 0.0, 1.0)
        settings = Guidance(
            face=face_guidance,
            negative_face=negative_face,
            face_scale=1.0 if schedule is None else _numbers("the schedule", schedule),
            block_scales=_pairs(block_scales),
            start=start,
            stop=stop,
            cap=cap,
            adain=adain,
        )
        if guidance is not None and settings != Guidance():
            raise UserError("give these settings within the guidance, or no guidance")
        if not isinstance(guidance, Guidance | None):
            raise UserError(f"guidance must be as Guidance(text=7.5), got {guidance!r}")
        follow, guidance = guidance is None, guidance or settings
        check_guidance(guidance)
        if scales is not None:
            for one in _numbers("the scales", scales):
                check_range("face scale", one, 0.0, MAX_SCALE)
        masks = _read_regions(regions)
        face = face if isinstance(face, Tensor) else _concatenate_people(face, masks)
        people = 1 if masks is None else _people(masks)
        null = self.null_tokens(self._check_tokens(face, people)).to(face)
        strength = checked_strength(scale)
        hooks = GuidanceHooks(self.pipe, self.context, guidance, scales, masks, follow=follow)
        with hooks.active(face, null):
            self.context.strength = strength
            yield

    def set_scale(self, scale: Scale) -> None:
        """Change the strength of the faces that are being drawn, as in a callback between steps."""
        if self.context.guidance is None:
            raise UserError("no face is being drawn: set_scale is for within `with fact.face(...)`")
        self.context.strength = checked_strength(scale)

    def fingerprint(self) -> str:
        """A hash of what makes face tokens of photos: encoder and resampler, by their vectors."""
        found = hashlib.sha256()
        for module in (self.encoder, self.resampler):
            for name, tensor in module.state_dict().items():
                if tensor.ndim == 1:
                    found.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return found.hexdigest()

    def _device(self) -> torch.device:
        """Where the pipe computes; refused where moving a model there would lose its weights."""
        if "meta" in (self.pipe.device.type, self.pipe.unet.device.type):
            raise UserError(SEQUENTIAL)
        return self.pipe.device

    def _check_crops(self, crops: np.ndarray, combine: str, people: int) -> None:
        side = self.encoder.config.img_size
        wanted = f"crops must be an array of uint8 (pictures, photos, {side}, {side}, 3)"
        if not isinstance(crops, np.ndarray):
            raise UserError(f"{wanted}, got {type(crops).__name__}")
        if crops.dtype != np.uint8 or crops.ndim != 5 or crops.shape[2:] != (side, side, 3):
            raise UserError(f"{wanted}, got {crops.dtype} {crops.shape}")
        if combine not in get_args(Combine):
            raise UserError(f"combine must be one of {get_args(Combine)}, got {combine!r}")
        if not crops.size or people < 1 or crops.shape[1] % people:
            raise UserError(f"{crops.shape[1]} photos cannot be of {people} people alike")

    def _check_tokens(self, face: Tensor, people: int) -> int:
        """How many photos' tokens there are in a row."""
        config = self.resampler.config
        if face.ndim != 3 or not face.numel() or face.shape[2] != config.output_dim:
            raise UserError(
                f"face tokens must be (pictures, tokens, {config.output_dim}), got "
                f"{tuple(face.shape)}"
            )
        photos, rest = divmod(face.shape[1], config.num_queries)
        if rest:
            raise UserError(
                f"{face.shape[1]} face tokens: they must be a multiple of {config.num_queries}"
            )
        if photos % people:
            raise UserError(f"{face.shape[1]} face tokens cannot be of {people} people alike")
        if not face.isfinite().all():
            raise UserError("the face tokens hold numbers that are not finite (NaN or infinite)")
        return photos

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write adapter and encoder, as they were read, for ``load_fact(pipe, folder)``.

        The folder can be uploaded as a repository of the Hub and be named instead.
        """
        config = model_configs(dict(self.pipe.unet.config), self.resampler.config)
        save_face_models(self.files, folder, config)


def load_fact(
    pipe: Any,
    adapter: str | os.PathLike | None = None,
    encoder: str | os.PathLike | None = None,
    *,
    files: FaceModels | None = None,
) -> FactTorch:
    """Put an adapter into a Stable Diffusion pipeline of diffusers.

    ``adapter`` and ``encoder`` are paths or names on the Hub, as ``find_face_models`` takes them;
    ``files`` is both as ``read_face_models`` opened them, instead.
    JAX, which makes noise and schedules, stays on the CPU, unless this process used it before.
    Raises UserError if they are not what they should be or the adapter is for another base.
    """
    pin_jax_to_cpu()
    if files is None:
        if adapter is None:
            raise UserError("no adapter is named: give load_fact its file, or its name on the Hub")
        files = read_face_models(*find_face_models(adapter, encoder))
    check_plain(files.metadata, files.resampler_config.to_dict(), files.adapter)
    if installed(pipe.unet):
        raise UserError("this pipe has a face adapter already: unload_fact it first")
    if pipe.unet.device.type == "meta":
        raise UserError(SEQUENTIAL)
    resampler_state, states = split_state(files.adapter_state, files.adapter)
    with torch.device("meta"):
        resampler = Resampler(files.resampler_config)
    load_strictly(resampler, resampler_state, files.adapter)
    face_encoder = encoder_from(files.encoder_state, files.encoder_config, files.encoder)
    blocks = dict(text_blocks(pipe.unet))
    widths = {path: block.norm2.normalized_shape[0] for path, block in blocks.items()}
    check_blocks(states, widths, files.adapter)
    context = FaceContext()
    processors = {}
    for path, block in blocks.items():
        with torch.device("meta"):
            processor = FaceProcessor(
                widths[path],
                block.attn2.heads,
                resampler.config.output_dim,
                own_norm="ln.weight" in states[path],
            )
        source = f"{files.adapter}, {path}"
        processors[path] = load_strictly(processor, states[path], source, pipe.unet.dtype)
    for path, processor in processors.items():
        processor.to(pipe.unet.device).install(path, blocks[path], context)
    return FactTorch(
        pipe=pipe, encoder=face_encoder, resampler=resampler, context=context, files=files
    )


def unload_fact(pipe: Any) -> None:
    """Give a pipe back as it was before ``load_fact``: the same modules, the same processors."""
    for processor in installed(pipe.unet).values():
        processor.remove()


def checked_strength(scale: Scale) -> Float[Tensor, "*_"]:
    """A strength that the user gave, on the CPU; UserError for what is none."""
    try:
        strength = torch.as_tensor(scale, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        strength = torch.empty(0)
    if not strength.numel() or strength.ndim > 2:
        raise UserError(
            "the face's scale must be a number, one for each picture, or [[...], ...] with one for "
            f"each person in it, got {scale!r}"
        )
    for one in strength.flatten().tolist():
        check_range("face scale", one, 0.0, MAX_SCALE)
    # A copy, by whose identity a change is seen.
    return strength.clone()


def _numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(values)
    except TypeError:
        raise UserError(f"{name} must be several numbers, got {values!r}") from None


def _pairs(block_scales: Mapping | Sequence) -> tuple[tuple[str, float], ...]:
    try:
        return tuple((str(pattern), factor) for pattern, factor in dict(block_scales).items())
    except (TypeError, ValueError):
        raise UserError(
            f"block scales must be as {{'up_blocks': 0.5}}, got {block_scales!r}"
        ) from None


def _read_regions(regions: Regions | Sequence[Mask] | None) -> Regions | Masks | None:
    """Each person's mask as an array; what ``fact_jax.regions`` computes stays as it is."""
    if regions is None or isinstance(regions, Mapping):
        return regions
    if isinstance(regions, str | os.PathLike | Image.Image):  # of one person
        regions = [regions]
    if not isinstance(regions, Iterable):
        raise UserError(f"regions must be a mask for each person, got {regions!r}")
    return [own for mask in regions for own in _masks(mask)]


def _masks(mask: Mask) -> list[Float[np.ndarray, "h w"]]:
    """A region in [0, 1] of a file, a picture or an array; of k people from (1, k, h, w)."""
    if isinstance(mask, str | os.PathLike):
        return [read_mask(mask)]
    values = np.asarray(mask.convert("L") if isinstance(mask, Image.Image) else mask)
    values = values.astype(np.float32) / (255.0 if values.dtype == np.uint8 else 1.0)
    colours = values.ndim == 3 and values.shape[2] <= 4
    fits = 2 <= values.ndim <= 4 and not colours and values.size
    if not fits or not (values.min() >= 0.0 and values.max() <= 1.0):
        raise UserError(f"a mask must be (h, w) numbers in 0..1 or bytes, got {values.shape}")
    return list(values.reshape(-1, *values.shape[-2:]))


def _people(regions: Regions | Masks) -> int:
    if not len(regions):
        raise UserError("regions were given, but none in them: give a mask for each person")
    return next(iter(regions.values())).shape[1] if isinstance(regions, Mapping) else len(regions)


def _concatenate_people(faces: Sequence[Tensor], regions: object) -> Float[Tensor, "b m d"]:
    """The tokens of several people of one picture."""
    tensors = isinstance(faces, list | tuple) and all(isinstance(face, Tensor) for face in faces)
    if not (tensors and faces):
        raise UserError("face tokens are tensors, as fact.tokens(photo) gives them")
    if len(faces) > 1 and regions is None:
        raise UserError(f"tokens of {len(faces)} people: give regions, a mask for each of them")
    if len({tuple(face.shape) for face in faces}) > 1:
        shapes = ", ".join(str(tuple(face.shape)) for face in faces)
        raise UserError(f"every person needs as many face tokens as the others, got {shapes}")
    return torch.cat(tuple(faces), dim=1)


def _combine_photos(tokens: Tensor, combine: Combine) -> Tensor:
    """``fact_jax.fact.combine_photos`` of tokens (b, k, p, m, d): (b, k, tokens, d)."""
    if combine == "concat":
        return tokens.flatten(2, 3)
    if combine == "average":
        return tokens.mean(dim=2)
    lengths = tokens.norm(dim=-1, keepdim=True)
    mean = (tokens / lengths.clamp(min=1e-6)).mean(dim=2)
    return mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-6) * lengths.mean(dim=2)
