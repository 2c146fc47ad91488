"""The adapter task without weights: every array a shape, from the base's small files alone."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fact_convert import Pipeline, Tokenizer
from fact_convert.io.json_io import read_json
from fact_convert.models.pipeline import PARTS
from fact_convert.models.tokenizer import read_tokenizer
from fact_convert.weights import abstract_module, read_config
from fact_jax.diffusion.noise_schedules import NoiseSchedule
from fact_jax.models.clip_text import CLIPTextConfig
from fact_jax.models.resampler import Resampler
from fact_jax.models.transface import TransFace, TransFaceConfig
from fact_jax.models.unet import UNetConfig
from fact_jax.models.vae import VAEConfig
from fact_jax.portraits.vocabulary import caption_vocabulary
from fact_jax.utils.errors import UserError
from fact_train.config import TrainConfig
from fact_train.engine.state import make_optimizer, make_state
from fact_train.engine.step import cast
from fact_train.tasks import require_parts
from fact_train.tasks.adapter import AdapterTask

SD15 = {"unet": UNetConfig.sd15(), "vae": VAEConfig.sd15(), "text_encoder": CLIPTextConfig.sd15()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractStep:
    """A task and the shapes that its step takes. ``notes`` say what was assumed."""

    config: TrainConfig
    task: AdapterTask
    state: PyTree
    frozen: PyTree
    batch: dict[str, jax.ShapeDtypeStruct]
    notes: tuple[str, ...]


class AbstractAdapterTask(AdapterTask):
    """The task on a base of zeros. Build it under ``jax.eval_shape``: there they take no memory."""

    def __init__(self, config: TrainConfig):
        self.notes: list[str] = []
        super().__init__(config)

    def _load(self) -> tuple[Pipeline, TransFace]:
        return _pipeline(self.options.base, self.notes), self._encoder()

    def _encoder(self) -> TransFace:
        folder = Path(self.options.encoder)
        if (folder / "config.json").is_file():
            return abstract_module(
                "transface", read_config("transface", read_json(folder / "config.json"))
            )
        wide = self.options.resampler.embedding_dim
        sizes = (TransFaceConfig.vit_s(), TransFaceConfig.vit_t(), TransFaceConfig.vit_l())
        config = next((size for size in sizes if size.embed_dim == wide), None)
        if config is None:
            raise UserError(
                f"{folder}: no config.json there, and no public TransFace is {wide} wide "
                "(options.resampler.embedding_dim)"
            )
        self.notes.append(f"{folder} is no folder here: a TransFace of width {wide} is assumed")
        return abstract_module("transface", config)

    def _new_resampler(self, rngs: nnx.Rngs) -> Resampler:
        return Resampler(self.options.resampler, rngs=rngs)


def build(config: TrainConfig) -> AbstractStep:
    """Shapes of the state, of the frozen base as it lies on the device, and of a batch."""
    if config.task != "adapter":
        raise UserError(f"plan knows the task 'adapter' only, this is {config.task!r}")
    # A start from an adapter file has the same shapes as a start from nothing.
    config = dataclasses.replace(config, options=dataclasses.replace(config.options, weights=None))
    require_parts(config)
    built: list[AbstractAdapterTask] = []

    def init():
        built.append(AbstractAdapterTask(config))
        params, frozen = built[0].init(jax.random.key(0))
        state = make_state(params, make_optimizer(config.optimizer), config.ema)
        return state, cast(frozen, config.precision)

    state, frozen = jax.eval_shape(init)
    return AbstractStep(
        config=config,
        task=built[0],
        state=state,
        frozen=frozen,
        batch=batch_shapes(built[0], config.batch_size),
        notes=tuple(built[0].notes),
    )


def batch_shapes(task: AdapterTask, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What the task's source gives a step of so many samples."""
    options, unet, encoder = task.options, task.pipeline.unet.config, task.encoder.config
    side, pixels = unet.sample_size, task.size
    words, width = task.pipeline.tokenizer.model_max_length, unet.cross_attention_dim
    float32, float16, int32, uint8 = jnp.float32, jnp.float16, jnp.int32, jnp.uint8
    latents = (side, side, unet.in_channels)
    face, crop = (encoder.tokens, encoder.embed_dim), (encoder.img_size, encoder.img_size, 3)
    arrays: dict[str, tuple[tuple[int, ...], DTypeLike]] = {"mask": ((side, side), float32)}
    if options.cache is not None:
        arrays |= {"mean": (latents, float32), "log_variance": (latents, float32)}
        arrays |= {"text": ((words, width), float32)}
        arrays |= {"tokens": (face, float32), "partner": (face, float32)}
    elif options.records is not None:
        arrays |= {"images": ((pixels, pixels, 3), uint8), "ids": ((words,), int32)}
        arrays |= {"crops": (crop, uint8), "partner_crops": (crop, uint8)}
    else:
        arrays |= {"latents": (latents, float32), "ids": ((words,), int32)}
        arrays |= {"tokens": (face, float16), "partner": (face, float16)}
    return {
        name: jax.ShapeDtypeStruct((count, *dims), dtype) for name, (dims, dtype) in arrays.items()
    }


def _pipeline(base: str, notes: list[str]) -> Pipeline:
    folder = Path(base)
    if not folder.is_dir():
        notes.append(f"{base} is no folder here: the shapes of Stable Diffusion 1.5 are assumed")
        vocab, merges = caption_vocabulary()  # any will do: its ids are never looked at
        return Pipeline(
            **{part: abstract_module(PARTS[part][0], config) for part, config in SD15.items()},
            tokenizer=Tokenizer(vocab=vocab, merges=merges),
            schedule=NoiseSchedule.sd15(),
        )
    models = {
        part: abstract_module(kind, read_config(kind, read_json(folder / part / "config.json")))
        for part, (kind, _) in PARTS.items()
    }
    text = models["text_encoder"].config
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return Pipeline(
        **models,
        tokenizer=read_tokenizer(
            folder / "tokenizer", text.max_position_embeddings, text.vocab_size
        ),
        schedule=NoiseSchedule.from_dict(scheduler),
    )
