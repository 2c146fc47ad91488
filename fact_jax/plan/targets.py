"""What the compilers need to know of chips that are not here.

TPUs are known to theirs by name. A GPU is described by XLA's ``GpuTargetConfigProto``; the figures
are those of the makers' whitepapers and CUDA's table of compute capabilities.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from fact_jax.plan.chips import CHIPS, Chip, per_device
from fact_jax.utils.errors import UserError

GPUS_A_NODE, CHIPS_A_HOST = 8, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Devices to compile for: a JAX platform and what ``topologies.get_topology_desc`` takes."""

    platform: str
    name: str
    options: Mapping[str, Any]

    def environment(self) -> dict[str, str]:
        """Of a process that compiles for it. UserError where the compiler is not installed."""
        compiler, extra = _COMPILERS[self.platform]
        if not any(importlib.util.find_spec(module) for module in compiler):
            raise UserError(
                f"the compiler for {self.name} is not installed (the chip itself is not needed): "
                f"pip install '{extra}'"
            )
        return {**_without(os.environ, "JAX_PLATFORMS"), **_ENVIRONMENTS[self.platform]}


_COMPILERS = {
    "tpu": (("libtpu",), "jax[tpu]"),
    "cuda": (("jax_cuda12_plugin", "jax_cuda13_plugin"), "jax[cuda13]"),
}
_ENVIRONMENTS = {
    "tpu": {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_PLATFORMS": "cpu",
    },
    # Without a GPU nothing can be tried out, so that no kernel is chosen by its measured time.
    "cuda": {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    },
}


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """Compute capability, multiprocessors, FP32 lanes of each, MB of cache, GHz, and more of each
    multiprocessor: KB of shared memory, threads."""

    capability: tuple[int, int]
    cores: int
    lanes: int
    cache: int
    clock: float
    shared: int = 100
    threads: int = 1536


_GPUS = {
    "a100": _Gpu((8, 0), 108, 64, 40, 1.41, 164, 2048),
    "h100": _Gpu((9, 0), 132, 128, 50, 1.98, 228, 2048),
    "h200": _Gpu((9, 0), 132, 128, 50, 1.98, 228, 2048),
    "b200": _Gpu((10, 0), 148, 128, 126, 1.965, 228, 2048),
    "a10": _Gpu((8, 6), 72, 128, 6, 1.695),
    "l4": _Gpu((8, 9), 58, 128, 48, 2.04),
    "l40s": _Gpu((8, 9), 142, 128, 96, 2.52),
    "rtx4090": _Gpu((8, 9), 128, 128, 72, 2.52),
    "rtx5090": _Gpu((12, 0), 170, 128, 96, 2.407),
}


def slowdowns(chip: Chip) -> dict[str, float]:
    """How much longer than at its peak a chip takes for products of float32, by their precision as
    :func:`fact_jax.plan.jaxpr_costs.flops_by_product` names it.

    A TPU multiplies in passes of bfloat16, six or three; NVIDIA's TF32 has half the rate of 16
    bits, and float32 that of the ordinary lanes.
    """
    if chip.name not in _GPUS:
        return {"float32": 6.0, "tf32": 3.0}
    gpu = _GPUS[chip.name]
    lanes = 2e9 * gpu.cores * gpu.lanes * gpu.clock
    return {"float32": chip.peak / lanes, "tf32": 2.0, "default": 2.0}


def tpu_target(topology: str, slices: int = 1) -> Target:
    """So many slices of a TPU topology, as ``v5e:16x16``."""
    options: dict[str, Any] = {"topology_name": topology, "num_slices": slices}
    shape = [int(side) for side in topology.partition(":")[2].split("x")]
    if math.prod(shape) < CHIPS_A_HOST:
        options["chips_per_host_bounds"] = [*shape, 1][:3]
    return Target(
        platform="tpu",
        name=f"{slices} x {topology}" if slices > 1 else topology,
        options=options,
    )


def gpu_target(name: str, count: int) -> Target:
    """So many GPUs, eight to a node; UserError for a number that fills no node."""
    nodes, here = divmod(count, GPUS_A_NODE)
    if nodes and here:
        raise UserError(f"--gpu {name}:{count}: up to {GPUS_A_NODE} GPUs, or whole nodes of them")
    gpu, chip = _GPUS[name], CHIPS[name]
    major, minor = gpu.capability
    config = f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {gpu.cores} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock}
          memory_bandwidth: {int(chip.bandwidth)} device_memory_size: {int(chip.memory)}
          l2_cache_size: {gpu.cache << 20}
          shared_memory_per_core: {gpu.shared << 10} shared_memory_per_block: {48 << 10}
          shared_memory_per_block_optin: {gpu.shared - 1 << 10}
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {gpu.threads}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}
        platform_name: "CUDA" device_description_str: "{chip.kinds[0]}"
        dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
        """
    return Target(
        platform="cuda",
        name=f"{count} x {name}",
        options={"target_config": config, "topology": f"1x{max(nodes, 1)}x{here or GPUS_A_NODE}"},
    )


def _without(variables: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in variables.items() if key != name}


def read_topology(text: str, slices: int = 1) -> tuple[Chip, int, Target]:
    """``v5e:16x16`` -> the chip and how many; of chips that JAX shows as several, their parts."""
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)+)", text)
    if match is None:
        raise UserError(f"--topology {text}: expected a TPU and its shape, as v5e:16x16")
    if slices < 1:
        raise UserError(f"--slices {slices}: expected at least 1")
    chip = _chip(match[1], gpu=False)
    count = math.prod(map(int, match[2].split("x"))) * chip.devices * slices
    return per_device(chip), count, tpu_target(f"{chip.name}:{match[2]}", slices)


def read_gpu(text: str, usual: int = GPUS_A_NODE) -> tuple[Chip, int, Target]:
    """``h100:64`` -> the chip, and how many (``usual`` if it does not say)."""
    match = re.fullmatch(r"(\w+)(?::([1-9]\d*))?", text)
    if match is None:
        raise UserError(f"--gpu {text}: expected a GPU and how many, as h100:64")
    chip, count = _chip(match[1], gpu=True), int(match[2] or usual)
    return chip, count, gpu_target(chip.name, count)


def _chip(name: str, *, gpu: bool) -> Chip:
    known = [chip.name for chip in CHIPS.values() if chip.is_gpu == gpu]
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
        raise UserError(
            f"no data on a chip {name!r} (known: {', '.join(known)}); the nearest is {near!r}"
        )
    return CHIPS[name.lower()]
