"""FACT in ComfyUI's UNet: what it adds between self-attention and text cross-attention.

ComfyUI calls the patches of the kind ``middle_patch`` at that place of every transformer block with
the visual tokens and what it knows of the call, and goes on with what they return.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .faces import resize_area
from .models import FaceAdapter

MAX_STRENGTH = 2.0


@dataclasses.dataclass(frozen=True)
class Person:
    """Face tokens (1, m, d) of one person, those of no face, where (h, w), and how strong."""

    tokens: Tensor
    null: Tensor
    region: np.ndarray | None = None
    strength: float = 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the face steers the steps that are drawn; ``fact_jax.fact.Guidance`` has the same.

    ``schedule``: factors of ``strength`` over the steps, lines between. ``start`` and ``stop``:
    fractions of them, outside of which the adapter is silent. ``blocks``: pairs of a pattern and a
    factor for the blocks whose path (in diffusers' names) it is first found in. ``cap``: at most
    this share of the visual tokens' norm is added. ``adain``: face tokens take the mean of
    the visual ones. ``negative``: what the negative prompt sees, ``null`` or the ``same`` face.
    """

    strength: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    schedule: tuple[float, ...] = (1.0,)
    blocks: tuple[tuple[str, float], ...] = ()
    cap: float | None = None
    adain: bool = False
    negative: str = "null"

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise ValueError(
                f"the window must be 0 <= start <= stop <= 1: {self.start:g}..{self.stop:g}"
            )
        if not self.schedule:
            raise ValueError("a schedule needs at least one number")
        if self.negative not in ("null", "same"):
            raise ValueError(f"negative_face is null or same, not {self.negative!r}")
        for value in (self.strength, *self.schedule, *(factor for _, factor in self.blocks)):
            if not 0.0 <= value <= MAX_STRENGTH:
                raise ValueError(f"strengths lie in 0..{MAX_STRENGTH:g}, got {value:g}")

    def at(self, i: int, steps: int) -> float:
        """The strength in step ``i`` of ``steps``."""
        if not np.float32(self.start * steps) <= i < np.float32(self.stop * steps):
            return 0.0
        last = len(self.schedule) - 1
        place = i * last / max(steps - 1, 1)
        return self.strength * float(np.interp(place, np.arange(last + 1), self.schedule))

    def factor(self, path: str) -> float:
        return next((f for pattern, f in self.blocks if re.search(pattern, path)), 1.0)


