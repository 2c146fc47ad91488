"""Pictures by JAX: photo tokens, text, sampling and decoding in one compiled function."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from converters.adapter import attach_adapter, load_adapter
from converters.controlnet import load_controlnet
from converters.encoder import load_encoder
from converters.lora import LORA_PARTS, add_loras, read_lora
from converters.pipeline import load_pipeline
from converters.tokenizer import tokenize
from fact_jax.errors import UserError
from fact_jax.fact import Control, Model, encode_face, guided_model, initial_noise, null_face
from fact_jax.regions import region_masks
from fact_jax.samplers import SAMPLERS, keep_outside, noise_latents_for_start, num_model_calls
from infer.base import Base, FaceFiles, check_crops
from infer.canvas import Canvas
from infer.hub import open_parts
from infer.pipeline import Drawer
from infer.program import Shape, join_guidance, split_guidance
from infer.request import Settings

_HALF_PARTS = ("unet", "text_encoder", "controlnet")
_AXIS = "pictures"


class FlaxPipeline(Drawer):
    """A base model, with or without a face adapter, ready to draw.

    A program is compiled for each shape of a request (``infer.program.Shape``, and how many
    pictures, photos and people); with several devices each draws its share of a batch.
    """

    def __init__(
        self, base: Base, face: FaceFiles | None, models: dict[str, nnx.Module], dtype=jnp.float32
    ):
        self.base, self.face, self.dtype = base, face, jnp.dtype(dtype)
        self.blocks = tuple(path for path, _ in models["unet"].transformer_blocks())
        split = {name: nnx.split(model) for name, model in models.items()}
        self._graphs = {name: graph for name, (graph, _) in split.items()}
        self._states = {name: nnx.as_pure(state) for name, (_, state) in split.items()}
        for name in set(_HALF_PARTS) & set(models):
            self._states[name] = _cast(self._states[name], self.dtype)
        self._devices = 1
        self._bar: tqdm | None = None
        self._run = jax.jit(self._trace, static_argnames="shape")

    @classmethod
    def load(
        cls,
        base: str | os.PathLike | Base,
        adapter: str | os.PathLike | None = None,
        encoder: str | os.PathLike | None = None,
        dtype=jnp.float32,
        *,
        face: FaceFiles | None = None,
        loras: Sequence[tuple[str | os.PathLike, float]] = (),
        controlnet: str | os.PathLike | None = None,
    ) -> "FlaxPipeline":
        """Read a diffusers folder and, for faces, an adapter file and an encoder.

        UNet, text encoder and ControlNet compute in ``dtype``, the rest in float32. ``face`` are
        adapter and encoder as ``read_face_files`` opened them, instead of their names. ``loras``
        are files that are added to the base, each times its factor.
        """
        base, face = open_parts(base, adapter, encoder, face=face, controlnet=controlnet)
        added = [(read_lora(file), factor) for file, factor in loras]
        pipeline = load_pipeline(base.whole(), dtype=dtype)
        models = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
        for name in {LORA_PARTS[layer.kind] for lora, _ in added for layer in lora.layers}:
            models[name] = add_loras(models[name], added)
        if controlnet is not None:
            models["controlnet"] = load_controlnet(controlnet, dtype=dtype)
        if face is not None:
            trained = load_adapter(face.adapter)
            models["unet"] = attach_adapter(models["unet"], trained)
            models["resampler"] = trained.resampler
            models["encoder"] = load_encoder(face.encoder)
        return cls(base, face, models, dtype)

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        crops: UInt8[np.ndarray, "#b p s s 3"] | None,
        settings: Settings,
        *,
        canvas: Canvas | None = None,
        regions: Float[np.ndarray, "#b k h w"] | None = None,
        control: UInt8[np.ndarray, "#b h w 3"] | None = None,
        control_scale: float = 1.0,
        bar: tqdm | None = None,
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """One picture for each prompt, seed and person (``infer.pipeline.Drawer``).

        ``control`` are pictures for the ControlNet (poses, edges), as large as what is drawn.
        """
        check_crops(self.face, crops)
        ids, _ = tokenize(self.base.tokenizer, [settings.negative, *prompts])
        size, start = self.base.latent_size(settings), 0
        inputs = {"ids": ids[1:], "seeds": np.asarray(seeds, np.int32)}
        if crops is not None:
            inputs["crops"] = crops
        if canvas is not None:
            canvas.check(self.base, settings, len(prompts))
            start = canvas.start(settings.steps)
            inputs |= {"images": canvas.images, "cells": canvas.cells}
        if regions is not None:
            levels = len(self.base.unet.block_out_channels)
            inputs["regions"] = dict(region_masks(regions, size, levels))
        if control is not None:
            if "controlnet" not in self._graphs:
                raise UserError("a control picture was given, but no ControlNet to look at it")
            inputs["control"] = control
        guidance, numbers = split_guidance(settings.guidance, settings.steps, self.blocks)
        shape = Shape(
            sampler=settings.sampler,
            steps=settings.steps,
            start=start,
            size=size,
            people=1 if regions is None else regions.shape[1],
            guidance=guidance,
            devices=_share(len(seeds), jax.local_device_count()),
            # A program that calls back cannot be kept on disk. Where steps are slow, it still does.
            ticks=bar is not None and jax.default_backend() == "cpu",
        )
        self._bar = bar
        if bar is not None and not bar.n:
            bar.set_description("compiling")
        shared = {"negative": ids[:1], "guidance": numbers, "control": np.float32(control_scale)}
        pictures = np.asarray(self._run(self._placed(shape.devices), shared, inputs, shape=shape))
        jax.effects_barrier()
        if bar is not None and not shape.ticks:
            bar.update(num_model_calls(settings.sampler, settings.steps, start))
        return pictures

    def _placed(self, devices: int) -> dict:
        """The models' parameters, on so many devices."""
        if devices != self._devices:
            self._devices = devices
            self._states = jax.device_put(self._states, NamedSharding(_mesh(devices), P()))
        return self._states

    def _trace(
        self, states: dict, shared: dict, inputs: dict, *, shape: Shape
    ) -> UInt8[Array, "b h w 3"]:
        draw = functools.partial(self._draw, shape=shape)
        if shape.devices == 1:
            return draw(states, shared, inputs)
        # What has a row for each picture is split over the devices, and nothing passes between
        # them: a picture needs no other.
        count = len(inputs["seeds"])
        split = jax.tree.map(lambda a: P(_AXIS) if len(a) == count else P(), inputs)
        return jax.shard_map(
            draw,
            mesh=_mesh(shape.devices),
            in_specs=(P(), P(), split),
            out_specs=P(_AXIS),
            check_vma=False,
        )(states, shared, inputs)

    def _draw(self, states: dict, shared: dict, inputs: dict, *, shape: Shape) -> Array:
        models = {name: nnx.merge(self._graphs[name], state) for name, state in states.items()}
        count = len(inputs["seeds"])
        text = models["text_encoder"](jnp.concatenate([shared["negative"], inputs["ids"]]))
        faces = {}
        if "crops" in inputs:
            faces = self._faces(models, inputs, count, shape)
        model = guided_model(
            models["unet"],
            text=text[1:],
            negative_text=jnp.repeat(text[:1], count, axis=0),
            guidance=join_guidance(shape.guidance, shared["guidance"], self.blocks),
            control=self._control(models, inputs, shared["control"]),
            steps=shape.steps,
            **faces,
        )
        latents = self._latents(models, self._in_dtype(model, shape), inputs, shape)
        decoded = models["vae"].decode(latents / self.base.vae.scaling_factor)
        return jnp.round(255 * jnp.clip(decoded / 2 + 0.5, 0, 1)).astype(jnp.uint8)

    def _latents(self, models: dict, model: Model, inputs: dict, shape: Shape) -> Array:
        """Sampled from noise, or from what is on the canvas."""
        schedule, seeds = self.base.schedule, inputs["seeds"]
        noise = initial_noise(seeds, *shape.size, self.base.unet.in_channels)
        sample = functools.partial(
            SAMPLERS[shape.sampler],
            schedule=schedule,
            steps=shape.steps,
            start=shape.start,
            key=jax.vmap(jax.random.key)(seeds),
        )
        if "images" not in inputs:
            return sample(model, noise)
        mean, _ = models["vae"].encode(inputs["images"].astype(jnp.float32) / 127.5 - 1)
        x0, cells = mean * self.base.vae.scaling_factor, inputs["cells"]
        along = {"steps": shape.steps, "start": shape.start}
        model = keep_outside(
            model, shape.sampler, schedule, cells=cells, x0=x0, noise=noise, **along
        )
        # A canvas of which everything is to be forgotten is none, as in diffusers.
        first = noise
        if shape.start:
            first = noise_latents_for_start(schedule, shape.sampler, x0, noise, **along)
        return jnp.where(cells[..., None], sample(model, first), x0)

    def _faces(self, models: dict, inputs: dict, count: int, shape: Shape) -> dict[str, Any]:
        encoder, resampler = models["encoder"], models["resampler"]
        crops = inputs["crops"].astype(jnp.float32) / 127.5 - 1
        face = encode_face(encoder, resampler, crops, shape.guidance.combine, shape.people)
        face = jnp.broadcast_to(face, (count, *face.shape[1:]))
        photos = face.shape[1] // resampler.config.num_queries
        no_face = null_face(resampler, encoder.config.tokens, photos)
        return {
            "face": face.astype(self.dtype),
            "no_face": no_face.astype(self.dtype),
            "regions": inputs.get("regions"),
        }

    def _control(self, models: dict, inputs: dict, scale: Array) -> Control | None:
        if "control" not in inputs:
            return None
        controlnet = models["controlnet"]
        condition = controlnet.embed(inputs["control"].astype(self.dtype) / 255)

        def residuals(x, t, text):
            rows = jnp.tile(condition, (len(x) // len(condition), 1, 1, 1))
            return controlnet(x, t, text, rows, scale)

        return residuals

    def _in_dtype(self, model: Model, shape: Shape) -> Model:
        def call(x, t, i):
            if shape.ticks:
                here = jax.lax.axis_index(_AXIS) if shape.devices > 1 else 0
                jax.debug.callback(self._tick, here)
            return model(x.astype(self.dtype), t, i).astype(jnp.float32)

        return call

    def _tick(self, device: Array) -> None:
        if self._bar is not None and device == 0:
            self._bar.set_description("drawing", refresh=False)
            self._bar.update()


def _cast(state: Mapping, dtype) -> Any:
    cast = functools.partial(jnp.asarray, dtype=dtype)
    return jax.tree.map(lambda a: cast(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, state)


def _share(pictures: int, devices: int) -> int:
    """The most devices among which a batch can be split evenly."""
    return max(n for n in range(1, devices + 1) if pictures % n == 0)


def _mesh(devices: int) -> Mesh:
    return Mesh(np.asarray(jax.local_devices()[:devices]), (_AXIS,))
