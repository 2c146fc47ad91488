"""Pictures by JAX: photo tokens and text, the guided UNet, and decoding, each compiled."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from fact_convert.lora import read_lora
from fact_convert.models.adapter import attach_adapter, load_adapter
from fact_convert.models.controlnet import load_controlnet
from fact_convert.models.face_encoder import load_encoder
from fact_convert.models.pipeline import load_pipeline
from fact_convert.models.tokenizer import tokenize
from fact_infer.base_model import Base, FaceFiles, check_crops
from fact_infer.guidance import Shape, block_strengths, pad_photos, split_guidance
from fact_infer.img2img import Canvas
from fact_infer.parts import open_parts
from fact_infer.pipeline import Drawer
from fact_infer.request import Settings
from fact_jax.diffusion.samplers import (
    SAMPLERS,
    masked_denoiser,
    noise_latents_for_start,
    python_loop,
)
from fact_jax.fact import (
    Model,
    encode_face,
    guided_conditions,
    guided_output,
    initial_noise,
    null_face,
)
from fact_jax.regions import region_masks
from fact_jax.utils.errors import UserError

_HALF_PARTS = ("unet", "text_encoder", "controlnet")
_AXIS = "pictures"
MAX_SHAPES = 8
"""Of so many shapes of requests the compiled programs stay in memory."""


class FlaxPipeline(Drawer):
    """A base model, with or without a face adapter, ready to draw.

    Three programs are compiled for each shape of a request (``fact_infer.guidance.Shape``): what is
    done once before the steps, the guided UNet, and what is done once after them. With several
    devices each draws its share of a batch.
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
        self._shapes: set = set()
        self._prepare = _over_devices(self._prepare_rows)
        self._denoise = _over_devices(self._denoise_rows)
        self._decode = _over_devices(self._decode_rows)

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
        pipeline = load_pipeline(base.whole(), dtype=dtype, loras=added)
        models = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
        if controlnet is not None:
            models["controlnet"] = load_controlnet(controlnet, dtype=dtype)
        if face is not None:
            trained = load_adapter(face.adapter, resampler_config=face.resampler_config)
            models["unet"] = attach_adapter(models["unet"], trained)
            models["resampler"] = trained.resampler
            models["encoder"] = load_encoder(face.encoder, config=face.encoder_config)
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
        """One picture for each prompt, seed and person (``fact_infer.pipeline.Drawer``).

        ``control`` are pictures for the ControlNet (poses, edges), as large as what is drawn.
        """
        check_crops(self.face, crops)
        ids, _ = tokenize(self.base.tokenizer, [settings.negative, *prompts])
        size, start, photo_mask = self.base.latent_size(settings), 0, None
        people = 1 if regions is None else regions.shape[1]
        inputs = {"ids": ids[1:], "seeds": np.asarray(seeds, np.int32)}
        if crops is not None:
            inputs["crops"], photo_mask = pad_photos(crops, people)
        if canvas is not None:
            canvas.check(self.base, settings, len(prompts))
            start = canvas.start(settings.steps)
            inputs["images"] = canvas.images
        if regions is not None:
            levels = len(self.base.unet.block_out_channels)
            inputs["regions"] = dict(region_masks(regions, size, levels))
        if control is not None:
            if "controlnet" not in self._graphs:
                raise UserError("a control picture was given, but no ControlNet to look at it")
            inputs["control"] = np.broadcast_to(control, (len(seeds), *control.shape[1:]))
        guidance, numbers = split_guidance(settings.guidance)
        shape = Shape(
            count=len(seeds),
            size=size,
            people=people,
            guidance=guidance,
            devices=_share(len(seeds), jax.local_device_count()),
        )
        self._forget_programs(shape, inputs)
        states = self._placed(shape.devices)
        if bar is not None and not bar.n:
            bar.set_description("compiling")
        shared = {"negative": ids[:1], "photo_mask": photo_mask}
        conditions, noise, keys, x0 = self._prepare(states, shared, inputs, shape=shape)
        bound = self.base.schedule.num_train_timesteps
        shared = {
            "numbers": numbers,
            "strengths": block_strengths(
                settings.guidance, settings.steps, start, self.blocks, bound
            ),
            "control": np.float32(control_scale),
            "photo_mask": photo_mask,
        }
        denoise = functools.partial(self._denoise, states, jax.device_put(shared), shape=shape)
        with _Progress(bar) as progress:

            def model(x: Array, t: Array, i: Array) -> Array:
                rows = {"x": x, "conditions": conditions}
                return progress(denoise(rows, t.astype(jnp.float32), i))

            latents = self._sample(model, settings, start, noise, keys, canvas, x0)
        return np.asarray(self._decode(states, {}, latents, shape=shape))

    def _placed(self, devices: int) -> dict:
        """The models' parameters, on so many devices."""
        if devices != self._devices:
            self._devices = devices
            self._states = jax.device_put(self._states, NamedSharding(_mesh(devices), P()))
        return self._states

    def _forget_programs(self, shape: Shape, inputs: dict) -> None:
        """Keep the memory of a long-lived process bounded, whatever sizes it is asked for."""
        self._shapes.add((shape, str(jax.tree.map(np.shape, inputs))))
        if len(self._shapes) > MAX_SHAPES:
            self._shapes = set()
            for program in (self._prepare, self._denoise, self._decode):
                program.clear_cache()

    def _sample(
        self,
        model: Model,
        settings: Settings,
        start: int,
        noise: Float[Array, "b h w c"],
        keys: Array,
        canvas: Canvas | None,
        x0: Float[Array, "b h w c"] | None,
    ) -> Float[Array, "b h w c"]:
        """Latents from noise, or from what is on the canvas."""
        schedule, sampler = self.base.schedule, settings.sampler
        along = {"steps": settings.steps, "start": start}
        sample = functools.partial(
            SAMPLERS[sampler], schedule=schedule, key=keys, loop=python_loop, **along
        )
        if canvas is None:
            return sample(model, noise)
        mask = jax.device_put(canvas.cells, x0.sharding)
        inputs = {"latent_mask": mask, "x0": x0, "noise": noise}
        model = masked_denoiser(model, sampler, schedule, **inputs, **along)
        # A canvas of which everything is to be forgotten is none, as in diffusers.
        first = noise
        if start:
            first = noise_latents_for_start(schedule, sampler, x0, noise, **along)
        return jnp.where(mask[..., None], sample(model, first), x0)

    def _prepare_rows(self, states: dict, shared: dict, inputs: dict, *, shape: Shape) -> tuple:
        """Conditions, unit noise, each picture's key, and the latents of what is drawn over."""
        models = self._models(states)
        seeds, count = inputs["seeds"], len(inputs["seeds"])
        text = models["text_encoder"](jnp.concatenate([shared["negative"], inputs["ids"]]))
        faces = {}
        if "crops" in inputs:
            faces = self._faces(models, inputs, shared["photo_mask"], count, shape)
        conditions = {
            "branches": guided_conditions(
                models["unet"],
                text=text[1:],
                negative_text=jnp.repeat(text[:1], count, axis=0),
                guidance=shape.guidance,
                **faces,
            )
        }
        if "control" in inputs:
            pictures = inputs["control"].astype(self.dtype) / 255
            conditions["control"] = models["controlnet"].embed(pictures)
        x0 = None
        if "images" in inputs:
            mean, _ = models["vae"].encode(inputs["images"].astype(jnp.float32) / 127.5 - 1)
            x0 = mean * self.base.vae.scaling_factor
        noise = initial_noise(seeds, *shape.size, self.base.unet.in_channels)
        return conditions, noise, jax.vmap(jax.random.key)(seeds), x0

    def _faces(
        self, models: dict, inputs: dict, photo_mask: Array | None, count: int, shape: Shape
    ) -> dict[str, Any]:
        encoder, resampler = models["encoder"], models["resampler"]
        crops = inputs["crops"].astype(jnp.float32) / 127.5 - 1
        face = encode_face(
            encoder, resampler, crops, shape.guidance.combine, shape.people, photo_mask
        )
        face = jnp.broadcast_to(face, (count, *face.shape[1:]))
        photos = face.shape[1] // resampler.config.num_queries
        no_face = null_face(resampler, encoder.config.tokens, photos)
        return {
            "face": face.astype(self.dtype),
            "no_face": no_face.astype(self.dtype),
            "regions": inputs.get("regions"),
        }

    def _denoise_rows(
        self, states: dict, shared: dict, rows: dict, t: Array, i: Array, *, shape: Shape
    ) -> Float[Array, "b h w c"]:
        """The UNet's output for latents, float32."""
        models, conditions, control = self._models(states), rows["conditions"], None
        if "control" in conditions:

            def control(x, t, text):
                branches = len(x) // len(conditions["control"])
                embedded = jnp.tile(conditions["control"], (branches, 1, 1, 1))
                return models["controlnet"](x, t, text, embedded, shared["control"])

        token_mask = None
        if shared["photo_mask"] is not None and shape.guidance.combine == "concat":
            queries = models["resampler"].config.num_queries
            token_mask = jnp.tile(jnp.repeat(shared["photo_mask"], queries), shape.people)
        out = guided_output(
            models["unet"],
            conditions["branches"],
            dataclasses.replace(shape.guidance, **shared["numbers"]),
            rows["x"].astype(self.dtype),
            t,
            list(shared["strengths"][i]),
            control,
            token_mask,
        )
        return out.astype(jnp.float32)

    def _decode_rows(
        self, states: dict, shared: dict, latents: Array, *, shape: Shape
    ) -> UInt8[Array, "b h w 3"]:
        vae = self._models(states)["vae"]
        decoded = vae.decode(latents / self.base.vae.scaling_factor)
        return jnp.round(255 * jnp.clip(decoded / 2 + 0.5, 0, 1)).astype(jnp.uint8)

    def _models(self, states: dict) -> dict[str, Any]:
        return {name: nnx.merge(self._graphs[name], state) for name, state in states.items()}


