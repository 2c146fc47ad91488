"""Compiling for tests: a function runs a few times on tiny arrays."""

import functools

import jax
import pytest

# Without LLVM's optimizations a model compiles in half the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """For a whole module (import it there): compiling well would cost more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
