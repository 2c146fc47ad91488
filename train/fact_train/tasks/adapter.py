"""Train FACT: the resampler and the face adapters, on a frozen base and a frozen encoder.

L = MSE + lambda FAIR, with drop, shuffle and a curriculum (arXiv 2410.12312).
"""

import contextlib
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from fact_convert import Pipeline, load_encoder, load_pipeline, save_adapter, tokenize
from fact_convert.models.adapter import COUPLED, PARALLEL
from fact_convert.weights import abstract_state
from fact_jax.curriculum import draw_drop, draw_shuffle, stage_values
from fact_jax.diffusion.noise_schedules import (
    add_noise,
    offset_noise,
    signal_and_noise,
    split_output,
    training_target,
)
from fact_jax.face.mask import near_points
from fact_jax.fact import condition_shape
from fact_jax.losses import denoising_error, fair_ratio, min_snr_weight
from fact_jax.models.adapter import FaceControls
from fact_jax.models.resampler import Resampler
from fact_jax.models.transface import TransFace
from fact_jax.models.unet import UNet
from fact_jax.portraits import SPLITS
from fact_jax.sharding import make_mesh
from fact_jax.utils.errors import UserError
from fact_train.config import TrainConfig
from fact_train.data.array_source import PairedArrays
from fact_train.data.cached_dataset import CachedDataset
from fact_train.data.frozen_encoders import FrozenEncoders
from fact_train.data.loader import Dataset, GrainSource
from fact_train.data.pixel_dataset import PixelDataset, open_records
from fact_train.data.pixels import encode_tokens
from fact_train.data.portraits import draw_crops
from fact_train.data.records import DamagedError
from fact_train.engine.partition import (
    assert_covers,
    merge,
    paths,
    split_by_paths,
    split_module,
)
from fact_train.engine.sample_keys import (
    sample_bernoulli,
    sample_normal,
    sample_timesteps,
    split_keys,
)
from fact_train.engine.task import Task
from fact_train.tasks.adapter_init import (
    new_adapters,
    pretrain_resampler,
    read_adapters,
    whitened_resampler,
)
from fact_train.tasks.adapter_options import AdapterOptions
from fact_train.tasks.block_metrics import by_block
from fact_train.tasks.drawn_photos import photo_arrays
from fact_train.tasks.identity_loss import (
    IdentityLoss,
    check_crop_size,
)
from fact_train.tasks.validation import (
    ValidationCallback,
    ValidationSet,
    draw_validation,
    read_validation,
)

WHITENED_ON = 256  # people
PRETRAINED_ON = 16384
"""People at most, a photo of each, on which the resampler is trained alone."""
_KEPT = 0.3
"""Weight of the face tokens' change when a resampler that adapters know is trained alone."""


