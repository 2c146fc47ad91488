"""Evaluation of an adapter of the miniature: identity, locality, colours and captions.

Pictures of made-up people whom nothing was trained on, measured by networks that generate nothing.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8
from tqdm import tqdm

from fact_infer.evaluation.metrics import (
    INTERVALS,
    Estimate,
    change,
    cosine,
    dilate,
    mean_interval,
    plain_table,
    rank_one,
    ratio_interval,
    share_interval,
)
from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.request import MAX_SEED, GenerationParams
from fact_jax.diffusion.samplers import num_model_calls
from fact_jax.face import align_batch
from fact_jax.ops.precision import matmul_precision
from fact_jax.portraits import SPLITS, Batch, make_batch
from fact_jax.portraits.metric_networks import (
    ATTRIBUTES,
    CROP,
    AttributeNet,
    IdentityNet,
    load_network,
)
from fact_jax.utils.batches import map_batches, padded_batches
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import create
from fact_jax.utils.pixels import normalize_pixels

SIZE = 64
FILES = ("pictures.npz", "evaluation.txt", "evaluation.json")
# Photos of a person are the scenes number * 1000 + these.
_REFERENCE, _CAPTION, _ANOTHER = 0, 500, 501
_MAX_PHOTOS = 8
_CHUNK = 32
_MASKS = ("head", "face")

NOTES = (
    f"{INTERVALS}. Brackets hold the interval.",
    "Similarity: crops aligned by the parser's points, background blanked by its head mask, drawn "
    "and generated pictures alike.",
    "'true photo' is another photo of the person (similarity, rank-1: the ceiling), the reference "
    "photo (colours), or the person drawn in the caption's scene (captions).",
    "Head and face: where the parser sees one in either of the two pictures, grown by one pixel. "
    "The ratio is of the means.",
)


class People(NamedTuple):
    """People to draw, and true portraits of them in three sorts of scene."""

    references: Batch  # n * p photos that the generator sees
    crops: UInt8[np.ndarray, "n p s s 3"]
    scenes: Batch  # n portraits in the scenes that the prompts describe
    another: UInt8[np.ndarray, "n h w 3"]

    @property
    def first_references(self) -> UInt8[np.ndarray, "n h w 3"]:
        """The first of each person's reference photos."""
        return self.references.images[:: self.crops.shape[1]]


def render_people(count: int, photos: int, crop_size: int, split: str = "test") -> People:
    """The first people of a split; crops are made as for any photo with known points and mask."""
    if not 2 <= count <= len(SPLITS[split]):
        raise UserError(f"people must be 2 to {len(SPLITS[split])}, got {count}")
    if not 1 <= photos <= _MAX_PHOTOS:
        raise UserError(f"photos must be 1 to {_MAX_PHOTOS}, got {photos}")
    ids = np.asarray(SPLITS[split][:count])
    seeds = (ids[:, None] * 1000 + _REFERENCE + np.arange(photos)).reshape(-1)
    references = make_batch(np.repeat(ids, photos), seeds, SIZE)
    truth = references.portrait
    crops = align_batch(references.images, truth.points, truth.head_mask, crop_size)
    return People(
        references=references,
        crops=crops.reshape(count, photos, *crops.shape[1:]),
        scenes=make_batch(ids, ids * 1000 + _CAPTION, SIZE),
        another=make_batch(ids, ids * 1000 + _ANOTHER, SIZE).images,
    )


class MetricOutputs(NamedTuple):
    """Outputs of the metric networks for ``n`` pictures."""

    embeddings: Float[np.ndarray, "n k"]
    head: Bool[np.ndarray, "n h w"]
    face: Bool[np.ndarray, "n h w"]
    skin: Float[np.ndarray, "n 3"]
    hair: Float[np.ndarray, "n 3"]
    attributes: dict[str, Int[np.ndarray, " n"]]


