"""What every test shares: JAX on the CPU, and the golden files of the released code."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests train the same step, some of them in processes of their own: it is compiled once.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)

# Child processes import the same packages, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(
    str(Path(__file__).parents[1] / part) for part in ("", "converters", "train", "infer")
)

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Tensors of a golden file whose keys start with a prefix, and the file's metadata."""
    from safetensors import safe_open

    def read(name: str, prefix: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        with safe_open(GOLDEN / f"{name}.safetensors", framework="numpy") as opened:
            keys = [key for key in opened.keys() if key.startswith(prefix)]  # noqa: SIM118
            return {k.removeprefix(prefix): opened.get_tensor(k) for k in keys}, opened.metadata()

    return read
