"""Memory, memory traffic, kernels and collectives of a program compiled for a target."""

import dataclasses
import re
from typing import Any

import jax
from jax.experimental import topologies

from fact_jax.plan.hbm_traffic import hbm_bytes
from fact_jax.plan.hlo import read_collectives, read_kernels, summarize
from fact_jax.plan.targets import Target
from fact_jax.utils.errors import UserError, first_line

# What the compiler says of a program that is too large.
_OVERFLOW = re.compile(
    r"(?:\(|Used )([\d.]+)([KMGT]?)(?:\) exceeds available HBM \(| of )([\d.]+)([KMGT]?)(?:\)| hbm)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """What is known of a program, on one device.

    ``used`` bytes are those of its arguments, results and temporaries at once; ``usable`` bytes,
    None where the compiler does not say. What is read from the program is None where it does not
    fit: ``accessed`` (bytes read and written), ``kernels`` (name and how often it runs) and
    ``collectives``.
    """

    used: float
    usable: float | None = None
    accessed: int | None = None
    kernels: dict[str, int] | None = None
    collectives: list[dict[str, Any]] | None = None


def target_devices(target: Target) -> list[Any]:
    """Devices to compile for; UserError where the compiler knows of none like these."""
    try:
        topology = topologies.get_topology_desc(platform=target.platform, **target.options)
    except Exception as error:  # the compiler's own words, of no class that could be told apart
        raise UserError(f"cannot compile for {target.name}: {first_line(error)}") from error
    return list(topology.devices)


def compile_program(lowered: jax.stages.Lowered) -> CompiledProgram:
    """Compile for the devices that it was lowered for, and read what comes of it."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used, usable = read_overflow(str(error))
        return CompiledProgram(used=used, usable=usable)
    memory = compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    text = compiled.as_text()
    return CompiledProgram(
        used=memory.argument_size_in_bytes + new + memory.temp_size_in_bytes,
        accessed=hbm_bytes(text),
        kernels=read_kernels(text),
        collectives=summarize(read_collectives(text)),
    )


def read_overflow(message: str) -> tuple[float, float]:
    """Bytes used and usable, from the compiler's complaint that memory does not suffice."""
    match = _OVERFLOW.search(message)
    if match is None:
        raise RuntimeError(f"the program does not compile: {message}")
    used, usable = (
        float(number) * _UNITS[unit] for number, unit in (match.groups()[:2], match.groups()[2:])
    )
    return used, usable
