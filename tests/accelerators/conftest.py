"""These tests take the compilers for TPUs and GPUs (`make test-accelerators`), not the devices."""

import importlib.util

if not all(importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda13_plugin")):
    collect_ignore_glob = ["test_*.py"]
