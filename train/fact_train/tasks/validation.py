"""Validation callback: sample grids and identity similarity at fixed photos, captions and seed.

Two grids. In the first, pictures are drawn from noise: the reference photo, the base, FACT. In the
second, portraits of other people (templates) are half noised and drawn again with the reference's
face. There the place of the face is known without any detector, so numbers are taken there:
similarity of who is seen to the reference, by the face encoder's own embedding, for FACT and for
the base; and how much FACT changes inside and outside the head, against the base.

All devices of the mesh draw, each some of the rows.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree, UInt8

from fact_convert import tokenize
from fact_convert.models.adapter import PARALLEL
from fact_jax.diffusion.samplers import noise_latents_for_start, sample_ddim
from fact_jax.face import align_batch
from fact_jax.fact import Guidance, encode_face, guided_model, null_face
from fact_jax.losses import normalize
from fact_jax.metrics.identity import angle, copy_paste, cosine, rank_one
from fact_jax.metrics.pictures import change
from fact_jax.models.transface import TransFace
from fact_jax.models.vae import AutoencoderKL
from fact_jax.portraits import SPLITS
from fact_jax.portraits.metric_networks import CROP, IdentityNet, load_network
from fact_jax.sharding import replicated, shard
from fact_jax.utils.contact_sheet import contact_sheet
from fact_jax.utils.errors import UserError
from fact_jax.utils.pixels import denormalize_pixels, normalize_pixels
from fact_train.data.pixel_dataset import open_records
from fact_train.data.portraits import align_portraits, draw_portraits
from fact_train.data.records import PICTURES, DamagedError, Records
from fact_train.engine.partition import overlay, split_module

PEOPLE = 8
STEPS = 25
# Enough noise to take the face away, little enough to leave it in its place.
TEMPLATE_START = 10
STARTS = (0, TEMPLATE_START)
SCALES = (0.0, 1.0)  # the base, FACT
SCORE = "validation/similarity"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """Row i: a person's photo and crop, and a template that shows somebody else."""

    photos: UInt8[np.ndarray, "n h w 3"]
    photo_points: Float[np.ndarray, "n 5 2"]
    photo_masks: Float[np.ndarray, "n h w"]
    crops: UInt8[np.ndarray, "n s s 3"]
    templates: UInt8[np.ndarray, "n h w 3"]
    points: Float[np.ndarray, "n 5 2"]
    masks: Float[np.ndarray, "n h w"]
    captions: list[str]


def draw_validation(size: int, crop_size: int) -> ValidationSet:
    """Made-up people from the end of the test split; evaluation takes those from its beginning."""
    first = len(SPLITS["test"]) - PEOPLE
    photos, others = (
        draw_portraits("test", PEOPLE, 1, offset=offset, size=size, first=first)
        for offset in (0, 1)
    )
    return ValidationSet(
        photos=photos.images,
        photo_points=photos.portrait.points,
        photo_masks=photos.portrait.head_mask,
        crops=align_portraits(photos, crop_size),
        templates=_next(others.images),
        points=_next(others.portrait.points),
        masks=_next(others.portrait.head_mask),
        captions=[*others.captions[1:], others.captions[0]],
    )


def read_validation(folder: str, pipeline: Any, encoder: Any) -> ValidationSet:
    """The first people of a folder of records; UserError if there are fewer than two."""
    records = open_records(folder, pipeline, encoder)
    if records.shapes is not None:
        raise UserError(f"{folder}: watching takes square photos, built without --buckets")
    _, first = np.unique(records.identities, return_index=True)
    pairs = []
    for i in sorted(first):
        # A person's last photo, which is another one where there are two.
        last = np.flatnonzero(records.identities == records.identities[i])[-1]
        with contextlib.suppress(DamagedError):
            pairs.append([_read(records, int(number)) for number in (i, last)])
        if len(pairs) == PEOPLE:
            break
    if len(pairs) < 2:
        raise UserError(f"{folder}: watching takes readable photos of at least two people")
    photos, others = zip(*pairs, strict=True)

    def pictures(rows: Sequence[dict], name: str) -> np.ndarray:
        return np.stack([row[name] for row in rows])

    captions = [row["caption"] for row in others]
    return ValidationSet(
        photos=pictures(photos, "photo"),
        photo_points=np.stack([row["points"] for row in photos]),
        photo_masks=pictures(photos, "head_mask").astype(np.float32) / 255.0,
        crops=pictures(photos, "crop"),
        templates=_next(pictures(others, "photo")),
        points=_next(np.stack([row["points"] for row in others])),
        masks=_next(pictures(others, "head_mask").astype(np.float32) / 255.0),
        captions=[*captions[1:], captions[0]],
    )


