"""The JAX side: a compiled call of our UNet with a face; or pictures, by the program's pipeline."""

import argparse
import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.memory import peak
from benchmarks.random_weights import random_model
from benchmarks.step_ours import device_bytes
from fact_convert import Tokenizer
from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.parts import BaseModel, FaceModels, Parts
from fact_infer.request import GenerationParams
from fact_jax.diffusion.noise_schedules import NoiseSchedule
from fact_jax.fact import Guidance
from fact_jax.models.clip_text import CLIPTextConfig
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.models.transface import TransFaceConfig
from fact_jax.models.unet import UNetConfig
from fact_jax.models.vae import VAEConfig
from fact_jax.portraits.vocabulary import caption_vocabulary
from fact_jax.utils.errors import first_line


def unet_config(name: str) -> UNetConfig:
    """The miniature's or Stable Diffusion 1.5's."""
    return UNetConfig.mini() if name == "mini" else UNetConfig.sd15()


def measure(size, arguments: argparse.Namespace) -> dict:
    """Seconds of each timed call; or of pictures."""
    if arguments.pictures:
        return _pictures(size, arguments)
    dtype = jnp.dtype(arguments.dtype)
    config = dataclasses.replace(unet_config(size.unet), face_dim=size.face_dim)
    graph, state = random_model("unet", config, arguments.dtype)
    state = jax.tree.map(jnp.asarray, state)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    batch, t = arguments.batch, jnp.asarray(500)
    x = draw(batch, size.cells, size.cells, config.in_channels)
    text = draw(batch, size.words, config.cross_attention_dim)
    keys = jax.jit(lambda state, face: nnx.merge(graph, state).face_keys(face))(
        state, draw(batch, size.face_tokens, size.face_dim)
    )
    call = jax.jit(lambda state, x, keys: nnx.merge(graph, state)(x, t, text, face=keys))
    call(state, x, keys).block_until_ready()
    times = []
    for _ in range(arguments.runs):
        start = time.perf_counter()
        out = call(state, x, keys).block_until_ready()
        times.append(time.perf_counter() - start)
    if not bool(jnp.isfinite(out).all()):
        raise SystemExit("error: the UNet's output is not finite")
    return {"jax": times}


def _pictures(size, arguments: argparse.Namespace) -> dict:
    """Seconds a picture and peak memory, without a face and with one, of each batch."""
    pipeline = random_pipeline(size, arguments.dtype)
    side = pipeline.face.encoder_config.img_size
    crops = np.random.default_rng(0).integers(0, 256, (1, 1, side, side, 3), np.uint8)
    params = GenerationParams(sampler="pndm", steps=arguments.steps, guidance=Guidance(text=5.0))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(pipeline._states))
    devices, rows = jax.devices(), []
    for batch in arguments.pictures:
        for name, faces in (("plain", None), ("face", crops)):
            row = {"side": name, "batch": batch}
            rows.append(row)
            try:
                seconds = [
                    _seconds(pipeline, batch, faces, params) for _ in range(arguments.runs + 1)
                ]
            except jax.errors.JaxRuntimeError as error:
                row["failed"] = first_line(error)
                continue
            row |= {"first_seconds": seconds[0], "seconds": [s / batch for s in seconds[1:]]}
            row |= {"device_bytes": device_bytes(), "host_bytes": peak(), "weights": weights}
    name = f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}, {arguments.dtype}"
    return {"device": name, "pictures": rows}


def _seconds(pipeline: FlaxPipeline, batch: int, faces, params: GenerationParams) -> float:
    start = time.perf_counter()
    pipeline.generate(["a portrait"] * batch, range(batch), faces, params)
    return time.perf_counter() - start


def random_pipeline(size, dtype: str) -> FlaxPipeline:
    """The program's pipeline with an adapter, on random weights."""
    kind, (vocab, merges) = "mini" if size.unet == "mini" else "sd15", caption_vocabulary()
    configs = model_configs(kind)
    unet = dataclasses.replace(configs["unet"], sample_size=size.cells)
    encoder, resampler = configs["transface"], configs["resampler"]
    parts = Parts(
        base=BaseModel(
            name=kind,
            folder=Path(),
            unet=unet,
            vae=configs["vae"],
            schedule=NoiseSchedule.sd15(),
            tokenizer=Tokenizer(
                vocab=vocab,
                merges=merges,
                model_max_length=configs["clip_text"].max_position_embeddings,
            ),
        ),
        face=FaceModels(
            adapter=Path(),
            adapter_state={},
            metadata={},
            resampler_config=resampler,
            encoder=Path(),
            encoder_state={},
            encoder_config=encoder,
        ),
    )
    kinds = {"text_encoder": "clip_text", "encoder": "transface"}
    models = {}
    for name in ("unet", "vae", "text_encoder", "resampler", "encoder"):
        kind, half = kinds.get(name, name), name in ("unet", "vae", "text_encoder")
        config = unet if name == "unet" else configs[kind]
        graph, state = random_model(kind, config, dtype if half else "float32")
        models[name] = nnx.merge(graph, jax.tree.map(jnp.asarray, state))
    return FlaxPipeline(parts, models, dtype)


def model_configs(size: str) -> dict:
    """The configuration of every kind of model, of SD 1.5's size or the miniature's."""
    if size == "mini":
        resampler, unet = ResamplerConfig.mini(), unet_config(size)
        text, vae = CLIPTextConfig.mini(len(caption_vocabulary()[0])), VAEConfig.mini()
        encoder = TransFaceConfig.mini()
    else:
        resampler, unet = ResamplerConfig.sd15(), unet_config(size)
        text, vae, encoder = CLIPTextConfig.sd15(), VAEConfig.sd15(), TransFaceConfig.vit_s()
    return {
        "unet": dataclasses.replace(unet, face_dim=resampler.output_dim),
        "vae": vae,
        "clip_text": text,
        "transface": encoder,
        "resampler": resampler,
    }
