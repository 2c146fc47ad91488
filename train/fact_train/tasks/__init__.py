"""Registry of tasks: name -> (module, class), imported only when it runs."""

import importlib
from difflib import get_close_matches
from typing import TYPE_CHECKING, get_type_hints

from fact_jax.utils.errors import UserError
from fact_jax.utils.miniature import require_miniature

if TYPE_CHECKING:
    from fact_train.config import TrainConfig
    from fact_train.engine.task import Task

TASKS: dict[str, tuple[str, str]] = {
    "vae": ("fact_train.tasks.vae", "VAETask"),
    "base": ("fact_train.tasks.base", "BaseTask"),
    "encoder": ("fact_train.tasks.face_encoder", "EncoderTask"),
    "judge": ("fact_train.tasks.metric_networks", "MetricNetworksTask"),
    "adapter": ("fact_train.tasks.adapter", "AdapterTask"),
}


def task_class(config: "TrainConfig") -> type["Task"]:
    """The class that ``config.task`` names; UserError if there is none, or for other options."""
    if config.task not in TASKS:
        near = get_close_matches(config.task, TASKS, n=1, cutoff=0.0)[0]
        raise UserError(f"no task {config.task!r}; the nearest is {near!r}")
    module, name = TASKS[config.task]
    found = getattr(importlib.import_module(module), name)
    wanted = get_type_hints(found).get("options", object)
    if not isinstance(config.options, wanted):
        raise UserError(
            f"the task {config.task!r} takes {wanted.__name__} as its options, this experiment has "
            f"{type(config.options).__name__}: choose an experiment of that task"
        )
    return found


def make_task(config: "TrainConfig") -> "Task":
    """Build the task that ``config.task`` names: ``Class(config)``."""
    require_parts(config)
    return task_class(config)(config)


def require_parts(config: "TrainConfig") -> None:
    """UserError, with their options, for parts of the miniature that are not there."""
    options = {f"options.{name}": value for name, value in vars(config.options).items()}
    require_miniature({name: path for name, path in options.items() if isinstance(path, str)})