def _read(records: Records, number: int) -> dict[str, Any]:
    row = records[number]
    pictures = {name: records.picture(number, row, name) for name in PICTURES}
    return {**row, **pictures, "caption": records.caption(number, row)}


class IdentityScores:
    """Identity metrics by the miniature's recogniser, which nothing else here was trained on.

    The targets are the people's own photos that serve as templates for others.
    """

    def __init__(self, folder: Path, validation: ValidationSet):
        network = load_network(IdentityNet, folder / "recogniser.safetensors")
        graph, state = nnx.split(network)
        self._run = jax.jit(lambda crops: nnx.merge(graph, state)(normalize_pixels(crops)))
        self._validation = given = validation
        self._references = self._embed(given.photos, given.photo_points, given.photo_masks)
        others = (given.templates, given.points, given.masks)
        self._targets = self._embed(*(np.roll(rows, 1, axis=0) for rows in others))

    def _embed(self, pictures, points, masks) -> Float[np.ndarray, "n k"]:
        return np.asarray(self._run(align_batch(pictures, points, masks, CROP)))

    def __call__(
        self, fact: UInt8[np.ndarray, "n h w 3"], base: UInt8[np.ndarray, "n h w 3"]
    ) -> dict[str, float]:
        """Means over the people; ``fact_jax.metrics.identity`` has the formulas."""
        given = self._validation
        numbers: dict[str, np.ndarray] = {}
        references, targets = self._references, self._targets
        for name, pictures in (("", fact), ("_base", base)):
            found = self._embed(pictures, given.points, given.masks)
            right = cosine(found, targets)
            scores = copy_paste(
                angle(found, targets), angle(found, references), angle(targets, references)
            )
            numbers |= {
                f"validation/judge_target{name}": right,
                f"validation/judge_reference{name}": cosine(found, references),
                f"validation/judge_over_wrong{name}": right - cosine(found, _next(targets)),
                f"validation/judge_copy_paste{name}": scores,
                f"validation/judge_rank_one{name}": rank_one(found, targets),
            }
        return {name: float(np.mean(values)) for name, values in numbers.items()}


