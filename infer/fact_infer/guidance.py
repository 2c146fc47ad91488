"""A guidance resolved to plain arrays, which both backends take."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from fact_jax.fact import Branch, Guidance, guidance_branches, guidance_weights
from fact_jax.regions import Regions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedGuidance:
    """The guidance of one generation by branch, step, block and token.

    ``weights`` are those of the ``branches``' outputs. ``step_scales`` are the adapter's strength
    in each step that is drawn, times ``block_factors`` in each transformer block. ``regions`` say
    by the number of tokens where each of ``people`` is drawn; None: everywhere. ``cap`` and
    ``adain``: ``fact_jax.models.adapter.FaceControls``; with one of the two there are both, an
    infinite cap and an ``adain`` that is off.
    """

    branches: tuple[Branch, ...]
    weights: tuple[np.float32, ...]
    step_scales: Float[np.ndarray, " steps"]
    block_factors: Float[np.ndarray, " blocks"]
    cap: np.float32 | None = None
    adain: np.bool_ | None = None
    people: int = 1
    regions: Regions | None = None


def resolve_guidance(
    guidance: Guidance,
    steps: int,
    blocks: Sequence[str],
    *,
    with_face: bool,
    people: int = 1,
    regions: Regions | None = None,
) -> ResolvedGuidance:
    """The guidance of ``steps`` drawn steps, for blocks with these paths in the UNet."""
    cap = np.float32(np.inf if guidance.cap is None else guidance.cap)
    controlled = guidance.cap is not None or guidance.adain
    return ResolvedGuidance(
        branches=guidance_branches(guidance, with_face=with_face),
        weights=tuple(map(np.float32, guidance_weights(guidance, with_face=with_face))),
        step_scales=step_scales(guidance, np.arange(steps), steps),
        block_factors=np.asarray(guidance.block_factors(blocks), np.float32),
        cap=cap if controlled else None,
        adain=np.bool_(guidance.adain) if controlled else None,
        people=people,
        regions=regions,
    )


def step_scales(
    guidance: Guidance, indices: Sequence[int] | Int[np.ndarray, " n"], steps: int
) -> Float[np.ndarray, " n"]:
    """The adapter's strength at these step numbers of ``steps`` drawn ones."""
    scales = jax.vmap(lambda i: guidance.scale_at(i, steps))(jnp.asarray(indices))
    return np.asarray(scales)
