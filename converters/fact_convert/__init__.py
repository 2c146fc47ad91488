"""Weights between PyTorch and JAX: load, dump, read and write every format.

Names are imported on first use, so that programs start quickly.
"""

import importlib

_HOMES = {
    "weights": ("load_state", "dump_state"),
    "models.pipeline": ("Pipeline", "load_pipeline", "save_pipeline"),
    "models.adapter": ("Adapter", "load_adapter", "attach_adapter", "save_adapter"),
    "models.face_encoder": ("load_encoder", "save_encoder"),
    "models.controlnet": ("load_controlnet", "save_controlnet"),
    "models.tokenizer": ("Tokenizer", "tokenize"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
