"""Generation parameters and requests, checked."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from pathlib import Path

from fact_jax.diffusion.samplers import SAMPLERS
from fact_jax.fact import Guidance
from fact_jax.utils.errors import UserError

MAX_GUIDANCE = 50.0
MAX_SCALE = 2.0
MAX_SEED = 2**31 - 1
MAX_SIDE = 8192
"""Pixels: a typing error beyond that would end in a failed allocation of terabytes."""
MAX_PICTURES = 1_000_000
MAX_PROMPT = 4000
"""Characters: many more than a text encoder reads, and few enough for a JPEG to record."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Photo:
    """A photo and what helps to find the face in it (``fact_jax.face.prepare_photo`` explains).

    ``person`` says whose it is, from 0, where several people are to be in one picture.
    """

    path: Path
    points: Path | None = None
    mask: Path | None = None
    parsing: Path | None = None
    pack: str | None = None
    index: int | None = None
    person: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationParams:
    """Sampling parameters, whatever the prompts.

    ``height`` and ``width`` are pixels; None is the base's own size. Raises UserError for what
    no base could draw; ``fact_infer.parts.BaseModel`` checks what depends on the base.
    """

    negative: str = ""
    sampler: str = "pndm"
    steps: int = 50
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"no sampler {self.sampler!r}; known are {', '.join(SAMPLERS)}")
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")
        check_prompt(self.negative)
        check_guidance(self.guidance)
        for name in ("height", "width"):
            pixels = getattr(self, name)
            if pixels is not None and not 1 <= pixels <= MAX_SIDE:
                raise UserError(f"{name} must lie in 1..{MAX_SIDE} pixels, got {pixels}")

    def generation_params(self) -> "GenerationParams":
        """The parameters alone, hashable, without what a request adds."""
        fields = dataclasses.fields(GenerationParams)
        return GenerationParams(**{field.name: getattr(self, field.name) for field in fields})


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest(GenerationParams):
    """Every prompt with every seed, with the people of ``photos`` or, without any, by the base.

    Photos come person after person, an equal number of each. ``regions`` are mask files of the
    pictures' size: where each person is drawn. One person alone may do without. ``image`` is a
    picture that is drawn over in the last ``strength`` of the steps, all of it or what
    ``image_mask`` covers; ``control`` is one for the ControlNet, which steers by ``control_scale``.
    """

    prompts: Sequence[str]
    seeds: Sequence[int] = (0,)
    photos: Sequence[Photo] = ()
    regions: Sequence[Path] = ()
    image: Path | None = None
    image_mask: Path | None = None
    strength: float = 0.6
    control: Path | None = None
    control_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts or not self.seeds:
            raise UserError("at least one prompt and one seed are needed")
        if len(self.prompts) * len(self.seeds) > MAX_PICTURES:
            raise UserError(f"at most {MAX_PICTURES:,} pictures (prompts times seeds) at once")
        for seed in self.seeds:
            check_seed(seed)
        for prompt in self.prompts:
            check_prompt(prompt)
        if self.image_mask is not None and self.image is None:
            raise UserError("a mask of what is drawn anew was given, but no image to draw over")
        check_range("control scale", self.control_scale, 0.0, MAX_SCALE)
        self._check_people()

    def _check_people(self) -> None:
        whose = [photo.person for photo in self.photos]
        if whose != sorted(whose):
            raise UserError(f"photos must be of person 0, then 1 and so on, got {whose}")
        people = len(by_person(self.photos))
        if len(self.regions) not in {people, 0 if people < 2 else people}:
            raise UserError(
                f"{people} people and {len(self.regions)} regions: each person needs one"
            )

    def pictures(self) -> list[tuple[str, int]]:
        """Prompt and seed of every picture, in the order in which they are drawn."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


def by_person(photos: Sequence[Photo]) -> list[list[Photo]]:
    """The photos of each person; UserError unless all have some, and equally many."""
    whose = sorted({photo.person for photo in photos})
    if whose != list(range(len(whose))):
        raise UserError(f"photos must be of person 0, then 1 and so on, got {whose}")
    people = [[photo for photo in photos if photo.person == person] for person in whose]
    if len({len(own) for own in people}) > 1:
        raise UserError(
            "every person needs as many photos as the others: there are "
            + ", ".join(f"{len(own)} of person {person}" for person, own in enumerate(people))
        )
    return people


def check_guidance(guidance: Guidance) -> None:
    """UserError for a guidance out of range."""
    check_range("guidance", guidance.text, 1.0, MAX_GUIDANCE)
    if guidance.face is not None:
        check_range("face guidance", guidance.face, 0.0, MAX_GUIDANCE)
    scales = guidance.face_scale
    for scale in scales if isinstance(scales, tuple) else (scales,):
        check_range("face scale", scale, 0.0, MAX_SCALE)
    for pattern, factor in guidance.block_scales:
        check_range(f"block scale {pattern!r}", factor, 0.0, MAX_SCALE)
    if guidance.cap is not None:
        check_range("the cap of the face's increment", guidance.cap, 0.0, math.inf)


def check_seed(seed: int) -> None:
    """UserError for a seed out of range."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"a seed must lie in 0..{MAX_SEED}, got {seed}")


def check_prompt(prompt: str) -> None:
    """UserError for a text that no tokenizer reads, or no picture file could record."""
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"a prompt has at most {MAX_PROMPT:,} characters, got {len(prompt):,}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt {prompt[:40]!r} is not valid text (UTF-8)") from None


def check_range(name: str, value: float, low: float, high: float) -> None:
    """UserError for a number that is not in ``low..high``."""
    if not isinstance(value, numbers.Real):
        raise UserError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and low <= value <= high):
        raise UserError(f"{name} must lie in {low:g}..{high:g}, got {value:g}")
