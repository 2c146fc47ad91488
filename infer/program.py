"""What a JAX generation is compiled for, and the numbers that the compiled program is fed."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fact_jax.fact import Guidance

_SOME = 2.0
"""Stands for any number that is there, in a guidance that only says which ones are."""


def keep_programs() -> Path:
    """Keep compiled programs on disk for later runs; gives the folder.

    It is JAX's own setting (JAX_COMPILATION_CACHE_DIR) if there is one, else in the user's caches.
    """
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "fact-jax" / "programs"))
    return Path(jax.config.jax_compilation_cache_dir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """All that a program depends on; other numbers, pictures and prompts need no new one."""

    sampler: str
    steps: int
    start: int
    size: tuple[int, int]
    people: int
    guidance: Guidance
    devices: int = 1
    ticks: bool = False


def split_guidance(
    guidance: Guidance, steps: int, blocks: Sequence[str]
) -> tuple[Guidance, dict[str, np.ndarray]]:
    """A guidance as a program's shape, and its numbers; :func:`join_guidance` takes both.

    Whatever the window, the schedule and the patterns are: the numbers hold a strength for each
    step and a factor for each of ``blocks`` (paths in the UNet).
    """
    there = {name: getattr(guidance, name) for name in ("text", "face", "cap")}
    there = {name: value for name, value in there.items() if value is not None}
    if guidance.text == 1.0:
        del there["text"]
    shape = Guidance(
        text=_SOME if "text" in there else 1.0,
        face=_SOME if "face" in there else None,
        cap=_SOME if "cap" in there else None,
        negative_face=guidance.negative_face,
        adain=guidance.adain,
        combine=guidance.combine,
    )
    scales = jax.vmap(lambda i: guidance.scale_at(i, steps))(jnp.arange(steps))
    factors = guidance.block_factors(blocks)
    numbers = {"face_scale": scales, "factors": factors, **there}
    return shape, {name: np.asarray(value, np.float32) for name, value in numbers.items()}


def join_guidance(shape: Guidance, numbers: Mapping[str, Array], blocks: Sequence[str]) -> Guidance:
    """The guidance that was split, its numbers traced."""
    plain = {name: value for name, value in numbers.items() if name != "factors"}
    patterns = [f"^{re.escape(path)}$" for path in blocks]
    block_scales = tuple(zip(patterns, numbers["factors"], strict=True))
    return dataclasses.replace(shape, **plain, block_scales=block_scales)
