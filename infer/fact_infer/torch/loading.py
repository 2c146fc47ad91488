"""FACT in the style of diffusers' IP-Adapter: methods of a pipeline and arguments of its call.

``with_fact(StableDiffusionPipeline)`` is that class with :class:`FactAdapterMixin`; its names are
those of ``load_ip_adapter`` and its fellows, with ``fact_adapter`` for ``ip_adapter``.
"""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fact_convert.io.safetensors_io import write_safetensors
from fact_infer.parts import (
    ENCODER,
    FaceModels,
    find_face_models,
    has_encoder,
    read_face_models,
)
from fact_infer.photos import crop_picture
from fact_infer.request import MAX_SCALE, Photo, check_range
from fact_infer.torch.adapter import (
    FactTorch,
    Mask,
    Scale,
    checked_strength,
    load_fact,
    unload_fact,
)
from fact_infer.torch.attention_processors import installed, unwrap_compiled
from fact_jax.fact import Combine
from fact_jax.utils.errors import UserError, first_line

Picture: TypeAlias = str | os.PathLike | Photo | Image.Image
Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)
EMBEDS = "fact_adapter_image_embeds"
"""The tensor's name in a file of embeddings."""
_BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
# Of the UNet, by which pipes that are made from one another know their adapter.
_FACT = "_fact_adapter"
_MAX_EMBEDS = 1 << 26


class FactAdapter:
    """An adapter and its encoder as diffusers loads a part of a pipeline; ``files`` are opened."""

    def __init__(self, files: FaceModels):
        self.files = files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        weight_name: str | None = None,
        image_encoder: str | os.PathLike | None = None,
        **_: Any,
    ) -> "FactAdapter":
        """Open them as :meth:`FactAdapterMixin.load_fact_adapter` does."""
        parts = [str(pretrained_model_name_or_path), subfolder, weight_name]
        if any(isinstance(part, list | tuple) for part in parts):
            raise UserError("a pipe takes one face adapter: give one subfolder and one weight_name")
        name = "/".join(part.rstrip("/") for part in parts if part)
        folder = Path(name) if Path(name).is_dir() else Path(name).parent
        aside = folder.parent / ENCODER
        if image_encoder is None and not has_encoder(name) and aside.is_dir():
            image_encoder = aside
        return cls(read_face_models(*find_face_models(name, image_encoder)))

    from_single_file = from_pretrained


