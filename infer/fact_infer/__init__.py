"""Portrait generation with a FACT adapter, in PyTorch (diffusers) or in JAX.

Names are imported on first use, so that JAX alone is enough for its side.
"""

__all__ = ["FactAdapterMixin", "load_fact", "unload_fact", "with_fact"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fact_infer.torch import adapter, loading

    return getattr(loading if hasattr(loading, name) else adapter, name)
