"""Generation in JAX: photo tokens and text, the guided UNet, and decoding, each compiled."""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, PyTree, UInt8
from tqdm import tqdm

from fact_convert.models.adapter import COUPLED, PARALLEL, attach_adapter, form_of, load_adapter
from fact_convert.models.controlnet import load_controlnet
from fact_convert.models.face_encoder import load_encoder
from fact_convert.models.pipeline import load_pipeline
from fact_infer.jax.devices import mesh, over_devices, share
from fact_infer.parts import Parts
from fact_infer.pipeline import GenerationInputs, Pipeline
from fact_jax.diffusion.noise_schedules import signal_and_noise, split_output
from fact_jax.diffusion.samplers import (
    SAMPLERS,
    masked_denoiser,
    noise_latents_for_start,
    python_loop,
)
from fact_jax.fact import (
    Branch,
    Combine,
    Model,
    condition_shape,
    encode_face,
    guided_conditions,
    guided_output,
    initial_noise,
    null_face,
)
from fact_jax.ops.precision import cast_parameters, matmul_precision, precision_of, storage_dtype
from fact_jax.utils.cache import ContentCache
from fact_jax.utils.pixels import denormalize_pixels, normalize_pixels

_HALF_PARTS = ("unet", "plain unet", "text_encoder", "controlnet")
_UNMASKED_PHOTOS = 2
MAX_SHAPES = 8
"""Of so many shapes of requests the compiled programs stay in memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticParams:
    """What the programs depend on beside the shapes of their arrays.

    Samplers, steps, prompts, seeds and all numbers of a guidance need no new one. ``count`` is how
    many pictures there are, of which each of ``devices`` draws its share.
    """

    count: int
    size: tuple[int, int]
    people: int
    branches: tuple[Branch, ...]
    combine: Combine
    devices: int = 1


class FlaxPipeline(Pipeline):
    """Generation in JAX, whose UNet, text encoder and ControlNet compute in ``dtype``.

    Three programs are compiled for each ``StaticParams``: what is done once before the steps, the
    guided UNet, and what is done once after them. With several devices each draws its share of a
    batch. Prompts and faces are encoded before, once for each content.
    """

    def __init__(self, parts: Parts, models: dict[str, nnx.Module], dtype: Any = "float32"):
        super().__init__(parts)
        self.precision = precision_of(dtype)
        self.dtype = storage_dtype(self.precision)
        split = {name: nnx.split(model) for name, model in models.items()}
        self._graphs = {name: graph for name, (graph, _) in split.items()}
        self._states = {name: nnx.as_pure(state) for name, (_, state) in split.items()}
        for name in set(_HALF_PARTS) & set(models):
            self._states[name] = cast_parameters(self._states[name], self.precision)
        self._devices = 1
        self._shapes: set = set()
        self._cache = ContentCache()
        self._encode_text = jax.jit(self._text_rows)
        self._encode_face = jax.jit(self._face_rows, static_argnames=("combine", "people"))
        self._prepare = over_devices(self._prepare_rows)
        self._denoise = over_devices(self._denoise_rows)
        self._decode = over_devices(self._decode_rows)

    @classmethod
    def from_parts(cls, parts: Parts, dtype: Any = "float32") -> Self:
        stored = storage_dtype(precision_of(dtype))
        pipeline = load_pipeline(parts.base.weights_folder(), dtype=stored, loras=parts.loras)
        models = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
        if parts.controlnet is not None:
            models["controlnet"] = load_controlnet(parts.controlnet, dtype=stored)
        if (face := parts.face) is not None:
            config = face.resampler_config
            trained = load_adapter(face.adapter, resampler_config=config, variations=True)
            if form_of(trained.metadata) == COUPLED:  # its cross-attention is not the base's
                models["plain unet"] = models["unet"]
            models["unet"] = attach_adapter(models["unet"], trained)
            models["resampler"] = trained.resampler
            models["encoder"] = load_encoder(face.encoder, config=face.encoder_config)
        return cls(parts, models, dtype)

    @property
    def parallel(self) -> bool:
        """Whether the adapter is of the other form, see ``fact_jax.models.adapter``."""
        return self.face is not None and form_of(self.face.metadata) == PARALLEL

    def _products(self) -> AbstractContextManager[None]:
        return matmul_precision(self.precision)

    def _generate(self, inputs: GenerationInputs, bar: tqdm | None) -> UInt8[np.ndarray, "b h w 3"]:
        shape, shared, rows = self._inputs_of_prepare(inputs)
        of_steps = self._inputs_of_steps(inputs, shared["photo_mask"])
        self._limit_programs(shape, {**rows, **of_steps["controls"]})
        states = self._placed(shape.devices)
        if bar is not None and not bar.n:
            bar.set_description("compiling")
        shared, rows = self._encoded(states, shared, rows, shape)
        conditions, noise, keys, x0 = self._prepare(states, shared, rows, shape=shape)
        denoise = functools.partial(self._denoise, states, jax.device_put(of_steps), shape=shape)
        with _Progress(bar) as progress:

            def model(x: Array, t: Array, i: Array) -> Array:
                rows = {"x": x, "conditions": conditions}
                output = progress(denoise(rows, t.astype(jnp.float32), i))
                progress.show(lambda: self._so_far(states, x, output, t, shape))
                return output

            latents = self._sample(model, inputs, noise, keys, x0)
        return np.asarray(self._decode(states, {}, latents, shape=shape))

    def _so_far(
        self, states: dict, x: Array, output: Array, t: Array, shape: StaticParams
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """The pictures that an output of the UNet points at."""
        schedule, t = self.base.schedule, jnp.rint(t).astype(jnp.int32)  # Euler's are fractions
        x0, _ = split_output(schedule, output, x, *signal_and_noise(schedule, t, x.ndim))
        return np.asarray(self._decode(states, {}, x0, shape=shape))

    def _encoded(
        self, states: dict, shared: dict, rows: dict, shape: StaticParams
    ) -> tuple[dict, dict]:
        """The inputs of ``_prepare``: prompts and crops encoded, each content once.

        The negative prompt's states are shared.
        """
        cache, rows, mask = self._cache, dict(rows), shared["photo_mask"]

        def encode(program: Callable, row: np.ndarray, **how: Any) -> np.ndarray:
            # Off the devices, of which the next request may take others.
            run = functools.partial(program, states, row[None], **how)
            return cache.get(lambda: np.asarray(run()), row, *how.values())

        ids = np.concatenate([shared["negative"], rows.pop("ids")])
        text = [encode(self._encode_text, row) for row in ids]
        rows["text"] = np.concatenate(text[1:])
        if "crops" in rows:
            how = {"mask": mask, "combine": shape.combine, "people": shape.people}
            faces = [encode(self._encode_face, row, **how) for row in rows.pop("crops")]
            rows["face"] = np.concatenate(faces)
        return shared | {"negative": text[0]}, rows

    def _inputs_of_prepare(self, inputs: GenerationInputs) -> tuple[StaticParams, dict, dict]:
        """What the first program takes, shared and for each picture, and the shape of all three."""
        guidance, photo_mask = inputs.guidance, None
        rows: PyTree = {"ids": inputs.token_ids[1:], "seeds": inputs.seeds}
        if inputs.crops is not None:
            rows["crops"], photo_mask = pad_photos(inputs.crops, guidance.people)
        if inputs.img2img is not None:
            rows["images"] = inputs.img2img.images
        if guidance.regions is not None:
            rows["regions"] = dict(guidance.regions)
        if inputs.control is not None:
            rows["control"] = inputs.control
        shape = StaticParams(
            count=len(inputs.seeds),
            size=inputs.size,
            people=guidance.people,
            branches=guidance.branches,
            combine=inputs.params.guidance.combine,
            devices=share(len(inputs.seeds), jax.local_device_count()),
        )
        return shape, {"negative": inputs.token_ids[:1], "photo_mask": photo_mask}, rows

    def _inputs_of_steps(
        self, inputs: GenerationInputs, photo_mask: Bool[np.ndarray, " photos"] | None
    ) -> dict[str, Any]:
        """What all calls of the UNet share beside the conditions."""
        guidance = inputs.guidance
        controls = {} if guidance.cap is None else {"cap": guidance.cap, "adain": guidance.adain}
        return {
            "weights": guidance.weights,
            "controls": controls,
            "strengths": self._strengths(inputs),
            "control": np.float32(inputs.control_scale),
            "photo_mask": photo_mask,
        }

    def _strengths(self, inputs: GenerationInputs) -> Float[np.ndarray, "bound blocks"]:
        """The adapter's strength by step and block, of one shape however many steps there are."""
        guidance, start = inputs.guidance, inputs.start
        bound, blocks = self.base.schedule.num_train_timesteps, len(guidance.block_factors)
        strengths = np.zeros((bound, blocks), np.float32)
        strengths[start : inputs.params.steps] = (
            guidance.step_scales[:, None] * guidance.block_factors
        )
        return strengths

    def _placed(self, devices: int) -> dict:
        """The models' parameters, on so many devices."""
        if devices != self._devices:
            self._devices = devices
            self._states = jax.device_put(self._states, NamedSharding(mesh(devices), P()))
        return self._states

    def _limit_programs(self, shape: StaticParams, arrays: dict) -> None:
        """Keep the memory of a long-lived process bounded, whatever sizes it is asked for."""
        self._shapes.add((shape, str(jax.tree.map(np.shape, arrays))))
        if len(self._shapes) > MAX_SHAPES:
            self._shapes = set()
            jax.clear_caches()  # those of the samplers' single operations too, one a size

    def _sample(
        self,
        model: Model,
        inputs: GenerationInputs,
        noise: Float[Array, "b h w c"],
        keys: Array,
        x0: Float[Array, "b h w c"] | None,
    ) -> Float[Array, "b h w c"]:
        """Latents from noise, or from the picture that is drawn over, whose latents are ``x0``."""
        schedule, sampler = self.base.schedule, inputs.params.sampler
        along = {"steps": inputs.params.steps, "start": inputs.start}
        sample = functools.partial(
            SAMPLERS[sampler], schedule=schedule, key=keys, loop=python_loop, **along
        )
        if inputs.img2img is None or x0 is None:
            return sample(model, noise)
        mask = jax.device_put(inputs.img2img.latent_mask, x0.sharding)
        masked = {"latent_mask": mask, "x0": x0, "noise": noise}
        model = masked_denoiser(model, sampler, schedule, **masked, **along)
        # At strength 1 nothing of the picture is kept, as in diffusers.
        first = noise
        if inputs.start:
            first = noise_latents_for_start(schedule, sampler, x0, noise, **along)
        return jnp.where(mask[..., None], sample(model, first), x0)

    def _prepare_rows(
        self, states: dict, shared: dict, inputs: dict, *, shape: StaticParams
    ) -> tuple:
        """Conditions, unit noise, each picture's key, and the latents of what is drawn over."""
        models = self._models(states)
        seeds, count = inputs["seeds"], len(inputs["seeds"])
        if "ids" in inputs:  # not encoded yet: planned as one program
            shared = shared | {"negative": self._text_rows(states, shared["negative"])}
            inputs = inputs | {"text": self._text_rows(states, inputs["ids"])}
        if "crops" in inputs:
            how = shared["photo_mask"], shape.combine, shape.people
            face = self._face_rows(states, inputs["crops"], *how)
            inputs = inputs | {"face": face}
        faces = self._faces(models, inputs, count) if "face" in inputs else {}
        conditions = {
            "text and face": guided_conditions(
                models["unet"],
                text=inputs["text"],
                negative_text=jnp.repeat(shared["negative"], count, axis=0),
                branches=shape.branches,
                **faces,
            )
        }
        if "control" in inputs:
            pictures = inputs["control"].astype(self.dtype) / 255
            conditions["control"] = models["controlnet"].embed(pictures)
        x0 = None
        if "images" in inputs:
            mean, _ = models["vae"].encode(normalize_pixels(inputs["images"]))
            x0 = mean * self.base.vae.scaling_factor
        noise = initial_noise(seeds, *shape.size, self.base.unet.in_channels)
        return conditions, noise, jax.vmap(jax.random.key)(seeds), x0

    def _text_rows(self, states: dict, ids: Array) -> Float[Array, "b n d"]:
        return self._models(states)["text_encoder"](ids)

    def _face_rows(
        self, states: dict, crops: Array, mask: Array | None, combine: Combine, people: int
    ) -> Float[Array, "c m d"]:
        models, crops = self._models(states), normalize_pixels(crops)
        return encode_face(models["encoder"], models["resampler"], crops, combine, people, mask)

    def _faces(self, models: dict, inputs: dict, count: int) -> dict[str, Any]:
        encoder, resampler, face = models["encoder"], models["resampler"], inputs["face"]
        face = jnp.broadcast_to(face, (count, *face.shape[1:]))
        photos = face.shape[1] // resampler.config.num_queries
        tokens, _ = condition_shape(encoder.config, resampler.config)
        faces = {"face": face, "no_face": null_face(resampler, tokens, photos)}
        cast = {name: array.astype(self.dtype) for name, array in faces.items()}
        return {**cast, "regions": inputs.get("regions")}

    def _denoise_rows(
        self, states: dict, shared: dict, rows: dict, t: Array, i: Array, *, shape: StaticParams
    ) -> Float[Array, "b h w c"]:
        """The UNet's output for latents, float32."""
        models, conditions, control = self._models(states), rows["conditions"], None
        if "control" in conditions:

            def control(x, t, text):
                branches = len(x) // len(conditions["control"])
                embedded = jnp.tile(conditions["control"], (branches, 1, 1, 1))
                return models["controlnet"](x, t, text, embedded, shared["control"])

        token_mask = None
        if shared["photo_mask"] is not None and shape.combine == "concat":
            queries = models["resampler"].config.num_queries
            token_mask = jnp.tile(jnp.repeat(shared["photo_mask"], queries), shape.people)
        given = conditions["text and face"]
        coupled = given.face is not None or "plain unet" not in models
        out = guided_output(
            models["unet" if coupled else "plain unet"],
            given,
            shared["weights"],
            rows["x"].astype(self.dtype),
            t,
            list(shared["strengths"][i]),
            control,
            token_mask,
            parallel=self.parallel,
            **shared["controls"],
        )
        return out.astype(jnp.float32)

    def _decode_rows(
        self, states: dict, shared: dict, latents: Array, *, shape: StaticParams
    ) -> UInt8[Array, "b h w 3"]:
        vae = self._models(states)["vae"]
        return denormalize_pixels(vae.decode(latents / self.base.vae.scaling_factor))

    def modules(self) -> dict[str, Any]:
        """The models by name (``unet``, ``vae``, ...), for measures of what they do inside."""
        return self._models(self._states)

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

    def show(self, pictures: Callable[[], np.ndarray]) -> None:
        """Offer what is there so far, where the bar is one that shows it."""
        if (show := getattr(self._bar, "show", None)) is not None:
            show(pictures)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.block_until_ready()
            if self._bar is not None:
                self._bar.set_description("drawing", refresh=False)
                self._bar.update()


def pad_photos(
    crops: UInt8[np.ndarray, "c p s s 3"], people: int
) -> tuple[UInt8[np.ndarray, "c q s s 3"], Bool[np.ndarray, " photos"] | None]:
    """Each person's photos padded to a power of two, and the mask of those that are no padding.

    None where two photos or fewer are all there: their programs need no mask.
    """
    count, photos = len(crops), crops.shape[1] // people
    own = crops.reshape(count, people, photos, *crops.shape[2:])
    padded = 1 << (photos - 1).bit_length()
    rows = np.minimum(np.arange(padded), photos - 1)
    mask = None if padded <= _UNMASKED_PHOTOS else np.arange(padded) < photos
    return own[:, :, rows].reshape(count, people * padded, *crops.shape[2:]), mask
