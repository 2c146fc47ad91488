"""Compiling for tests: a function runs a few times on tiny arrays."""

import functools

import jax

# Without LLVM's optimizations a model compiles in half the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
