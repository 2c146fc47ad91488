"""What every test shares: JAX on the CPU, and the golden files of the released code."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests compile the same programs, some of them in processes of their own: each is compiled
# once, however small, and without LLVM's optimizations, which tiny arrays do not pay back.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
# Threads of PyTorch that wait for each other cost more than such small sums.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Child processes import the same packages, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(
    str(Path(__file__).parents[1] / part) for part in ("", "converters", "train", "infer")
)

import jax
import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_ignore_collect(collection_path, config):
    """Files that are heavy as a whole are not even imported where heavy tests are left out."""
    if "not heavy" in config.option.markexpr and collection_path.suffix == ".py":
        return True if "\npytestmark = pytest.mark.heavy" in collection_path.read_text() else None
    return None


def pytest_collection_modifyitems(items):
    """Heavy files first, those of training before all: the processes then end together."""
    heavy = {item.path for item in items if item.get_closest_marker("heavy")}
    items.sort(key=lambda item: (item.path not in heavy, "train" not in item.path.parts))


@pytest.fixture(scope="module")
def optimized():
    """Programs are compiled as users have them."""
    quick = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", quick)
    jax.clear_caches()


@pytest.fixture(scope="session")
def golden():
    """Tensors of a golden file whose keys start with a prefix, and the file's metadata."""
    from safetensors import safe_open

    def read(name: str, prefix: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        with safe_open(GOLDEN / f"{name}.safetensors", framework="numpy") as opened:
            keys = [key for key in opened.keys() if key.startswith(prefix)]  # noqa: SIM118
            return {k.removeprefix(prefix): opened.get_tensor(k) for k in keys}, opened.metadata()

    return read
