"""The JAX pipeline without weights: every array a shape, from the models' small files alone."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from fact_convert.models.adapter import check_blocks, read_adapter
from fact_convert.models.controlnet import find_controlnet
from fact_convert.models.face_encoder import find_encoder_config
from fact_convert.models.pipeline import abstract_pipeline
from fact_convert.weights import abstract_module
from fact_infer.guidance import resolve_guidance
from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.parts import ADAPTER, ENCODER, BaseModel, FaceModels, Parts, check_controlnet
from fact_infer.pipeline import GenerationInputs
from fact_infer.request import GenerationParams
from fact_jax.fact import Guidance
from fact_jax.models.controlnet import ControlNetConfig
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedGeneration:
    """What a chip is to draw at a time, as the options of `fact-infer generate` say it."""

    base: str
    adapter: str | None = None
    encoder: str | None = None
    controlnet: str | None = None
    precision: str = "float32"
    batch: int = 1
    photos: int = 1
    sampler: str = "pndm"
    steps: int = 50
    guidance: float = 5.0
    face_guidance: float | None = None
    height: int | None = None
    width: int | None = None

    def params(self) -> GenerationParams:
        return GenerationParams(
            sampler=self.sampler,
            steps=self.steps,
            guidance=Guidance(text=self.guidance, face=self.face_guidance),
            height=self.height,
            width=self.width,
        )


@dataclasses.dataclass(frozen=True)
class TracedProgram:
    """A program of the pipeline: what is compiled, and the function that it is of."""

    traced: Any
    function: Callable
    arguments: tuple[PyTree, ...]


class AbstractPipeline(FlaxPipeline):
    """The pipeline on models of zeros. Build it by :func:`build`, where they take no memory."""

    def __init__(self, parts: Parts, models: dict[str, nnx.Module], dtype: Any):
        super().__init__(parts, models, dtype)
        # The autoencoder is stored as the base is read, although it computes in float32.
        self._states["vae"] = jax.tree.map(
            lambda a: jnp.asarray(a, self.dtype), self._states["vae"]
        )

    @property
    def states(self) -> dict[str, PyTree]:
        """The parameters of each model."""
        return self._states

    def trace(self, inputs: GenerationInputs, device: Any) -> dict[str, TracedProgram]:
        """The programs that generate the pictures of these inputs on one device, by name."""
        shape, shared, rows = self._inputs_of_prepare(inputs)
        of_steps = self._inputs_of_steps(inputs, shared["photo_mask"])
        shape = dataclasses.replace(shape, devices=1)
        number, index = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)

        def one(program: Any, function: Callable, *arguments: PyTree) -> TracedProgram:
            arguments = _place((self.states, *arguments), device)
            function = functools.partial(function, shape=shape)
            return TracedProgram(program.trace(*arguments, shape=shape), function, arguments)

        with self._products():
            prepare = one(self._prepare, self._prepare_rows, shared, rows)
            conditions, latents, *_ = prepare.traced.out_info
            rows = {"x": latents, "conditions": conditions}
            return {
                "prepare": prepare,
                "denoise": one(self._denoise, self._denoise_rows, of_steps, rows, number, index),
                "decode": one(self._decode, self._decode_rows, {}, latents),
            }


def build(request: PlannedGeneration) -> tuple[AbstractPipeline, list[str]]:
    """The pipeline of a request, its states as shapes, and notes on what was assumed.

    UserError for parts that do not fit each other.
    """
    built: list[tuple[AbstractPipeline, list[str]]] = []

    def init() -> dict[str, PyTree]:
        pipeline, notes = abstract_pipeline(request.base)
        unet = pipeline.unet.config
        base = BaseModel(
            name=request.base,
            folder=Path(request.base),
            unet=unet,
            vae=pipeline.vae.config,
            schedule=pipeline.schedule,
            tokenizer=pipeline.tokenizer,
        )
        models: dict[str, nnx.Module] = {"vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
        face = None
        if request.adapter is not None:
            face = _face_models(request.adapter, request.encoder, base, notes)
            unet = dataclasses.replace(unet, face_dim=face.resampler_config.output_dim)
            models["resampler"] = abstract_module("resampler", face.resampler_config)
            models["encoder"] = abstract_module("transface", face.encoder_config)
        models["unet"] = abstract_module("unet", unet)
        if request.controlnet is not None:
            config = _controlnet_config(request.controlnet, base, notes)
            models["controlnet"] = abstract_module("controlnet", config)
        parts = Parts(base=base, face=face, controlnet=request.controlnet)
        built.append((AbstractPipeline(parts, models, request.precision), notes))
        return built[0][0].states

    shapes = jax.eval_shape(init)
    pipeline, notes = built[0]
    pipeline._states = shapes
    return pipeline, notes


def inputs_of(request: PlannedGeneration, pipeline: AbstractPipeline) -> GenerationInputs:
    """Inputs of the shapes that the request's pictures have. UserError for what cannot be drawn."""
    base, params, batch = pipeline.base, request.params(), request.batch
    base.check(params)
    crops = control = None
    if pipeline.face is not None:
        side = pipeline.face.encoder_config.img_size
        crops = np.zeros((1, request.photos, side, side, 3), np.uint8)
    if request.controlnet is not None:
        control = np.zeros((batch, *base.picture_size(params), 3), np.uint8)
    return GenerationInputs(
        token_ids=np.zeros((batch + 1, base.tokenizer.model_max_length), np.int32),
        seeds=np.zeros(batch, np.int32),
        params=params,
        guidance=resolve_guidance(
            params.guidance,
            params.steps,
            list(base.unet.block_channels()),
            with_face=crops is not None,
        ),
        size=base.latent_size(params),
        crops=crops,
        control=control,
    )


def _face_models(
    adapter: str, encoder: str | None, base: BaseModel, notes: list[str]
) -> FaceModels:
    """Adapter and encoder without tensors; what is not here is taken to be as released."""
    path = Path(adapter)
    path = path / ADAPTER if path.is_dir() else path
    if path.is_file():
        opened = read_adapter(path)
        check_blocks(opened.blocks, base.unet.block_channels(), adapter, base.name)
        resampler = opened.config
    else:
        notes.append(f"{adapter} is not here: the shapes of the released adapter are assumed")
        resampler = ResamplerConfig.sd15()
    place = path.parent / ENCODER if encoder is None else Path(encoder)
    config, assumed = find_encoder_config(place, resampler.embedding_dim)
    notes += assumed
    if config.embed_dim != resampler.embedding_dim:
        raise UserError(
            f"{adapter} takes tokens of width {resampler.embedding_dim}, {place} gives "
            f"{config.embed_dim}"
        )
    return FaceModels(
        adapter=path,
        adapter_state={},
        metadata={},
        resampler_config=resampler,
        encoder=place,
        encoder_state={},
        encoder_config=config,
    )


def _controlnet_config(controlnet: str, base: BaseModel, notes: list[str]) -> ControlNetConfig:
    if (Path(controlnet) / "config.json").is_file():
        check_controlnet(base, controlnet)
        return find_controlnet(controlnet, weights=False)[1]
    notes.append(f"{controlnet} is no folder here: a ControlNet of Stable Diffusion 1.5 is assumed")
    return ControlNetConfig.sd15()


def _place(tree: PyTree, device: Any) -> PyTree:
    """Shapes of arrays on a device."""
    there = SingleDeviceSharding(device)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), tree)