class _Progress:
    """Waits for the model's last but one output, and moves a bar by one for each that is there.

    So the device always has a step to do, and the bar and an interrupt are at most one behind.
    """

    def __init__(self, bar: tqdm | None):
        self._bar, self._last = bar, None

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self._wait()

    def __call__(self, output: Array) -> Array:
        self._wait()
        self._last = output
        return output

    def _wait(self) -> None:
        if self._last is not None:
            self._last.block_until_ready()
            if self._bar is not None:
                self._bar.set_description("drawing", refresh=False)
                self._bar.update()


def _over_devices(function: Callable) -> Callable:
    """The function of (states, shared, rows, *more), compiled; each device has its share of rows.

    Nothing passes between devices: a picture needs no other.
    """

    def run(states: dict, shared: dict, rows: Any, *more: Array, shape: Shape) -> Any:
        call = functools.partial(function, shape=shape)
        if shape.devices == 1:
            return call(states, shared, rows, *more)
        split = jax.tree.map(lambda a: P() if len(a) % shape.count else P(_AXIS), rows)
        return jax.shard_map(
            call,
            mesh=_mesh(shape.devices),
            in_specs=(P(), P(), split, *(P() for _ in more)),
            out_specs=P(_AXIS),
            check_vma=False,
        )(states, shared, rows, *more)

    run.__name__ = function.__name__  # what profiles and the programs kept on disk are called
    return jax.jit(run, static_argnames="shape")


def _cast(state: Mapping, dtype) -> Any:
    cast = functools.partial(jnp.asarray, dtype=dtype)
    return jax.tree.map(lambda a: cast(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, state)


def _share(pictures: int, devices: int) -> int:
    """The most devices among which a batch can be split evenly."""
    return max(n for n in range(1, devices + 1) if pictures % n == 0)


def _mesh(devices: int) -> Mesh:
    return Mesh(np.asarray(jax.local_devices()[:devices]), (_AXIS,))