class FactAdapterMixin:
    """For a pipeline of diffusers with a UNet; see :func:`with_fact`."""

    unet: Any

    def load_fact_adapter(
        self,
        pretrained_model_name_or_path: str | os.PathLike | FactAdapter,
        subfolder: str | None = None,
        weight_name: str | None = None,
        image_encoder: str | os.PathLike | None = None,
    ) -> None:
        """Put an adapter into the pipe.

        A file, a folder or a name on the Hub, in which ``subfolder`` and ``weight_name`` may name
        the file; ``image_encoder`` is the face encoder, None: the folder ``encoder`` beside the
        adapter or beside its folder. Or what :class:`FactAdapter` opened. See
        :func:`fact_infer.load_fact`, whose errors are raised.
        """
        given = pretrained_model_name_or_path
        if not isinstance(given, FactAdapter):
            given = FactAdapter.from_pretrained(given, subfolder, weight_name, image_encoder)
        setattr(unwrap_compiled(self.unet), _FACT, load_fact(self, files=given.files))
        self.set_fact_adapter_scale(1.0)

    def unload_fact_adapter(self) -> None:
        """Give the pipe back as it was before ``load_fact_adapter``."""
        self._fact_adapter()
        unload_fact(self)
        delattr(unwrap_compiled(self.unet), _FACT)

    def save_fact_adapter(self, save_directory: str | os.PathLike) -> None:
        """Write adapter and encoder, as they were read, for ``load_fact_adapter``."""
        self._fact_adapter().save_pretrained(save_directory)

    def set_fact_adapter_scale(self, scale: Scale | Mapping[str, Any]) -> None:
        """The adapter's strength in the calls to come, and in the one that runs.

        A number, one for each picture or person (``FactTorch.face``), or by block as IP-Adapter has
        it: ``{"down": {"block_2": [0.0, 1.0]}, "up": 0.5}``, where a block that is not named is
        silent and a list is for the attentions of a block in turn. Raises UserError otherwise.
        """
        fact = self._fact_adapter()
        processors = installed(self.unet)
        factors = dict.fromkeys(processors, 1.0)
        strength: Scale = 1.0
        if isinstance(scale, Mapping):
            factors = block_factors(scale, list(processors))
        else:
            checked_strength(scale)
            strength = scale
        drawing = fact.context.guidance is not None
        if drawing:
            fact.set_scale(strength)
            for path, processor in processors.items():
                processor.factor = factors[path]
        vars(unwrap_compiled(self.unet))["_fact_scale"] = strength, factors

    def prepare_fact_adapter_image_embeds(
        self,
        fact_adapter_image: Picture | Sequence[Picture],
        points: Sequence[Any] | None = None,
        combine: Combine = "concat",
    ) -> Tensor:
        """Face tokens (1, m, d) of one person's photos, for any number of calls; float32.

        A photo is a file (its points lie beside it, or a detector finds them), ``Photo``, or a
        picture of Pillow, whose five ``points`` are given (one list for each photo) or found.
        """
        fact, photos = self._fact_adapter(), _as_list(fact_adapter_image)
        if not any(isinstance(photo, Image.Image) for photo in photos):
            if points is not None:
                raise UserError("points are for pictures in memory: a file has them beside it")
            return fact.tokens(*photos, combine=combine)
        if not all(isinstance(photo, Image.Image) for photo in photos):
            raise UserError("photos of a person are all files, or all pictures in memory")
        size = fact.encoder.config.img_size
        given = [None] * len(photos) if points is None else list(points)
        if len(given) != len(photos):
            raise UserError(f"{len(photos)} photos need as many lists of five points")
        crops = [crop_picture(p, size, own)[0] for p, own in zip(photos, given, strict=True)]
        stacked = torch.stack([torch.from_numpy(crop) for crop in crops])
        return fact.face_tokens(stacked[None].numpy(), combine)

    def save_fact_adapter_image_embeds(self, embeds: Tensor, path: str | os.PathLike) -> None:
        """Write face tokens to a ``.safetensors`` file, with the sum of the adapter they are of."""
        if not isinstance(embeds, Tensor):
            raise UserError(
                f"the face tokens of one person are a tensor, got {type(embeds).__name__}: save "
                "each person's to a file of its own"
            )
        about = {"format": "pt", "adapter": self._fact_adapter().fingerprint()}
        write_safetensors(path, {EMBEDS: embeds.detach().float().cpu().numpy()}, about)

    def load_fact_adapter_image_embeds(self, path: str | os.PathLike) -> Tensor:
        """Face tokens that were saved; UserError if it is no such file, or of another adapter."""
        try:
            if os.path.getsize(path) > _MAX_EMBEDS:
                raise UserError(f"{path}: too large for face tokens")
            with safe_open(path, "pt") as opened:
                about, tokens = opened.metadata() or {}, opened.get_tensor(EMBEDS)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: no face tokens can be read: {first_line(error)}") from None
        if about.get("adapter") != self._fact_adapter().fingerprint():
            raise UserError(f"{path}: these face tokens are of another adapter or encoder")
        return tokens

    def __call__(
        self,
        *args: Any,
        fact_adapter_image: Any = None,
        fact_adapter_points: Sequence[Any] | None = None,
        fact_adapter_image_embeds: Tensor | Sequence[Tensor] | None = None,
        fact_adapter_masks: Sequence[Mask] | None = None,
        fact_adapter_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The pipe's own call, with faces if any are given.

        ``fact_adapter_image``: a person's photo, or photos in a list; a list of such lists for
        several people. ``fact_adapter_points``: the five points of photos in memory, a list of a
        person's, or of such lists. ``fact_adapter_image_embeds``: instead of photos, what
        ``prepare_fact_adapter_image_embeds`` gave, one tensor (b, m, d) or one for each person.
        ``fact_adapter_masks``: where each of several people is drawn, also accepted in
        ``cross_attention_kwargs``. ``fact_adapter_kwargs`` go to ``FactTorch.face``: ``start``,
        ``stop``, ``schedule``, ``face_guidance``, ``negative_face``, ``cap``, ``adain``.
        """
        cross = kwargs.get("cross_attention_kwargs")
        if cross and "fact_adapter_masks" in cross:
            fact_adapter_masks = cross["fact_adapter_masks"]
            kept = {key: value for key, value in cross.items() if key != "fact_adapter_masks"}
            kwargs["cross_attention_kwargs"] = kept or None
        faces = fact_adapter_image_embeds
        if fact_adapter_image is not None:
            if faces is not None:
                raise UserError("give fact_adapter_image or fact_adapter_image_embeds, not both")
            faces = self.encode_fact_adapter_images(fact_adapter_image, fact_adapter_points)
        more = dict(fact_adapter_kwargs or {})
        points_only = fact_adapter_image is None and fact_adapter_points is not None
        if points_only or (faces is None and (fact_adapter_masks is not None or more)):
            raise UserError("settings of a face, but no face: give fact_adapter_image")
        context: contextlib.AbstractContextManager = contextlib.nullcontext()
        if faces is not None:
            strength, factors = vars(unwrap_compiled(self.unet))["_fact_scale"]
            if "block_scales" not in more:
                paths = {f"^{re.escape(path)}$": factor for path, factor in factors.items()}
                more["block_scales"] = paths
            more = {"scale": strength, **more}
            context = self._fact_adapter().on(self).face(faces, regions=fact_adapter_masks, **more)
        with context:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def has_fact_adapter(self) -> bool:
        """Whether one is loaded."""
        return _FACT in vars(unwrap_compiled(self.unet)) and bool(installed(self.unet))

    def is_fact_adapter(self, adapter: FactAdapter) -> bool:
        """Whether the one that is loaded is this one."""
        return self._fact_adapter().files is adapter.files

    def encode_fact_adapter_images(
        self, fact_adapter_image: Any, fact_adapter_points: Sequence[Any] | None = None
    ) -> list[Tensor]:
        """Face tokens of each person: photos and points as the call of the pipe takes them."""
        nested = isinstance(fact_adapter_image, list | tuple) and any(
            isinstance(photos, list | tuple) for photos in fact_adapter_image
        )
        people = list(fact_adapter_image) if nested else [fact_adapter_image]
        points: list[Any] = [fact_adapter_points]
        if nested:
            points = [None] * len(people) if points == [None] else _as_list(fact_adapter_points)
        if len(points) != len(people):
            raise UserError(f"{len(people)} people need as many lists of points")
        return [
            self.prepare_fact_adapter_image_embeds(photos, own)
            for photos, own in zip(people, points, strict=True)
        ]

    def _fact_adapter(self) -> FactTorch:
        fact = vars(unwrap_compiled(self.unet)).get(_FACT)
        if fact is None:
            raise UserError("no face adapter is loaded: call load_fact_adapter first")
        return fact


def with_fact(pipeline: type[Pipeline]) -> type[Pipeline]:
    """A pipeline class of diffusers with the methods and arguments of :class:`FactAdapterMixin`.

    ``with_fact(StableDiffusionPipeline).from_pretrained(base)``, and ``from_pipe`` of any other.
    A pipe of it is saved as the class that it was made from.
    """
    if not (isinstance(pipeline, type) and issubclass(pipeline, DiffusionPipeline)):
        raise UserError(
            f"with_fact takes a pipeline class of diffusers, got {pipeline!r}: a pipe "
            "that is there becomes one by with_fact(StableDiffusionPipeline).from_pipe(pipe)"
        )
    if issubclass(pipeline, FactAdapterMixin):
        return pipeline
    about = {"__module__": pipeline.__module__, "__doc__": pipeline.__doc__}
    return type(pipeline.__name__, (FactAdapterMixin, pipeline), about)


def block_factors(scale: Mapping[str, Any], paths: Sequence[str]) -> dict[str, float]:
    """The strength of the block with each of these paths, from a dict as IP-Adapter has it."""
    factors = dict.fromkeys(paths, 0.0)

    def fill(prefix: str, value: Any, said: str) -> None:
        inside = [path for path in paths if path.startswith(prefix)]
        if not inside:
            raise UserError(f"scale of {said}: this UNet has no such attention")
        if isinstance(value, Mapping):
            for key, part in value.items():
                number = re.fullmatch(r"block_(\d+)", str(key))
                if not number or prefix.count(".") > 1 or prefix.startswith("mid"):
                    raise UserError(f"scale of {said}: {key!r} is no block, they are as 'block_0'")
                fill(f"{prefix}{number[1]}.", part, f"{said}.{key}")
        elif isinstance(value, list | tuple):
            if not inside[0].startswith(f"{prefix}attentions."):
                raise UserError(f"scale of {said}: a list is for the attentions of one block")
            layers = sorted({int(path.removeprefix(prefix).split(".")[1]) for path in inside})
            if len(layers) != len(value):
                raise UserError(f"scale of {said}: {len(value)} numbers, {len(layers)} attentions")
            for layer, part in zip(layers, value, strict=True):
                fill(f"{prefix}attentions.{layer}.", part, f"{said}[{layer}]")
        else:
            check_range(f"face scale of {said}", value, 0.0, MAX_SCALE)
            factors.update(dict.fromkeys(inside, float(value)))

    for name, value in scale.items():
        if name not in _BLOCKS:
            raise UserError(f"scale of {name!r}: the parts of a UNet are {', '.join(_BLOCKS)}")
        fill(f"{_BLOCKS[name]}.", value, str(name))
    return factors


def _as_list(photos: Any) -> list:
    return list(photos) if isinstance(photos, list | tuple) else [photos]
