"""The adapter task without weights: every array a shape, from the base's small files alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fact_convert import Pipeline
from fact_convert.models.face_encoder import find_encoder_config
from fact_convert.models.pipeline import abstract_pipeline
from fact_convert.weights import abstract_module
from fact_jax.models.resampler import Resampler
from fact_jax.models.transface import TransFace
from fact_jax.ops.precision import cast_parameters
from fact_jax.plan.jaxpr_costs import count_flops, trace
from fact_jax.utils.errors import UserError
from fact_train.config import TrainConfig
from fact_train.engine.state import make_optimizer, make_state
from fact_train.tasks import require_parts
from fact_train.tasks.adapter import AdapterTask
from fact_train.tasks.identity_loss import IdentityLoss
from fact_train.tasks.validation import PEOPLE, SCALES, STARTS, draw_rows


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

    def _load(self) -> tuple[Pipeline, TransFace]:
        pipeline, notes = abstract_pipeline(self.options.base)
        width = self.options.resampler.embedding_dim
        config, more = find_encoder_config(self.options.encoder, width)
        self.notes += notes + more
        return pipeline, abstract_module("transface", config)

    def _load_identity_encoder(self, file: str) -> TransFace:
        config, more = find_encoder_config(file, self.options.resampler.embedding_dim)
        self.notes += more
        return abstract_module("transface", config)

    def _negatives(self, identity: IdentityLoss) -> tuple[np.ndarray, np.ndarray]:
        count = identity.options.others
        return np.zeros((count, identity.config.num_classes), np.float32), np.arange(count)

    def _start_of_resampler(self, key: jax.Array) -> dict:
        return self.resampler.arrays

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
        return state, cast_parameters(frozen, config.precision)

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
    face, crop = task.face_shape, (encoder.img_size, encoder.img_size, 3)
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
    if options.point_weight:
        arrays |= {"points": ((5, 2), float32)}
    if task.identity is not None:
        arrays |= {"head": ((pixels, pixels), uint8), "warp": ((2, 3), float32)}
        arrays |= {"person": ((), int32)}
        if options.records is None:
            own = task.identity.config.img_size
            arrays |= {"own_crops": ((own, own, 3), uint8)}
    return {
        name: jax.ShapeDtypeStruct((count, *dims), dtype) for name, (dims, dtype) in arrays.items()
    }


def watched_flops(config: TrainConfig, devices: int) -> int:
    """FLOPs on each device for the pictures of people that are watched, drawn once."""

    def draw():
        task = AbstractAdapterTask(config)
        trainable, frozen = task.init(jax.random.key(0))
        unet, encoder = task.pipeline.unet.config, task.encoder
        crop, photo = ((size, size, 3) for size in (encoder.config.img_size, task.size))
        rows = {
            "ids": jnp.zeros((1, task.pipeline.tokenizer.model_max_length), jnp.int32),
            "crops": jnp.zeros((1, *crop)),
            "templates": jnp.zeros((1, *photo)),
            "noise": jnp.zeros((1, unet.sample_size, unet.sample_size, unet.in_channels)),
        }
        parts = {"vae": task.pipeline.vae, "encoder": encoder}
        return [draw_rows(task, trainable, frozen, rows, 1.0, start=s, **parts) for s in STARTS]

    return -(-PEOPLE // devices) * len(SCALES) * count_flops(trace(draw))