class ValidationCallback:
    """Generate the grids and measure similarity; ``task`` is the adapter task."""

    def __init__(self, task: Any, validation: ValidationSet, mesh: Mesh):
        self._task, self._validation, self._mesh = task, validation, mesh
        modules = {"vae": task.pipeline.vae, "encoder": task.encoder}
        self._parts = {name: split_module(module) for name, module in modules.items()}
        count, devices = len(validation.photos), mesh.size
        # Rows that fill up the last device's share are drawn and forgotten.
        self._rows = np.arange(-(-count // devices) * devices) % count
        ids = tokenize(task.pipeline.tokenizer, validation.captions)[0]
        crops, templates = map(normalize_pixels, (validation.crops, validation.templates))
        self._inputs = self._shard({"ids": ids, "crops": crops, "templates": templates})
        self._draw = jax.jit(
            self._drawn, static_argnames="start", out_shardings=replicated(self._mesh)
        )
        self._embed = jax.jit(self._embedded)
        judge = task.options.judge
        self._judge = None if judge is None else IdentityScores(Path(judge), validation)
        self._wanted = self._identities(validation.crops)

    def __call__(self, trainable, frozen, key) -> dict[str, np.ndarray | float]:
        """Both grids, numbers under ``validation/``; the arrays lie whole on all devices."""
        began, given = time.monotonic(), self._validation
        count, config = len(given.photos), self._task.pipeline.unet.config
        side = config.sample_size
        noise = jax.random.normal(key, (count, side, side, config.in_channels))
        arrays = {name: part.arrays for name, part in self._parts.items()}
        everywhere = jax.tree.map(lambda _: replicated(self._mesh), arrays)
        rows = self._inputs | self._shard({"noise": noise})
        parts = (frozen, shard(arrays, everywhere), rows)
        # The base is the one that training started from, where a part of it learns too.
        silent = {**trainable, "adapter": overlay(trainable["adapter"], self._task.tuned_base)}
        made = {
            start: [
                np.asarray(self._draw(trainable if scale else silent, *parts, scale, start=start))
                for scale in SCALES
            ]
            for start in STARTS
        }
        base, fact = made[TEMPLATE_START]
        drawn, swapped = [given.photos, *made[0]], [given.templates, base, fact]
        inside, outside = (float(np.nanmean(x)) for x in change(base, fact, given.masks))
        judged = {} if self._judge is None else self._judge(fact, base)
        return {
            "reference-base-fact": contact_sheet(np.concatenate(drawn), count),
            "template-base-fact": contact_sheet(np.concatenate(swapped), count),
            SCORE: self._similarity(fact),
            f"{SCORE}_base": self._similarity(base),
            "validation/inside_change": inside,
            "validation/outside_change": outside,
            **judged,
            "validation/seconds": time.monotonic() - began,
        }

    def _shard(self, rows: dict[str, Array | np.ndarray]) -> dict[str, Array]:
        """Each device its share of the rows."""
        place = dict.fromkeys(rows, NamedSharding(self._mesh, P(self._mesh.axis_names)))
        return shard({name: np.asarray(array)[self._rows] for name, array in rows.items()}, place)

    def _similarity(self, pictures: UInt8[np.ndarray, "n h w 3"]) -> float:
        given = self._validation
        crops = align_batch(pictures, given.points, given.masks, given.crops.shape[1])
        return float((self._identities(crops) * self._wanted).sum(-1).mean())

    def _identities(self, crops: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n k"]:
        arrays = self._parts["encoder"].arrays
        return np.asarray(self._embed(arrays, normalize_pixels(crops)))

    def _embedded(self, arrays, crops):
        encoder = self._parts["encoder"].module(arrays)
        return normalize(encoder(crops)[1].astype(jnp.float32))

    def _drawn(self, trainable, frozen, arrays, rows, scale, start: int):
        def on_device(trainable, frozen, arrays, rows, scale):
            parts = {name: part.module(arrays[name]) for name, part in self._parts.items()}
            return draw_rows(self._task, trainable, frozen, rows, scale, start=start, **parts)

        split = P(self._mesh.axis_names)
        pictures = jax.shard_map(
            on_device,
            mesh=self._mesh,
            in_specs=(P(), P(), P(), split, P()),
            out_specs=split,
            check_vma=False,
        )(trainable, frozen, arrays, rows, scale)
        return pictures[: len(self._validation.photos)]


def draw_rows(
    task: Any,
    trainable: PyTree,
    frozen: PyTree,
    rows: dict[str, Array],
    scale: float | Array,
    *,
    vae: AutoencoderKL,
    encoder: TransFace,
    start: int,
) -> UInt8[Array, "n h w 3"]:
    """One picture for each row of ``ids``, ``crops``, ``templates`` and ``noise``.

    They are drawn from the noise, or with ``start`` from the templates.
    """
    resampler = task.resampler.module(trainable["resampler"])
    unet = task.unet(trainable["adapter"], frozen["unet"])
    empty = tokenize(task.pipeline.tokenizer, [""])[0]
    states = task.encoders.text(frozen, jnp.concatenate([rows["ids"], empty]))
    text, empty = states[:-1], states[-1:]
    model = guided_model(
        unet,
        text=text,
        negative_text=jnp.broadcast_to(empty, text.shape),
        face=encode_face(encoder, resampler, rows["crops"][:, None]),
        no_face=null_face(resampler, task.face_shape[0]),
        guidance=Guidance(text=3.0, face_scale=scale),
        steps=STEPS,
        parallel=task.options.form == PARALLEL,
    )
    schedule, noise = task.pipeline.schedule, rows["noise"]
    factor = vae.config.scaling_factor
    if start:
        # One at a time: at full size the autoencoder needs more memory than the UNet.
        clean = jax.lax.map(lambda x: vae.encode(x[None])[0][0], rows["templates"]) * factor
        noise = noise_latents_for_start(schedule, "ddim", clean, noise, STEPS, start)
    latents = sample_ddim(model, noise, schedule, steps=STEPS, start=start)
    return denormalize_pixels(jax.lax.map(lambda z: vae.decode(z[None])[0], latents / factor))


def _next(rows: Array | Int[np.ndarray, "..."]) -> np.ndarray:
    """Every row in the place of the one before it, the first in the last place."""
    return np.roll(np.asarray(rows), -1, axis=0)