def parse_blocks(text: str, paths: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Lines or comma-separated ``PATTERN=FACTOR``, as ``up_blocks=0.5``."""
    pairs = []
    for part in filter(None, (p.strip() for p in re.split(r"[,\n]", text))):
        pattern, mark, number = part.rpartition("=")
        try:
            found = any(re.search(pattern.strip(), path) for path in paths)
            pairs.append((pattern.strip(), float(number)))
        except (re.error, ValueError):
            mark, found = "", False
        if not mark or not pattern.strip():
            raise ValueError(f"block strengths are as up_blocks=0.5, got {part!r}")
        if not found:
            raise ValueError(f"{pattern!r} is found in no block: {', '.join(paths)}")
    return tuple(pairs)


def parse_schedule(text: str) -> tuple[float, ...]:
    """Comma-separated numbers; 1 where there is no text."""
    try:
        return tuple(float(part) for part in text.split(",")) if text.strip() else (1.0,)
    except ValueError:
        raise ValueError(f"a schedule is as 0.2, 1, got {text!r}") from None


BlockId = tuple[str, int, int]


def unet_blocks(unet: nn.Module) -> dict[str, tuple[BlockId, int]]:
    """ComfyUI's place of every transformer block, (part, block, index), by its path in diffusers.

    And its width.

    Of UNets of Stable Diffusion's layout; ValueError for others.
    """
    if not all(hasattr(unet, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        raise ValueError("this model has no UNet of Stable Diffusion 1.5")
    found: dict[str, tuple[BlockId, int]] = {}

    def walk(kind: str, name: str, blocks: Any, turn: str) -> None:
        level = attentions = 0
        for i, block in enumerate(blocks):
            for module in block:
                inner = getattr(module, "transformer_blocks", ())
                prefix = f"{name}.{level}" if turn else name
                for k, transformer in enumerate(inner):
                    path = f"{prefix}.attentions.{attentions}.transformer_blocks.{k}"
                    found[path] = (kind, i, k), transformer.norm2.normalized_shape[0]
                attentions += bool(len(inner))
                if type(module).__name__ == turn:
                    level, attentions = level + 1, 0

    walk("input", "down_blocks", unet.input_blocks, "Downsample")
    walk("middle", "mid_block", [unet.middle_block], "")
    walk("output", "up_blocks", unet.output_blocks, "Upsample")
    return found


class Adapters(nn.Module):
    """All blocks' adapters, in a row, so that ComfyUI loads and frees them as one model."""

    def __init__(self, adapters: Mapping[str, FaceAdapter]):
        super().__init__()
        self.paths = list(adapters)
        self.blocks = nn.ModuleList(adapters.values())


class FacePatch:
    """One application of an adapter, which :class:`Middle` and :class:`CopiedNorm` call."""

    def __init__(
        self,
        adapters: Adapters,
        places: Mapping[str, tuple[BlockId, int]],
        people: Sequence[Person],
        settings: Settings,
    ):
        if not people:
            raise ValueError("no face was given")
        if len(people) > 1 and all(person.region is None for person in people):
            raise ValueError("several people: give each a region, a mask of where to draw them")
        made_for = dict(
            zip(adapters.paths, (len(a.linear.bias) for a in adapters.blocks), strict=True)
        )
        widths = {path: width for path, (_, width) in places.items()}
        if made_for != widths:
            one, other = (
                f"{len(w)} blocks of widths {list(w.values())}" for w in (made_for, widths)
            )
            raise ValueError(f"this adapter is for another base: {one}, the model has {other}")
        self.adapters, self.people, self.settings = adapters, people, settings
        self.index = {places[path][0]: i for i, path in enumerate(adapters.paths)}
        self.factors = [settings.factor(path) for path in adapters.paths]
        self._step: tuple[Any, float] = (None, 0.0)
        self._keys: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._kept: Tensor | None = None

    def add(self, x: Tensor, options: Mapping[str, Any]) -> Tensor:
        """The visual tokens (b, n, c) of a block with the face."""
        i = self._block(options)
        self._kept = x
        scale = 0.0 if i is None else self._scale(options) * self.factors[i]
        if not scale:
            return x
        adapter, settings = self.adapters.blocks[i], self.settings
        keys, values, mask, there, strength = self._face(i, adapter, x, options)
        normed = adapter.norm1(x)
        own = adapter.attn.to_k(normed), adapter.attn.to_v(normed)
        if settings.adain:
            keys, values = (
                self._match_mean(a, to) for a, to in zip((keys, values), own, strict=True)
            )
        keys, values = (torch.cat(pair, dim=1) for pair in zip(own, (keys, values), strict=True))
        mixed = adapter.gated(normed, keys, values, options["n_heads"], mask)
        scale = scale * strength
        first = scale * adapter.alpha_attn.to(x).tanh() * mixed
        dense = adapter.feed_forward(adapter.norm2(x + first))
        added = first + scale * adapter.alpha_dense.to(x).tanh() * dense
        if there is not None:
            added = added.where(there, 0)
        if settings.cap is not None:
            length, limit = (a.float().flatten(1).norm(dim=1)[:, None, None] for a in (added, x))
            limit = settings.cap * limit
            added = added * torch.where(length > limit, limit / length, 1.0).to(added.dtype)
        self._kept = x + added
        return self._kept

    def copied_norm(self, n: Tensor, options: Mapping[str, Any]) -> Tensor:
        """``norm2`` of a block as the adapter's file has it."""
        i, kept = self._block(options), self._kept
        norm = None if i is None else self.adapters.blocks[i].ln
        return n if norm is None or kept is None else norm(kept)

    def _block(self, options: Mapping[str, Any]) -> int | None:
        block = options.get("block")
        return None if block is None else self.index.get((*block, options.get("block_index", 0)))

    def _scale(self, options: Mapping[str, Any]) -> float:
        """The step's strength, read from the device once a call of the UNet."""
        sigmas = options.get("sigmas")
        if self._step[0] is not None and self._step[0] is sigmas:
            return self._step[1]
        every, settings = options.get("sample_sigmas"), self.settings
        if sigmas is None or every is None or len(every) < 2:
            if (settings.start, settings.stop) != (0.0, 1.0) or len(settings.schedule) > 1:
                raise ValueError("this sampler does not say its steps: no window, no schedule")
            scale = settings.strength * settings.schedule[0]
        else:
            sigma, steps = float(sigmas.flatten()[0]), len(every) - 1
            passed = sum(float(s) >= sigma * (1 - 1e-6) for s in every[:-1].tolist())
            scale = settings.at(max(passed - 1, 0), steps)
        self._step = sigmas, scale
        return scale

    def _face(
        self, i: int, adapter: FaceAdapter, x: Tensor, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | float]:
        """Keys and values of each row's face, who sees what, where, and how strong."""
        key = i, x.device, x.dtype
        if key not in self._keys:
            tokens = [
                torch.cat([getattr(p, n) for p in self.people], 1) for n in ("null", "tokens")
            ]
            self._keys[key] = adapter.face_keys(torch.cat(tokens).to(x))
        branches = options.get("cond_or_uncond") or [0]
        same = self.settings.negative == "same"
        each = len(x) // len(branches)
        rows = torch.tensor([int(same or b == 0) for b in branches], device=x.device)
        rows = rows.repeat_interleave(each)
        keys, values = (half[rows] for half in self._keys[key])
        strengths = [person.strength for person in self.people]
        if all(person.region is None for person in self.people):
            return keys, values, None, None, strengths[0]
        here, strength = self._regions(x, options)
        counts = [person.tokens.shape[1] for person in self.people]
        faces = torch.cat(
            [here[:, None].expand(-1, m) for here, m in zip(here, counts, strict=True)], dim=1
        )
        mask = torch.cat([faces.new_ones(len(faces), len(faces)), faces], dim=1)
        there = here.any(dim=0)[None, :, None]
        return keys, values, mask.expand(len(x), -1, -1), there, strength

    def _regions(self, x: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Who of k people is in each of n tokens, (k, n), and the mean of their strengths."""
        height, width = options["activations_shape"][2:]
        key = height, width, x.device, x.dtype
        if key not in self._masks:
            everywhere = np.ones((height, width), bool)
            here = [
                everywhere if p.region is None else resize_area(p.region, (height, width)) > 0.5
                for p in self.people
            ]
            self._check_regions(options["original_shape"][2:])
            seen = torch.from_numpy(np.stack(here)).flatten(1).to(x.device)
            given = torch.tensor([p.strength for p in self.people], device=x.device)
            mean = (given[:, None] * seen).sum(0) / seen.sum(0).clamp(min=1)
            self._masks[key] = seen, mean.to(x.dtype)[None, :, None]
        return self._masks[key]

    def _check_regions(self, latents: Sequence[int]) -> None:
        """ValueError for a region that no cell of the latents (height, width) is in."""
        for i, person in enumerate(self.people):
            if person.region is None or (resize_area(person.region, latents) > 0.5).any():
                continue
            raise ValueError(
                f"region {i + 1} has no place in the picture: it is white in more than half of "
                f"none of {latents[0]} x {latents[1]} cells"
            )

    def _match_mean(self, face: Tensor, to: Tensor) -> Tensor:
        """Each person's tokens, their mean replaced by that of ``to`` (arXiv 2403.11781)."""
        parts = face.split([person.tokens.shape[1] for person in self.people], dim=1)
        mean = to.mean(dim=1, keepdim=True)
        return torch.cat([p - p.mean(dim=1, keepdim=True) + mean for p in parts], dim=1)


class _Shared:
    """ComfyUI copies the options of a model deeply each time it is cloned: weights stay one."""

    def __init__(self, patch: FacePatch):
        self.patch = patch

    def __deepcopy__(self, memo: dict) -> "_Shared":
        return self


class Middle(_Shared):
    """The patch between self-attention and text cross-attention."""

    def __call__(self, x: Tensor, options: Mapping[str, Any]) -> Tensor:
        return self.patch.add(x, options)


class CopiedNorm(_Shared):
    """The patch of what asks the text, for files with a copy of the block's ``norm2``."""

    def __call__(self, n: Tensor, context: Tensor, value: Tensor, options: Any) -> tuple:
        return self.patch.copied_norm(n, options), context, value
