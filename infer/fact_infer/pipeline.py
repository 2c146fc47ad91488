"""The pipeline interface of both backends: checked inputs, requests in batches."""

import abc
import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from fact_convert.models.tokenizer import tokenize
from fact_infer.guidance import ResolvedGuidance, resolve_guidance
from fact_infer.img2img import Img2ImgInput
from fact_infer.input_images import read_inputs
from fact_infer.parts import BaseModel, FaceModels, Parts, load_parts
from fact_infer.photos import prepare_crops
from fact_infer.request import GenerationParams, GenerationRequest
from fact_jax.regions import region_masks
from fact_jax.utils.batches import padded_batches
from fact_jax.utils.errors import UserError

BATCH = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationInputs:
    """The arguments of ``Pipeline.generate``, checked and as arrays.

    ``token_ids`` are those of the negative prompt, then of each prompt. ``size`` is that of the
    latents, ``start`` the first step that is drawn.
    """

    token_ids: Int[np.ndarray, "rows n"]
    seeds: Int[np.ndarray, " b"]
    params: GenerationParams
    guidance: ResolvedGuidance
    size: tuple[int, int]
    start: int = 0
    crops: UInt8[np.ndarray, "#b p s s 3"] | None = None
    img2img: Img2ImgInput | None = None
    control: UInt8[np.ndarray, "b h w 3"] | None = None
    control_scale: float = 1.0


class Pipeline(abc.ABC):
    """A loaded backend: a base model, with or without a face adapter, ready to draw."""

    def __init__(self, parts: Parts):
        self.parts = parts

    @property
    def base(self) -> BaseModel:
        return self.parts.base

    @property
    def face(self) -> FaceModels | None:
        return self.parts.face

    @classmethod
    def load(
        cls,
        base: str | os.PathLike | BaseModel,
        adapter: str | os.PathLike | None = None,
        encoder: str | os.PathLike | None = None,
        dtype: Any = "float32",
        *,
        loras: Sequence[tuple[str | os.PathLike, float]] = (),
        controlnet: str | os.PathLike | None = None,
    ) -> Self:
        """Read a diffusers folder and, for faces, an adapter file and an encoder.

        ``dtype`` is what UNet, text encoder and ControlNet compute in: ``float32``, ``bfloat16``,
        ``float16``, or ``tf32``, see :data:`fact_jax.ops.precision.Precision`. ``loras`` are files
        that are added to the base, each times its factor.
        """
        return cls.from_parts(
            load_parts(base, adapter, encoder, loras=loras, controlnet=controlnet), dtype
        )

    @classmethod
    @abc.abstractmethod
    def from_parts(cls, parts: Parts, dtype: Any = "float32") -> Self:
        """The pipeline of opened parts, whose weights are read now."""

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        crops: UInt8[np.ndarray, "#b p s s 3"] | None,
        params: GenerationParams,
        *,
        img2img: Img2ImgInput | None = None,
        regions: Float[np.ndarray, "#b k h w"] | None = None,
        control: UInt8[np.ndarray, "#b h w 3"] | None = None,
        control_scale: float = 1.0,
        bar: tqdm | None = None,
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """One picture for each prompt, seed and person, all at once.

        ``crops`` are the aligned faces of each picture's person (or of one for all pictures);
        None draws with the base alone. ``img2img`` is what is drawn over, if anything. With
        ``regions``, masks in [0, 1] of any size, the crops are of ``k`` people, an equal number of
        each, who are drawn there. ``control`` are pictures for the ControlNet (poses, edges), as
        large as what is drawn. ``bar`` moves by one a call of the UNet.
        """
        if crops is not None and self.face is None:
            raise UserError("faces were given, but the pipeline was loaded without an adapter")
        if control is not None:
            if self.parts.controlnet is None:
                raise UserError("a control picture was given, but no ControlNet to look at it")
            control = np.broadcast_to(control, (len(prompts), *control.shape[1:]))
        self.base.check(params)
        unet, size, start, places = self.base.unet, self.base.latent_size(params), 0, {}
        if img2img is not None:
            img2img.check(self.base, params, len(prompts))
            start = img2img.start(params.steps)
        if regions is not None:
            places["people"] = regions.shape[1]
            places["regions"] = region_masks(regions, size, len(unet.block_out_channels))
        token_ids, _ = tokenize(self.base.tokenizer, [params.negative, *prompts])
        inputs = GenerationInputs(
            token_ids=token_ids,
            seeds=np.asarray(seeds, np.int32),
            params=params,
            guidance=resolve_guidance(
                params.guidance,
                params.steps - start,
                list(unet.block_channels()),
                with_face=crops is not None,
                **places,
            ),
            size=size,
            start=start,
            crops=crops,
            img2img=img2img,
            control=control,
            control_scale=control_scale,
        )
        with self._products():
            return self._generate(inputs, bar)

    def _products(self) -> AbstractContextManager[None]:
        """Inside, float32 numbers are multiplied as the pipeline's precision says."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def _generate(
        self, inputs: GenerationInputs, bar: tqdm | None
    ) -> UInt8[np.ndarray, "b h w 3"]: ...

    def generate_request(
        self,
        request: GenerationRequest,
        crops: UInt8[np.ndarray, "p s s 3"] | None = None,
        *,
        batch: int = BATCH,
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """All pictures of a request, in the order of ``request.pictures()``.

        Its photos are read unless ``crops`` are given.
        """
        return np.concatenate(list(generate_batches(self, request, crops, batch=batch)))


def generate_batches(
    pipeline: Pipeline,
    request: GenerationRequest,
    crops: UInt8[np.ndarray, "p s s 3"] | None = None,
    *,
    batch: int = BATCH,
    bar: tqdm | None = None,
) -> Iterator[UInt8[np.ndarray, "b h w 3"]]:
    """The pictures of a request, up to ``batch`` at a time; crops are made unless given."""
    if batch < 1:
        raise UserError(f"a batch holds at least one picture, got {batch}")
    pipeline.base.check(request)
    pipeline.parts.check_photos(len(request.photos if crops is None else crops))
    if crops is None and pipeline.face is not None:
        crops, _ = prepare_crops(request.photos, pipeline.face.encoder_config.img_size)
    people = None if crops is None else crops[None]
    pictures = request.pictures()
    batch = min(batch, len(pictures))
    inputs = read_inputs(request, pipeline.base, batch)
    for rows, count in padded_batches(len(pictures), batch):
        prompts, seeds = zip(*(pictures[i] for i in rows), strict=True)
        drawn = pipeline.generate(prompts, seeds, people, request, **inputs, bar=bar)[:count]
        yield inputs["img2img"].finish(drawn) if "img2img" in inputs else drawn
