"""Interfaces of the engine: ``Task`` (loss, samples, export) and ``Source`` (batches)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from fact_train.config import TrainConfig


class Source(Protocol):
    """Training data on the host.

    The batch of a step is a pure function of the seed and the step, whatever the number of
    processes: resuming is exact, and the step is the whole position.
    """

    def batches(self, start: int, rows: Int[np.ndarray, " r"]) -> Iterator[dict[str, np.ndarray]]:
        """These rows of the global batch of step ``start`` + 1, ``start`` + 2, ... without end.

        ``rows`` are the ascending row numbers (of ``batch_size``) that this process needs.
        """


class Task(Protocol):
    """One thing to train.

    A task may also define ``state_update(trainable, aux) -> trainable``, for what is not learned by
    gradient (batch-norm statistics): ``loss`` then puts a tree under the metric name ``"aux"``,
    and the engine hands it over, on the device, with the updated weights. And ``open_samples()``,
    called before the first step, which reads what ``samples`` needs (UserError if it cannot). And
    ``notes``, lines for the log about how its models were put together.
    """

    config: TrainConfig
    options: object
    notes: list[str]

    def __init__(self, config: TrainConfig):
        self.config = config
        self.options = config.options
        self.notes = []

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """(trainable, frozen): nested pure dicts of arrays, trainable in float32."""

    def source(self) -> Source:
        """The training data."""

    def loss(
        self,
        trainable: PyTree,
        frozen: PyTree,
        batch: dict[str, Array],
        *,
        step: Array,
        keys: Key[Array, " b"],
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Scalar loss in float32, and scalar metrics with flat names such as ``loss/mse``.

        The loss is a mean over samples, and what is random in a sample comes from its own key: so
        neither devices nor microbatches, which split the batch, change the numbers.
        """

    def samples(
        self, trainable: PyTree, frozen: PyTree, key: jax.Array
    ) -> dict[str, np.ndarray | float]:
        """Name -> uint8 picture (h, w, 3), or a number; the key is the same at every call.

        None unless a task has some. If the task has an attribute ``score``, it is the name of the
        number by which the best checkpoints are known (the higher the better). Every process calls
        this, with arrays of its first device; if the task has ``samples_on_mesh`` set, with arrays
        that lie whole on every device of the mesh, and all of them may draw.
        """
        return {}

    def export(self, trainable: PyTree, frozen: PyTree, directory: Path, step: int) -> None:
        """Write files that inference can open into an empty directory."""
