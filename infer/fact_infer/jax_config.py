"""JAX's settings for a process that generates pictures."""

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> Path:
    """Keep compiled programs on disk for later runs; gives the folder.

    It is JAX's own setting (JAX_COMPILATION_CACHE_DIR) if there is one, else in the user's caches.
    """
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "fact-jax" / "programs"))
    return Path(jax.config.jax_compilation_cache_dir)


def pin_jax_to_cpu() -> None:
    """Confine JAX to the CPU in a process where PyTorch generates; it makes noise and schedules.

    Otherwise JAX would take three quarters of a GPU's memory with its first operation. A process
    that has used JAX before keeps the devices that it has.
    """
    jax.config.update("jax_platforms", "cpu")
