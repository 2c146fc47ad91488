"""The portrait world's side of an evaluation: people, judges, pictures of everybody's caption.

People whom nothing was trained on, and networks that generate nothing.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8
from tqdm import tqdm

from fact_infer.evaluation.results import PictureStore, fingerprint
from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.request import MAX_SEED, GenerationParams
from fact_jax.diffusion.samplers import num_model_calls
from fact_jax.face import align_batch
from fact_jax.fact import Guidance
from fact_jax.metrics.copying import light_side
from fact_jax.metrics.identity import average_recognisers
from fact_jax.ops.precision import matmul_precision
from fact_jax.portraits import SPLITS, Batch, make_batch
from fact_jax.portraits.metric_networks import (
    ATTRIBUTES,
    CROP,
    AttributeNet,
    FaceFeatureNet,
    IdentityNet,
    load_network,
)
from fact_jax.utils.batches import map_batches, padded_batches
from fact_jax.utils.errors import UserError
from fact_jax.utils.pixels import normalize_pixels

SIZE = 64
"""Side of what the parser looks at; larger pictures are averaged down to it."""
# Photos of a person are the scenes number * 1000 + these.
_REFERENCE, _CAPTION, _ANOTHER = 0, 500, 501
_MAX_PHOTOS = 8
_CHUNK = 32
REGIONS = ("head", "face")


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


def render_people(
    count: int, photos: int, crop_size: int, split: str = "test", size: int = SIZE
) -> People:
    """The first people of a split; crops are made as for any photo with known points and mask."""
    if not 2 <= count <= len(SPLITS[split]):
        raise UserError(f"people must be 2 to {len(SPLITS[split])}, got {count}")
    if not 1 <= photos <= _MAX_PHOTOS:
        raise UserError(f"photos must be 1 to {_MAX_PHOTOS}, got {photos}")
    ids = np.asarray(SPLITS[split][:count])
    seeds = (ids[:, None] * 1000 + _REFERENCE + np.arange(photos)).reshape(-1)
    references = make_batch(np.repeat(ids, photos), seeds, size)
    truth = references.portrait
    crops = align_batch(references.images, truth.points, truth.head_mask, crop_size)
    return People(
        references=references,
        crops=crops.reshape(count, photos, *crops.shape[1:]),
        scenes=make_batch(ids, ids * 1000 + _CAPTION, size),
        another=make_batch(ids, ids * 1000 + _ANOTHER, size).images,
    )


class MetricOutputs(NamedTuple):
    """Outputs of the metric networks for ``n`` pictures."""

    embeddings: Float[np.ndarray, "n k"]
    # Masks and points as the parser sees the picture, 64 x 64.
    head: Bool[np.ndarray, "n h w"]
    face: Bool[np.ndarray, "n h w"]
    skin: Float[np.ndarray, "n 3"]
    hair: Float[np.ndarray, "n 3"]
    attributes: dict[str, Int[np.ndarray, " n"]]
    points: Float[np.ndarray, "n 5 2"]
    light: Float[np.ndarray, " n"]  # fact_jax.metrics.copying.light_side
    features: Float[np.ndarray, "n d"]  # means of the parser's last features
    face_features: Float[np.ndarray, "n 11"]  # fact_jax.portraits.metric_networks.FACE_FEATURES


class Recogniser(Protocol):
    """A network that tells people apart by aligned crops of ``size``, black around if ``blanked``.

    ``name`` is what it is called in results.
    """

    name: str
    size: int
    blanked: bool

    def __call__(self, crops: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n k"]: ...


class MiniatureRecogniser:
    """The miniature's own recogniser, of a folder with ``recogniser.safetensors``."""

    name, size, blanked = "judge", CROP, True

    def __init__(self, folder: Path):
        self._run = _compiled(load_network(IdentityNet, folder / "recogniser.safetensors"))

    def __call__(self, crops: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n k"]:
        return self._run(crops)


def averaged(images: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n 64 64 3"]:
    """Pictures brought to the parser's size, each pixel the mean of those that it covers."""
    count, side = len(images), images.shape[1]
    if side == SIZE:
        return images
    factor = side // SIZE
    parts = images.reshape(count, SIZE, factor, SIZE, factor, 3).mean((2, 4))
    return np.rint(parts).astype(np.uint8)


def fits_parser(shape: Sequence[int]) -> bool:
    """Are pictures of (height, width, ...) square, and a multiple of the parser's size?"""
    return shape[0] == shape[1] and shape[0] % SIZE == 0


class Parser:
    """The miniature's parser of whole pictures, of a folder with ``parser.safetensors``."""

    def __init__(self, folder: Path):
        module = load_network(AttributeNet, folder / "parser.safetensors")
        self._parse, self.features = _compiled(module), _compiled(module, _pooled)

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> dict[str, np.ndarray]:
        """What ``AttributeNet`` gives, the masks in [0, 1]."""
        found = self._parse(images)
        masks = {name: 1 / (1 + np.exp(-found[name].astype(np.float32))) for name in REGIONS}
        return {**found, **masks}


class MetricNetworks:
    """Identity and attribute networks of a folder, compiled once.

    With ``more`` recognisers similarities are the means of theirs and the folder's.
    """

    def __init__(self, folder: Path, more: Sequence[Recogniser] = ()):
        self._recognisers = [MiniatureRecogniser(folder), *more]
        self._parser = Parser(folder)
        network = load_network(FaceFeatureNet, folder / "features.safetensors")
        self._face_features = _compiled(network)

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> MetricOutputs:
        """Their outputs for whole pictures, 64 x 64 or a multiple of it."""
        images = averaged(images)
        found = self._parser(images)
        crops = align_batch(images, found["points"], found["head"], CROP)
        embeddings = [self._recognisers[0](crops)]
        for one in self._recognisers[1:]:
            head = found["head"] if one.blanked else None
            embeddings.append(one(align_batch(images, found["points"], head, one.size)))
        several = len(embeddings) > 1
        return MetricOutputs(
            embeddings=average_recognisers(embeddings) if several else embeddings[0],
            **{name: found[name] >= 0.5 for name in REGIONS},
            skin=found["skin"],
            hair=found["hair"],
            attributes={name: found[name].argmax(-1) for name in ATTRIBUTES},
            points=found["points"],
            light=light_side(crops),
            features=self._parser.features(images),
            face_features=self._face_features(crops),
        )


def _pooled(parser: Any, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
    for stage in parser.stages:
        images = stage(images)
    return images.mean((1, 2))


def _compiled(module: nnx.Module, function: Callable | None = None) -> Callable:
    """The module (or a function of it) on uint8 pictures, in batches of one shape."""
    graph, state = nnx.split(module)

    @jax.jit
    def run(images: UInt8[Array, "b h w 3"]):
        with matmul_precision("float32"):
            whole: Any = nnx.merge(graph, state)
            pixels = normalize_pixels(images)
            return whole(pixels) if function is None else function(whole, pixels)

    return lambda images: map_batches(run, images, _CHUNK)


def world_size(pipeline: FlaxPipeline, params: GenerationParams) -> int:
    """The side of the base's pictures; UserError if the judges cannot look at them."""
    size = pipeline.base.picture_size(params)
    if not fits_parser(size):
        raise UserError(
            f"the portrait world's judges look at square pictures whose side is a multiple of "
            f"{SIZE}, not at {size[1]} x {size[0]}: --folder measures any"
        )
    return size[0]


def generate_pictures(
    pipeline: FlaxPipeline,
    people: People,
    params: GenerationParams,
    *,
    seed: int,
    batch: int,
    seeds: int = 1,
    store: PictureStore | None = None,
    base_store: PictureStore | None = None,
) -> dict[str, UInt8[np.ndarray, "m h w 3"]]:
    """``base`` and ``fact`` pictures of everybody's caption, ``seeds`` of each.

    Row j n + i is of person i and starts from noise seed + j n + i. What is in the ``store`` is not
    drawn again; pictures of the base may have a ``base_store`` of their own. Two functions are
    compiled; progress goes to stderr, a bar or a line a batch.
    """
    prompts, count = people.scenes.captions, len(people.crops)
    total = count * seeds
    if pipeline.base.picture_size(params) != people.scenes.images.shape[1:3]:
        raise UserError("the people were drawn in another size than the pictures")
    if not 0 <= seed <= MAX_SEED - total:
        raise UserError(f"seed must lie in 0..{MAX_SEED - total} for {total} pictures, got {seed}")
    if batch < 1:
        raise UserError(f"a batch holds at least one picture, got {batch}")
    batch = min(batch, total)
    calls = num_model_calls(params.sampler, params.steps)
    pictures = {}
    work = 2 * -(-total // batch) * calls
    with tqdm(total=work, unit="step", disable=None) as bar:
        for name, crops in (("base", None), ("fact", people.crops)):
            parts = []
            here = base_store if base_store and name == "base" else store
            bar.set_postfix_str(name)
            for rows, _ in padded_batches(total, batch):
                keys = [picture_key(name, people, int(i)) for i in rows]
                if here is not None and here.have(keys):
                    parts.append(here.read(keys))
                    bar.update(calls)
                    continue
                part = pipeline.generate(
                    [prompts[i % count] for i in rows],
                    [seed + int(i) for i in rows],
                    None if crops is None else crops[rows % count],
                    params,
                    bar=None if bar.disable else bar,
                )
                if here is not None:
                    here.write(keys, part)
                    part = here.read(keys)
                parts.append(part)
                if bar.disable:
                    done = f"{name} pictures: {rows[-1] + 1} of {total}"
                    print(done, file=sys.stderr, flush=True)
            pictures[name] = np.concatenate(parts)[:total]
    return pictures


def base_pictures(folder: Path, about: Mapping[str, Any], batch: int) -> PictureStore:
    """Where in ``folder`` the base's pictures of such an evaluation are kept, whatever the adapter.

    ``about``: :func:`describe`.
    """
    names = ("people", "first person", "sampler", "steps", "seed", "pictures of each")
    decides = [about[name] for name in names]
    decides += [about["guidance"]["text"], about["files"]["base"], batch]
    decides += [jax.__version__, jax.default_backend(), jax.local_device_count()]
    return PictureStore(folder / hashlib.sha256(repr(decides).encode()).hexdigest()[:32])


def picture_key(name: str, people: People, row: int) -> str:
    """What picture ``row`` is called: ``fact/080003-0``, by person and repetition."""
    count = len(people.crops)
    return f"{name}/{int(people.scenes.ids[row % count]):06d}-{row // count}"


def describe(
    pipeline: FlaxPipeline, people: People, params: GenerationParams, seed: int, seeds: int = 1
) -> dict:
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
        "pictures of each": seeds,
        "base": str(pipeline.base.folder),
        "adapter": str(face.adapter),
        "encoder": str(face.encoder),
        "files": {
            "base": fingerprint(pipeline.base.folder),
            "adapter": fingerprint(face.adapter),
            "encoder": fingerprint(face.encoder),
        },
    }


def summary_line(about: dict) -> str:
    """The setup in one line."""
    guidance = about["guidance"]
    return (
        f"{about['people']} people whom nothing was trained on, {about['photos of each']} photo(s) "
        f"of each, {about['sampler']} {about['steps']} steps, guidance {guidance['text']:g}, "
        f"face scale {guidance_line(guidance)}, seed {about['seed']}"
    )


def guidance_line(guidance: Mapping[str, Any]) -> str:
    """The face's strength, and what of its guidance is not as by default."""
    scale = guidance["face_scale"]
    plain = dataclasses.asdict(Guidance())
    told = ("text", "face_scale")
    other = {k: v for k, v in guidance.items() if k not in told and v != plain[k] and v != []}
    scales = scale if isinstance(scale, list | tuple) else [scale]
    words = ["-".join(f"{x:g}" for x in scales)]
    return ", ".join([*words, *(f"{k.replace('_', ' ')} {v}" for k, v in other.items())])
