"""What a JAX generation is compiled for, and the numbers that the compiled programs are fed."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8

from fact_jax.fact import Guidance

_SOME = 2.0
"""Stands for any number that is there, in a guidance that only says which ones are."""
_UNMASKED_PHOTOS = 2


def keep_programs() -> Path:
    """Keep compiled programs on disk for later runs; gives the folder.

    It is JAX's own setting (JAX_COMPILATION_CACHE_DIR) if there is one, else in the user's caches.
    """
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "fact-jax" / "programs"))
    return Path(jax.config.jax_compilation_cache_dir)


def keep_jax_on_cpu() -> None:
    """Confine JAX to the CPU in a process where PyTorch draws; it makes noise and schedules there.

    Otherwise JAX would take three quarters of a GPU's memory with its first operation. A process
    that has used JAX before keeps the devices that it has.
    """
    jax.config.update("jax_platforms", "cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What the programs depend on beside the shapes of their arrays.

    Samplers, steps, prompts, seeds and all numbers of a guidance need no new one. ``count`` is how
    many pictures there are, of which each of ``devices`` draws its share.
    """

    count: int
    size: tuple[int, int]
    people: int
    guidance: Guidance
    devices: int = 1


def split_guidance(guidance: Guidance) -> tuple[Guidance, dict[str, np.ndarray]]:
    """A guidance as what a program is compiled for, and its numbers, to be put back in there.

    With ``cap`` or ``adain`` there are both: a cap of infinity, and an ``adain`` that is off.
    """
    numbers = {}
    if guidance.text != 1.0:
        numbers["text"] = np.float32(guidance.text)
    if guidance.face is not None:
        numbers["face"] = np.float32(guidance.face)
    controlled = guidance.cap is not None or guidance.adain
    if controlled:
        numbers["cap"] = np.float32(np.inf if guidance.cap is None else guidance.cap)
        numbers["adain"] = np.bool_(guidance.adain)
    shape = Guidance(
        text=_SOME if "text" in numbers else 1.0,
        face=_SOME if "face" in numbers else None,
        cap=_SOME if controlled else None,
        adain=controlled,
        negative_face=guidance.negative_face,
        combine=guidance.combine,
    )
    return shape, numbers


def block_strengths(
    guidance: Guidance, steps: int, start: int, blocks: Sequence[str], bound: int
) -> Float[np.ndarray, "bound blocks"]:
    """The adapter's strength in each step and block; rows from ``steps`` on fill up.

    Of ``steps`` those from ``start`` on are drawn: window and schedule are over them.
    """
    scales = jax.vmap(lambda i: guidance.scale_at(i - start, steps - start))(jnp.arange(bound))
    return np.asarray(scales)[:, None] * np.asarray(guidance.block_factors(blocks), np.float32)


def pad_photos(
    crops: UInt8[np.ndarray, "c p s s 3"], people: int
) -> tuple[UInt8[np.ndarray, "c q s s 3"], Bool[np.ndarray, " photos"] | None]:
    """Everybody's photos up to a power of two, and which of them there are.

    None where two photos or fewer are all there: their programs need no mask.
    """
    count, photos = len(crops), crops.shape[1] // people
    own = crops.reshape(count, people, photos, *crops.shape[2:])
    padded = 1 << (photos - 1).bit_length()
    rows = np.minimum(np.arange(padded), photos - 1)
    mask = None if padded <= _UNMASKED_PHOTOS else np.arange(padded) < photos
    return own[:, :, rows].reshape(count, people * padded, *crops.shape[2:]), mask