class AdapterTask(Task):
    """The adapter of every block and the resampler learn; everything else stays bit for bit."""

    samples_on_mesh = True
    options: AdapterOptions

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.pipeline, self.encoder = self._load()
        self._check_widths()
        self.encoders = FrozenEncoders(self.pipeline, self.encoder, self.options.resampler)
        rngs = nnx.Rngs(config.seed)
        self.face_dim = self.options.resampler.output_dim
        self.size = self.pipeline.unet.config.sample_size * self.pipeline.vae.config.downscale
        unet_config = dataclasses.replace(self.pipeline.unet.config, face_dim=self.face_dim)
        self.graph, shapes = abstract_state("unet", unet_config)
        self.steps_before = 0
        fresh = functools.partial(
            new_adapters,
            self.pipeline.unet,
            self.face_dim,
            rngs,
            zero_projections=self.options.start == "zero_projections",
            gate=self.options.gate,
        )
        self.fresh_blocks: list[str] = []
        if self.options.weights is None:
            self.adapters, self.base = fresh(), split_module(self.pipeline.unet).arrays
            resampler = self._new_resampler(rngs)
        else:
            self.adapters, self.base, resampler, self.steps_before, self.fresh_blocks = (
                read_adapters(
                    self.pipeline.unet, self.options.weights, self.options.resampler, fresh
                )
            )
        if some := self.fresh_blocks:
            self.notes.append(
                f"{self.options.weights} has no adapter for {len(some)} of the base's blocks, "
                f"which start fresh: {', '.join(some)}"
            )
        # Of the base, what learns with the adapter, as it was.
        self.tuned_base: dict = {}
        if self.options.form == COUPLED:
            tuned, self.base = split_by_paths(self.base, ["(^|/)attn2/"])
            self.adapters = merge(self.adapters, tuned)
            self.tuned_base = jax.tree.map(jnp.copy, tuned)  # training gives its own away
        trained, frozen = ({name for name, _ in paths(t)} for t in (self.adapters, self.base))
        assert_covers({name.replace(".", "/") for name in shapes}, trained, frozen)
        self.resampler = split_module(resampler)
        self.identity = None
        if (file := self.options.identity.encoder) is not None:
            network = self._load_identity_encoder(file)
            if self.options.records is not None:
                check_crop_size(network, self.encoder)
            self.identity = IdentityLoss(self.options.identity, network, self.pipeline)

    @property
    def score(self) -> str:
        """What the best checkpoints are known by."""
        return f"validation/{self.options.best_by}"

    def _load_identity_encoder(self, file: str) -> TransFace:
        return load_encoder(file)

    def _load(self) -> tuple[Pipeline, TransFace]:
        """Everything that stays frozen."""
        return load_pipeline(self.options.base), load_encoder(self.options.encoder)

    def _new_resampler(self, rngs: nnx.Rngs) -> Resampler:
        return whitened_resampler(self.options.resampler, self.some_tokens(), rngs)

    def some_tokens(self) -> Float[np.ndarray, "n t d"]:
        """Face tokens of a few hundred of the photos."""
        if self.options.cache is not None:
            return np.stack([row["tokens"] for row in self._first_photos(WHITENED_ON)])
        # Whitening takes more vectors than they have numbers.
        count = max(WHITENED_ON, 4 * self.face_shape[1] // self.face_shape[0])
        crops, _ = self._first_crops(count, self.encoder.config.img_size)
        return encode_tokens(self.encoder, crops, self.options.resampler)

    def _first_photos(self, count: int) -> list[dict[str, np.ndarray]]:
        """One photo of each person, as far as there are so many and they can be read."""
        assert self.rows is not None
        _, first = np.unique(self.rows.identities, return_index=True)
        some = []
        for row in first[:count]:
            with contextlib.suppress(DamagedError):  # the data source tells of it
                some.append({"row": row, **self.rows.load(int(row), int(row))})
        if not some:
            raise UserError("none of the records' first photos can be read: write them again")
        return some

    def _first_crops(self, count: int, size: int) -> tuple[np.ndarray, Int[np.ndarray, " n"]]:
        """A crop of each of the first people, and their numbers."""
        if self.rows is None:
            count = min(count, len(SPLITS["adapter"]))
            people = np.asarray(SPLITS["adapter"][:count], np.int32)
            return draw_crops("adapter", count, 1, size, size=self.size), people
        some = self._first_photos(count)
        people = self.rows.identities[[row["row"] for row in some]]
        return np.stack([row["crops"] for row in some]), people

    @functools.cached_property
    def rows(self) -> Dataset | None:
        """Samples of the cache or, without one, of the records; None for the portrait world."""
        options, records = self.options, None
        if options.records is not None:
            records = open_records(options.records, self.pipeline, self.encoder)
        if options.cache is not None:
            cached = CachedDataset(options.cache, options.region)
            cached.check(self.encoders, records)
            return cached
        if records is None:
            return None
        cell = self.pipeline.vae.config.downscale
        tokenizer = self.pipeline.tokenizer
        return PixelDataset(
            records,
            tokenizer,
            options.region,
            cell,
            identity=options.identity.encoder is not None,
            points=options.point_weight > 0,
        )

    def _check_widths(self) -> None:
        resampler = self.options.resampler
        text = self.pipeline.unet.config.cross_attention_dim
        self.face_shape = condition_shape(self.encoder.config, resampler)
        if (resampler.embedding_dim, resampler.output_dim) != (self.face_shape[1], text):
            raise UserError(
                f"options.resampler goes from {resampler.embedding_dim} to {resampler.output_dim}, "
                f"but {self.options.encoder} gives {self.face_shape[1]} and {self.options.base} "
                f"takes {text}: set options.resampler.embedding_dim and .output_dim to these"
            )

    def unet(self, adapters: dict, base: dict) -> UNet:
        """The adapted UNet from its two parts."""
        return nnx.merge(self.graph, merge(base, adapters))

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        trainable = {"resampler": self._start_of_resampler(key), "adapter": self.adapters}
        # The text encoder is always there: for what a caption is dropped to.
        names = ["text_encoder"]
        if self.options.records is not None and self.options.cache is None:
            names += ["vae", "encoder"]
        frozen = {"unet": self.base, **{name: self.encoders.arrays[name] for name in names}}
        if self.identity is not None:
            frozen |= self.identity.arrays(*self._negatives(self.identity))
        return trainable, frozen

    def _start_of_resampler(self, key: jax.Array) -> dict:
        """The resampler's arrays at step 0."""
        options = self.options
        if not options.pretrain_resampler:
            return self.resampler.arrays
        crops, _ = self._first_crops(PRETRAINED_ON, self.encoder.config.img_size)
        embedding = dataclasses.replace(options.resampler, embedding=True, encoder_blocks=())
        resampler, r2 = pretrain_resampler(
            self.resampler.module(self.resampler.arrays),
            encode_tokens(self.encoder, crops, options.resampler),
            encode_tokens(self.encoder, crops, embedding)[:, 0],
            options.pretrain_resampler,
            key,
            keep=0.0 if options.weights is None else _KEPT,
        )
        self.notes.append(
            f"after {options.pretrain_resampler} steps of its own on {len(crops)} photos, the "
            f"resampler's face tokens tell {r2:.2f} of the variance of unseen photos' embeddings"
        )
        return split_module(resampler).arrays

    def _negatives(self, identity: IdentityLoss) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of other people for the contrastive term, and these people's numbers."""
        crops, people = self._first_crops(identity.options.others, identity.config.img_size)
        return identity.embed(crops), people

    def source(self) -> PairedArrays | GrainSource:
        options = self.options
        if self.rows is not None:
            return GrainSource(self.rows, self.config.batch_size, self.config.seed)
        arrays = photo_arrays(self)
        return PairedArrays(arrays, self.config.batch_size, self.config.seed, options.photos)

    def loss(self, trainable, frozen, batch, *, step, keys):
        options, schedule = self.options, self.pipeline.schedule
        shuffle_keys, drop_keys, noise_keys, time_keys, latent_keys, more = split_keys(keys, 6)
        caption_keys, offset_keys = split_keys(more, 2)
        stage = stage_values(options.stages, step)
        shuffled = draw_shuffle(shuffle_keys, stage.shuffle)
        no_face, no_text = draw_drop(drop_keys, options.drop)
        no_text |= stage.text == 0
        # Only where a stage has it: any other curriculum compiles to a step without the switch.
        switched = any(one.text == "no_cross_attention" for one in options.stages)
        attended = stage.cross_attention > 0 if switched else None
        generic = sample_bernoulli(caption_keys, options.generic_caption_probability)
        dtype = jax.tree.leaves(trainable["resampler"])[0].dtype
        photos = {"own_crops": batch["crops"], **batch} if "crops" in batch else batch
        batch = self.encoders.encode_batch(frozen, batch, shuffled, latent_keys)
        # The null condition is the resampler of all-zero tokens.
        tokens = jnp.where(no_face[:, None, None], 0, batch["tokens"]).astype(dtype)
        text = self._captions(frozen, batch["text"], generic, no_text).astype(dtype)
        face = self.resampler.module(trainable["resampler"])(tokens)

        latents = batch["latents"]
        noise = sample_normal(noise_keys, latents.shape[1:])
        if options.noise_offset:
            shift = sample_normal(offset_keys, latents.shape[-1:])
            noise = offset_noise(noise, shift, options.noise_offset)
        t = sample_timesteps(time_keys, schedule.num_train_timesteps)
        noisy = add_noise(schedule, latents, noise, t).astype(dtype)
        unet = self.unet(trainable["adapter"], frozen["unet"])
        ratio = functools.partial(fair_ratio, mask=batch["mask"])
        output, ratios = unet(
            noisy,
            t,
            text,
            face=face,
            on_increment=ratio,
            remat=self.config.remat,
            text_attention=attended,
            controls=FaceControls(parallel=options.form == PARALLEL),
        )

        target = training_target(schedule, latents, noise, t)
        weight = 1.0 + options.face_weight * batch["mask"]
        if options.point_weight:
            cell = self.pipeline.vae.config.downscale
            weight += options.point_weight * near_points(photos["points"], latents.shape[1:3], cell)
        if options.min_snr:
            weight *= min_snr_weight(schedule, t, options.min_snr)[:, None, None]
        error = denoising_error(output, target, weight)
        fair = jnp.stack(ratios).mean()
        metrics = {
            "loss/mse": denoising_error(output, target),
            "loss/fair": fair,
            "curriculum/shuffle": stage.shuffle,
            "curriculum/fair_weight": stage.fair_weight,
            "curriculum/text": stage.text,
            "curriculum/cross_attention": stage.cross_attention,
            **by_block(unet, ratios),
        }
        if self.identity is not None:
            signal = signal_and_noise(schedule, t, latents.ndim)
            clean, _ = split_output(schedule, output.astype(jnp.float32), noisy, *signal)
            remat = self.config.remat != "none"
            extra, found = self.identity(frozen, photos, clean, t, ~no_face, remat=remat)
            error, metrics = error + extra, metrics | found
        return error + stage.fair_weight * fair, metrics

    def _captions(self, frozen, text, generic, no_text):
        """Hidden states of the captions, some of them replaced by the generic or the empty one."""

        def encoded(caption: str) -> Float[Array, "1 n d"]:
            ids, _ = tokenize(self.pipeline.tokenizer, [caption])
            return self.encoders.text(frozen, jnp.asarray(ids))

        if self.options.generic_caption_probability:
            text = jnp.where(generic[:, None, None], encoded(self.options.generic_caption), text)
        return jnp.where(no_text[:, None, None], encoded(""), text)

    def samples(self, trainable, frozen, key):
        """Grids of people who are not trained on, and how well they are met."""
        return self._validation_callback(trainable, frozen, key)

    def open_samples(self) -> None:
        """Read what is watched; UserError if that cannot be."""
        _ = self._validation

    @functools.cached_property
    def _validation(self) -> ValidationSet:
        if self.options.validation is not None:
            return read_validation(self.options.validation, self.pipeline, self.encoder)
        return draw_validation(self.size, self.encoder.config.img_size)

    @functools.cached_property
    def _validation_callback(self) -> ValidationCallback:
        return ValidationCallback(self, self._validation, make_mesh(self.config.mesh))

    def export(self, trainable: PyTree, frozen: PyTree, directory: Path, step: int) -> None:
        """``adapter.safetensors``; its ``step`` counts the steps before this run too."""
        unet = self.unet(trainable["adapter"], frozen["unet"])
        resampler = self.resampler.module(trainable["resampler"])
        metadata = {"step": self.steps_before + step, **self._origin(step)}
        if self.options.form != "sequential":
            metadata["form"] = self.options.form
        save_adapter(unet, resampler, directory / "adapter.safetensors", metadata)

    def _origin(self, step: int) -> dict[str, object]:
        """What the file says of a warm start: this run's own steps, and what it went on from."""
        if self.options.weights is None:
            return {}
        before: dict[str, object] = {"file": self.options.weights, "step": self.steps_before}
        if self.fresh_blocks:
            before["without"] = self.fresh_blocks
        return {"run_step": step, "started_from": before}
