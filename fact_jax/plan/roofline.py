"""Bounds of a program's time on a chip, and the memory that it may use there."""

import dataclasses
from collections.abc import Iterator

from fact_jax.plan.chips import GB, Chip

TPU_RESERVED = 2**28  # bytes that the compiler leaves alone: it says 15.75 GiB of v5e's 16
GPU_USABLE = 0.92  # of a GPU's memory, for XLA_PYTHON_CLIENT_MEM_FRACTION


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of arithmetic at a chip's peak, and of memory traffic and collectives at full speed.

    At best all go on at one time, at worst one after the other.
    """

    arithmetic: float
    memory: float
    collectives: float = 0.0

    @property
    def best(self) -> float:
        return max(self.arithmetic, self.memory, self.collectives)

    @property
    def worst(self) -> float:
        return self.arithmetic + self.memory + self.collectives

    @property
    def bound_by(self) -> str:
        return max(("arithmetic", "memory", "collectives"), key=lambda part: getattr(self, part))


def usable_bytes(chip: Chip) -> float:
    """Of a chip's memory, where the compiler does not say."""
    return chip.memory * GPU_USABLE if chip.is_gpu else chip.memory - TPU_RESERVED


def assumptions(chip: Chip) -> Iterator[str]:
    """Lines of what every plan assumes."""
    yield (
        f"{chip.name}: {chip.peak / 1e12:.0f} TFLOP/s dense bfloat16, {chip.memory / GB:.1f} GB at "
        f"{chip.bandwidth / GB:.0f} GB/s ({chip.source})"
    )
    yield (
        "memory traffic: what every instruction of the compiled program reads and writes, "
        "loops in full, but for arrays that the compiler keeps on the chip"
    )
    if chip.is_gpu:
        yield (
            f"{GPU_USABLE:.0%} of the memory is taken to be usable "
            f"(XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_USABLE})"
        )


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.4g} ms"
