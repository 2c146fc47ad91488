"""Questions of the laboratory: configurations, and claims written before the runs.

A question is a file in ``configs/lab/`` with a docstring that says the claim and the number that
would refute it, and ``question = Question(...)``. ``fact`` is what all others are compared with.
"""

import dataclasses
import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Literal

from fact_jax.curriculum import Stage
from fact_jax.utils.errors import UserError
from fact_train.config import TrainConfig

QUESTIONS = "fact_train.configs.lab"
REFERENCE = "fact"
SEEDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What a variant is claimed to do to a measure, against FACT.

    ``measure`` is a score in ``pictures.jsonl``. The difference, variant minus FACT, over all seeds
    and people is to be ``above`` or ``below`` zero. ``fact_train.lab.verdicts`` says when it holds,
    when it is refuted, and when it is open.
    """

    variant: str
    measure: str
    difference: Literal["above", "below"]
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Configurations by name, claims about them, and options of ``fact-infer evaluate`` for each.

    ``evaluate`` holds what a variant's pictures are drawn with beside the laboratory's own options.
    """

    variants: Mapping[str, TrainConfig]
    claims: tuple[Claim, ...] = ()
    evaluate: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for claim in self.claims:
            if claim.variant not in self.variants:
                raise ValueError(f"a claim about {claim.variant!r}, which is no variant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A question with its name and docstring."""

    name: str
    text: str
    question: Question


def load_questions(names: list[str]) -> list[Loaded]:
    """The named questions, all if none are named; ``fact`` is always there and comes first."""
    package = importlib.import_module(QUESTIONS)
    known = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_")
    for name in names:
        if name not in known:
            raise UserError(f"no question {name!r} in the laboratory: there are {', '.join(known)}")
    chosen = [REFERENCE, *(n for n in known if n != REFERENCE and (not names or n in names))]
    found = []
    for name in chosen:
        module = importlib.import_module(f"{package.__name__}.{name}")
        text = inspect.getdoc(module) or ""
        found.append(Loaded(name=name, text=text, question=module.question))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training and its evaluation; ``key`` is its folder."""

    question: str
    variant: str
    seed: int
    config: TrainConfig
    options: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.variant}/seed-{self.seed}"

    def digest(self) -> str:
        """Digest of everything that decides the numbers but the models' files."""
        return hashlib.sha256(f"{self.config!r} {self.options!r}".encode()).hexdigest()[:32]

    def training_digest(self) -> str:
        """Digest of what decides the training."""
        return hashlib.sha256(repr(self.config).encode()).hexdigest()[:32]


def runs_of(questions: list[Loaded], seeds: int, steps: int | None, common: tuple) -> list[Run]:
    """All trainings, seed by seed, so that every seed is a whole comparison."""
    return [
        Run(
            question=loaded.name,
            variant=variant,
            seed=seed,
            config=dataclasses.replace(
                config if steps is None else shortened(config, steps), seed=seed
            ),
            options=(*common, *loaded.question.evaluate.get(variant, ())),
        )
        for seed in range(seeds)
        for loaded in questions
        for variant, config in loaded.question.variants.items()
    ]


def shortened(config: TrainConfig, steps: int) -> TrainConfig:
    """The same experiment in another number of steps: warm-up and stages in proportion."""
    part = steps / config.steps

    def scaled(stage: Stage) -> Stage:
        return dataclasses.replace(stage, steps=round(stage.steps * part))

    return dataclasses.replace(
        config,
        steps=steps,
        optimizer=dataclasses.replace(
            config.optimizer, warmup_steps=round(config.optimizer.warmup_steps * part)
        ),
        options=dataclasses.replace(
            config.options, stages=tuple(map(scaled, config.options.stages))
        ),
    )
