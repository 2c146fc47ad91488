"""The folder of nodes, loaded as ComfyUI loads it."""

import sys
import types

import pytest

from tests.infer.comfyui import stub

NAME = "custom_nodes_x_fact"


@pytest.fixture(scope="module")
def comfy(files, tmp_path_factory):
    """Its modules ``nodes``, ``faces`` and so on, with the stub's models beside it."""
    models = tmp_path_factory.mktemp("models")
    (models / "fact").symlink_to(files.adapter.parent)
    found = stub.modules(models)
    before = {name: sys.modules.get(name) for name in found}
    sys.modules.update(found)
    package = stub.load_nodes(NAME)
    parts = {p: sys.modules[f"{NAME}.{p}"] for p in ("nodes", "models", "faces", "patches")}
    management = found["comfy.model_management"]
    yield types.SimpleNamespace(package=package, management=management, **parts)
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]
    for name, module in before.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module
