"""What the tasks share: modules as pure dicts, portraits as data, pictures to look at."""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from fact_convert.models.pipeline import load_part
from fact_jax.face import align_batch
from fact_jax.models.vae import AutoencoderKL
from fact_jax.portraits import SPLITS, Batch, make_batch
from fact_jax.utils.errors import UserError
from fact_jax.utils.ranges import Range

PyTree = Any

PHOTOS_OF_A_PERSON = 1000
Photos = Annotated[int, Range(1, PHOTOS_OF_A_PERSON)]
"""How many photos of each person, as a setting."""


def people_of(split_name: str, at_least: int = 1) -> Any:
    """The type of a setting: how many people of a split of the portrait world."""
    return Annotated[int, Range(at_least, len(SPLITS[split_name]))]


@dataclasses.dataclass(frozen=True)
class Split:
    """A module taken apart: its structure, and its arrays as a nested dict."""

    graph: nnx.GraphDef
    arrays: dict

    def module(self, arrays: PyTree) -> Any:
        """The module with these arrays (traced ones too)."""
        return nnx.merge(self.graph, arrays)


def split(module: nnx.Module) -> Split:
    """Take a module apart into structure and arrays."""
    graph, state = nnx.split(module)
    return Split(graph, nnx.to_pure_dict(state))


def load_vae(folder: str) -> AutoencoderKL:
    """The VAE in a folder named ``vae``, as diffusers has it; UserError if there is none."""
    if Path(folder).name != "vae":
        raise UserError(f"{folder} is no VAE's folder: give one that is named vae")
    return load_part(Path(folder))


def to_signed(images: UInt8[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """0..255 to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_picture(images: Float[Array, "*b h w c"]) -> UInt8[np.ndarray, "*b h w c"]:
    """[-1, 1] (clipped) to 0..255."""
    images = np.asarray(images, np.float32)
    return np.rint(np.clip(images * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)


def draw_portraits(
    split_name: str, people: int, photos: int, offset: int = 0, size: int = 64, first: int = 0
) -> Batch:
    """``people`` x ``photos`` portraits of a split's people from ``first`` on, one by one.

    No two portraits of the whole world share a scene seed: it is the person's number times 1,000
    plus the number of the photo.
    """
    ids = np.asarray(SPLITS[split_name][first : first + people])
    if len(ids) < people:
        raise ValueError(f"split {split_name!r} has {len(ids)} people there, not {people}")
    seeds = (ids[:, None] * PHOTOS_OF_A_PERSON + offset + np.arange(photos)).reshape(-1)
    return make_batch(np.repeat(ids, photos), seeds, size)


def align_portraits(batch: Batch, size: int) -> UInt8[np.ndarray, "n s s 3"]:
    """Aligned crops of portraits with everything but the head blanked, as FACT's encoder wants."""
    return align_batch(batch.images, batch.portrait.points, batch.portrait.head_mask, size)


def draw_crops(
    split_name: str, people: int, photos: int, size: int, offset: int = 0
) -> UInt8[np.ndarray, "n s s 3"]:
    """Aligned crops of a split's first people, person after person."""
    return align_portraits(draw_portraits(split_name, people, photos, offset), size)


@dataclasses.dataclass(frozen=True)
class ShuffledArrays:
    """Rows of in-memory arrays in an order that depends on the seed and the step alone.

    Every epoch visits each row once; the batch of any step costs the same.
    """

    arrays: dict[str, np.ndarray]
    batch_size: int
    seed: int

    def rows(self, step: int) -> Int[np.ndarray, " b"]:
        """The rows of a step's batch."""
        count = len(next(iter(self.arrays.values())))
        first = step * self.batch_size
        wanted = np.arange(first, first + self.batch_size)
        orders = {epoch: _permutation(self.seed, int(epoch), count) for epoch in wanted // count}
        return np.asarray([orders[i // count][i % count] for i in wanted])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells these arrays from any others."""
        found = zlib.crc32(f"{self.batch_size} {self.seed}".encode())
        for name, array in self.arrays.items():
            found = zlib.crc32(f"{name} {array.shape} {array.dtype}".encode(), found)
            found = zlib.crc32(np.ascontiguousarray(array), found)
        return f"{found:08x}"

    def batches(self, start: int, rows: Int[np.ndarray, " r"]) -> Iterator[dict[str, np.ndarray]]:
        for step in itertools.count(start):
            yield self.batch(step, rows)

    def batch(self, step: int, rows: Int[np.ndarray, " r"]) -> dict[str, np.ndarray]:
        """These rows of the batch after ``step`` steps."""
        chosen = self.rows(step)[rows]
        return {name: array[chosen] for name, array in self.arrays.items()}


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def split_keys(keys: Key[Array, " b"], count: int) -> Key[Array, "count b"]:
    """``count`` independent keys for each sample."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def draw_normal(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Unit noise of this shape for each sample."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def draw_timesteps(keys: Key[Array, " b"], count: int) -> Int[Array, " b"]:
    """A timestep below ``count`` for each sample."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(keys)


def in_chunks(function: Callable[[Array], PyTree], values: np.ndarray, chunk: int = 128) -> PyTree:
    """Apply a jitted function of a batch to many rows, a chunk of one shape at a time."""
    chunk = min(chunk, len(values))
    pieces = []
    for start in range(0, len(values), chunk):
        part = values[start : start + chunk]
        padded = np.concatenate([part, np.repeat(part[-1:], chunk - len(part), axis=0)])
        out = jax.tree.map(np.asarray, function(jnp.asarray(padded)))
        pieces.append(out)
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(values)], *pieces)


def encode_images(
    vae: AutoencoderKL, images: UInt8[np.ndarray, "n h w 3"]
) -> Float[np.ndarray, "n h w c"]:
    """Scaled latent means of pictures, in chunks."""
    scale = vae.config.scaling_factor
    graph, state = nnx.split(vae)

    @jax.jit
    def encode(batch):
        return nnx.merge(graph, state).encode(to_signed(batch))[0] * scale

    return in_chunks(encode, images)


def overlay(tree: dict, changes: dict) -> dict:
    """``tree`` with the leaves that ``changes`` holds in their place."""
    return {
        name: (
            value
            if name not in changes
            else overlay(value, changes[name])
            if isinstance(value, dict)
            else jnp.asarray(changes[name], value.dtype)
        )
        for name, value in tree.items()
    }
