"""Pictures by JAX: photo tokens, text, sampling and decoding in one compiled function."""

import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, UInt8
from tqdm import tqdm

from converters.adapter import attach_adapter, load_adapter
from converters.encoder import load_encoder
from converters.pipeline import load_pipeline
from converters.tokenizer import tokenize
from fact_jax.fact import Model, encode_face, guided_model, initial_noise, null_face
from fact_jax.samplers import SAMPLERS
from infer.base import Base, FaceFiles, read_base, read_face_files
from infer.pipeline import Drawer
from infer.request import Settings

_HALF_PARTS = ("unet", "text_encoder")


class FlaxPipeline(Drawer):
    """A base model, with or without a face adapter, ready to draw."""

    def __init__(
        self, base: Base, face: FaceFiles | None, models: dict[str, nnx.Module], dtype=jnp.float32
    ):
        self.base, self.face, self.dtype = base, face, jnp.dtype(dtype)
        split = {name: nnx.split(model) for name, model in models.items()}
        self._graphs = {name: graph for name, (graph, _) in split.items()}
        self._states = {name: nnx.as_pure(state) for name, (_, state) in split.items()}
        for name in _HALF_PARTS:
            self._states[name] = _cast(self._states[name], self.dtype)
        self._bar: tqdm | None = None
        self._run = jax.jit(self._trace, static_argnames=("settings", "ticks"))

    @classmethod
    def load(
        cls,
        base: str | os.PathLike | Base,
        adapter: str | os.PathLike | None = None,
        encoder: str | os.PathLike | None = None,
        dtype=jnp.float32,
        *,
        face: FaceFiles | None = None,
    ) -> "FlaxPipeline":
        """Read a diffusers folder and, for faces, an adapter file and an encoder.

        UNet and text encoder compute in ``dtype``, the rest in float32. ``face`` are adapter and
        encoder as ``read_face_files`` opened them, instead of their names.
        """
        base = base if isinstance(base, Base) else read_base(base)
        if face is None and adapter is not None:
            face = read_face_files(adapter, encoder)
        pipeline = load_pipeline(base.folder, dtype=dtype)
        models = {"unet": pipeline.unet, "vae": pipeline.vae}
        models["text_encoder"] = pipeline.text_encoder
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
        bar: tqdm | None = None,
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """One picture for each prompt, seed and person (``infer.pipeline.Drawer``)."""
        ids, _ = tokenize(self.base.tokenizer, [settings.negative, *prompts])
        self._bar = bar
        if bar is not None and not bar.n:
            bar.set_description("compiling")
        pictures = self._run(
            self._states,
            ids,
            None if crops is None else jnp.asarray(crops),
            jnp.asarray(seeds, jnp.int32),
            settings=settings.settings(),
            ticks=bar is not None,
        )
        pictures = np.asarray(pictures)
        jax.effects_barrier()
        return pictures

    def _trace(
        self,
        states: dict,
        ids: Int[Array, "b_and_negative n"],
        crops: UInt8[Array, "#b p s s 3"] | None,
        seeds: Int[Array, " b"],
        *,
        settings: Settings,
        ticks: bool,
    ) -> UInt8[Array, "b h w 3"]:
        models = {name: nnx.merge(self._graphs[name], state) for name, state in states.items()}
        count = seeds.shape[0]
        text = models["text_encoder"](ids)
        faces = {} if crops is None else self._faces(models, crops, count)
        model = guided_model(
            models["unet"],
            text=text[1:],
            negative_text=jnp.repeat(text[:1], count, axis=0),
            guidance=settings.guidance,
            steps=settings.steps,
            **faces,
        )
        height, width = self.base.latent_size(settings)
        noise = initial_noise(seeds, height, width, self.base.unet.in_channels)
        latents = SAMPLERS[settings.sampler](
            self._in_dtype(model, ticks),
            noise,
            self.base.schedule,
            steps=settings.steps,
            key=jax.vmap(jax.random.key)(seeds),
        )
        decoded = models["vae"].decode(latents / self.base.vae.scaling_factor)
        return jnp.round(255 * jnp.clip(decoded / 2 + 0.5, 0, 1)).astype(jnp.uint8)

    def _faces(self, models: dict, crops: UInt8[Array, "#b p s s 3"], count: int) -> dict:
        encoder, resampler = models["encoder"], models["resampler"]
        face = encode_face(encoder, resampler, crops.astype(jnp.float32) / 127.5 - 1)
        face = jnp.broadcast_to(face, (count, *face.shape[1:]))
        no_face = null_face(resampler, encoder.config.tokens, crops.shape[1])
        return {"face": face.astype(self.dtype), "no_face": no_face.astype(self.dtype)}

    def _in_dtype(self, model: Model, ticks: bool) -> Model:
        def call(x, t, i):
            if ticks:
                jax.debug.callback(self._tick)
            return model(x.astype(self.dtype), t, i).astype(jnp.float32)

        return call

    def _tick(self) -> None:
        if self._bar is not None:
            self._bar.set_description("drawing", refresh=False)
            self._bar.update()


def _cast(state, dtype):
    cast = functools.partial(jnp.asarray, dtype=dtype)
    return jax.tree.map(lambda a: cast(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, state)