class MetricNetworks:
    """Identity and attribute networks of a folder, compiled once."""

    def __init__(self, folder: Path):
        self._recognise = _compiled(load_network(IdentityNet, folder / "recogniser.safetensors"))
        self._parse = _compiled(load_network(AttributeNet, folder / "parser.safetensors"))

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> MetricOutputs:
        """Their outputs for whole pictures."""
        found = self._parse(images)
        masks = {name: 1 / (1 + np.exp(-found[name].astype(np.float32))) for name in _MASKS}
        crops = align_batch(images, found["points"], masks["head"], CROP)
        return MetricOutputs(
            embeddings=self._recognise(crops),
            **{name: mask >= 0.5 for name, mask in masks.items()},
            skin=found["skin"],
            hair=found["hair"],
            attributes={name: found[name].argmax(-1) for name in ATTRIBUTES},
        )


def _compiled(module: nnx.Module) -> Callable:
    """The module on uint8 pictures, in batches of one shape."""
    graph, state = nnx.split(module)

    @jax.jit
    def run(images: UInt8[Array, "b h w 3"]):
        with matmul_precision("float32"):
            return nnx.merge(graph, state)(normalize_pixels(images))

    return lambda images: map_batches(run, images, _CHUNK)


def generate_pictures(
    pipeline: FlaxPipeline, people: People, params: GenerationParams, *, seed: int, batch: int
) -> dict[str, UInt8[np.ndarray, "n h w 3"]]:
    """``base`` and ``fact`` pictures of everybody's caption; person i starts from noise seed + i.

    Two functions are compiled; progress goes to stderr, a bar or a line a batch.
    """
    prompts, count = people.scenes.captions, len(people.crops)
    height, width = pipeline.base.latent_size(params)
    if (height, width) != (SIZE // pipeline.base.vae.downscale,) * 2:
        raise UserError(f"the judges look at pictures of {SIZE} x {SIZE}: this base draws others")
    if not 0 <= seed <= MAX_SEED - count:
        raise UserError(f"seed must lie in 0..{MAX_SEED - count} for {count} people, got {seed}")
    if batch < 1:
        raise UserError(f"a batch holds at least one picture, got {batch}")
    batch = min(batch, count)
    calls = num_model_calls(params.sampler, params.steps)
    pictures = {}
    total = 2 * -(-count // batch) * calls
    with tqdm(total=total, unit="step", disable=None) as bar:
        for name, crops in (("base", None), ("fact", people.crops)):
            parts = []
            bar.set_postfix_str(name)
            for rows, _ in padded_batches(count, batch):
                part = pipeline.generate(
                    [prompts[i] for i in rows],
                    [seed + int(i) for i in rows],
                    None if crops is None else crops[rows],
                    params,
                    bar=None if bar.disable else bar,
                )
                parts.append(part)
                if bar.disable:
                    done = f"{name} pictures: {rows[-1] + 1} of {count}"
                    print(done, file=sys.stderr, flush=True)
            pictures[name] = np.concatenate(parts)[:count]
    return pictures


def measure(
    networks: MetricNetworks, people: People, pictures: dict[str, UInt8[np.ndarray, "n h w 3"]]
) -> dict[str, Estimate]:
    """All measures, by the keys of ``fact_infer.evaluation.metrics.SECTIONS`` and the column."""
    seen = {name: networks(images) for name, images in pictures.items()}
    seen["reference"] = networks(people.first_references)
    seen["another"] = networks(people.another)
    seen["scene"] = networks(people.scenes.images)
    return {
        **_identity(seen),
        **_changes(seen, pictures),
        **_colours(seen, people),
        **_captions(seen, people),
    }


def _identity(seen: dict[str, MetricOutputs]) -> dict[str, Estimate]:
    reference, another = seen["reference"].embeddings, seen["another"].embeddings
    measures, to_reference = {}, {}
    for column, source in (("fact", "fact"), ("base", "base"), ("true", "another")):
        found = seen[source].embeddings
        right, wrong = cosine(found, reference), cosine(found, np.roll(reference, -1, axis=0))
        to_reference[column] = right
        measures[f"reference/{column}"] = mean_interval(right)
        measures[f"wrong/{column}"] = mean_interval(wrong)
        measures[f"over_wrong/{column}"] = mean_interval(right - wrong)
        if column != "true":
            measures[f"another/{column}"] = mean_interval(cosine(found, another))
        # The ceiling looks for the reference photo's owner among the other photos.
        query = reference if column == "true" else found
        measures[f"rank_one/{column}"] = share_interval(rank_one(query, another))
    gain = to_reference["fact"] - to_reference["base"]
    return measures | {"over_base/fact": mean_interval(gain)}


def _changes(
    seen: dict[str, MetricOutputs], pictures: dict[str, np.ndarray]
) -> dict[str, Estimate]:
    measures = {}
    for region in _MASKS:
        mask = dilate(getattr(seen["base"], region) | getattr(seen["fact"], region))
        inside, outside = change(pictures["fact"], pictures["base"], mask)
        measures[f"{region}/inside/fact"] = mean_interval(inside)
        measures[f"{region}/outside/fact"] = mean_interval(outside)
        measures[f"{region}/ratio/fact"] = ratio_interval(outside, inside)
    return measures


def _colours(seen: dict[str, MetricOutputs], people: People) -> dict[str, Estimate]:
    measures = {}
    for name in ("hair", "skin"):
        truth = getattr(people.scenes.portrait, name)
        for column, source in (("fact", "fact"), ("base", "base"), ("true", "reference")):
            error = np.abs(getattr(seen[source], name) - truth).mean(-1)
            measures[f"{name}/{column}"] = mean_interval(error)
    return measures


def _captions(seen: dict[str, MetricOutputs], people: People) -> dict[str, Estimate]:
    measures = {}
    for column, source in (("fact", "fact"), ("base", "base"), ("true", "scene")):
        found = seen[source].attributes
        right = {n: found[n] == getattr(people.scenes.portrait, n) for n in ATTRIBUTES}
        for name, hits in right.items():
            measures[f"caption/{name}/{column}"] = share_interval(hits)
        measures[f"caption/all/{column}"] = mean_interval(np.mean(list(right.values()), axis=0))
    return measures


def describe(pipeline: FlaxPipeline, people: People, params: GenerationParams, seed: int) -> dict:
    """The setup of an evaluation, for its JSON file."""
    face = pipeline.face
    assert face is not None  # it was an adapter that drew
    return {
        "people": len(people.crops),
        "first person": int(people.references.ids[0]),
        "photos of each": people.crops.shape[1],
        "sampler": params.sampler,
        "steps": params.steps,
        "guidance": dataclasses.asdict(params.guidance),
        "seed": seed,
        "base": str(pipeline.base.folder),
        "adapter": str(face.adapter),
        "encoder": str(face.encoder),
    }


def summary_line(about: dict) -> str:
    """The setup in one line."""
    guidance = about["guidance"]
    return (
        f"{about['people']} people whom nothing was trained on, {about['photos of each']} photo(s) "
        f"of each, {about['sampler']} {about['steps']} steps, guidance {guidance['text']:g}, "
        f"face scale {guidance['face_scale']:g}, seed {about['seed']}"
    )


def unused_folder(folder: str | os.PathLike) -> Path:
    """``folder``, or where it holds an evaluation already ``folder-2`` and so on."""
    free, number = Path(folder), 1
    while any(os.path.lexists(free / name) for name in FILES):
        number += 1
        free = Path(f"{Path(folder).resolve()}-{number}")
    return free


def save(
    out: str | os.PathLike,
    about: dict,
    measures: dict[str, Estimate],
    people: People,
    pictures: dict[str, UInt8[np.ndarray, "n h w 3"]],
) -> str:
    """Write ``pictures.npz``, ``evaluation.txt`` and, last, ``evaluation.json``; gives the text.

    See ``unused_folder`` for where: files that are there are never replaced.
    """

    def write_pictures(path: Path) -> None:
        arrays: dict[str, Any] = {
            "ids": np.asarray(people.scenes.ids),
            "captions": np.asarray(people.scenes.captions),
            "reference": people.first_references,
            **pictures,
        }
        with open(path, "wb") as handle:
            np.savez_compressed(handle, **arrays)

    text = f"{summary_line(about)}\n\n{plain_table(measures, NOTES)}"
    content = {
        **about,
        "measures": {name: estimate.to_dict() for name, estimate in measures.items()},
        "notes": list(NOTES),
    }
    writers = (
        write_pictures,
        lambda path: path.write_text(text),
        lambda path: path.write_text(json.dumps(content, indent=1) + "\n"),
    )
    for name, write in zip(FILES, writers, strict=True):
        create(Path(out) / name, write)
    return text
