"""Experiment configuration: frozen dataclasses, and the files that hold them.

An experiment is a Python file (``train/fact_train/configs/NAME.py`` or any path) with a docstring
and ``config = TrainConfig(...)``. ``options`` is a dataclass that the task owns.
"""

import ast
import dataclasses
import importlib.util
import math
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from fact_jax.mesh import MeshConfig
from fact_jax.utils.errors import UserError
from fact_jax.utils.ranges import (
    CheckedFields,
    Count,
    CountOrZero,
    Name,
    NonNegative,
    Pattern,
    Positive,
    Range,
)

CONFIGS = Path(__file__).parent / "configs"
DATA_PARALLEL = MeshConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(CheckedFields):
    """AdamW. ``multipliers``: (path regex, factor) on the learning rate, the first match wins.

    Gradients longer than ``clip_norm`` (all of them as one vector) are shortened to it; ``inf``
    clips nothing. Biases, norms and gates are never decayed; embeddings (position and token
    embeddings, mask tokens, the resampler's learned queries) only with ``decay_embeddings``.
    """

    learning_rate: NonNegative = 1e-4
    weight_decay: NonNegative = 1e-2
    decay_embeddings: bool = False
    clip_norm: Annotated[float, Range(0, math.inf, open_low=True)] = 1.0
    warmup_steps: CountOrZero = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    b1: Annotated[float, Range(0, 1, open_high=True)] = 0.9
    b2: Annotated[float, Range(0, 1, open_high=True)] = 0.999
    eps: Positive = 1e-8
    multipliers: tuple[tuple[Pattern, NonNegative], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMAConfig(CheckedFields):
    """Exponential moving average of the weights; decay 0 turns it off."""

    decay: Annotated[float, Range(0, 1, open_high=True)] = 0.9999
    warmup: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(CheckedFields):
    """Save every so many steps (and at the end).

    What stays: the newest ``keep``; those of every ``keep_every`` steps (0: none); and the ``best``
    ones: by the similarity watched at that very step where the task watches it every so many steps
    (``log.samples_every``), otherwise by the mean loss since the checkpoint before.
    """

    every: Count = 1000
    keep: Count = 2
    keep_every: CountOrZero = 0
    best: CountOrZero = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig(CheckedFields):
    """Metrics every ``every`` steps; sample images every ``samples_every``.

    With 0 there are samples only at the end of the run, with None there are none.

    ``profile_steps``: a profiler trace from the first to the second step, (0, 0) for none.
    ``wandb``: to Weights & Biases too.
    """

    every: Count = 50
    samples_every: CountOrZero | None = 0
    profile_steps: tuple[CountOrZero, CountOrZero] = (0, 0)
    wandb: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(
                f"profile_steps must be a first and a last step, not {self.profile_steps}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(CheckedFields):
    """One experiment. ``task`` is a name in ``fact_train.tasks.TASKS``, ``options`` its dataclass.

    ``accumulate`` is into how many microbatches a step splits its batch. ``remat`` is what the
    backward pass computes again instead of keeping it, block by block: nothing, everything but
    matrix products, or everything.
    """

    task: Name
    steps: Count
    batch_size: Count
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    accumulate: Count = 1
    remat: Literal["none", "dots", "block"] = "none"
    mesh: MeshConfig = DATA_PARALLEL
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    options: Any


def load_config(name: str | Path) -> tuple[str, TrainConfig]:
    """Read an experiment by name or path: (short name, config)."""
    path = Path(name) if str(name).endswith(".py") else CONFIGS / f"{name}.py"
    if not path.is_file():
        near = get_close_matches(str(name), [known for known, _ in list_configs()], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`fact-train configs` lists the names"
        raise UserError(f"no experiment {str(name)!r} ({path} does not exist); {hint}")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert spec is not None  # there is a loader for .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that an experiment may bring its own options and task
    try:
        spec.loader.exec_module(module)
    except ValueError as error:  # a setting out of its range, as it says itself
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, TrainConfig):
        raise UserError(f"{path} defines no `config = TrainConfig(...)`")
    return path.stem, config


def list_configs() -> list[tuple[str, str]]:
    """(name, first line of the docstring) of every experiment, without running any of them."""
    return [
        (path.stem, (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0])
        for path in sorted(CONFIGS.glob("*.py"))
        if path.stem != "__init__"
    ]
