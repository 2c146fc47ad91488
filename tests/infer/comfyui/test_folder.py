"""The folder of nodes as a person drops it into ``custom_nodes``: schemas, imports, examples."""

import ast
import asyncio
import importlib.util
import json
import sys

import pytest
from PIL import Image

from tests.infer.comfyui import stub

pytestmark = pytest.mark.heavy
OWN = ["FactLoad", "FactPrepareFace", "FactCombineFaces", "FactApply"]


def test_the_extension_lists_its_nodes(comfy):
    extension = asyncio.run(comfy.package.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    schemas = {node.define_schema().node_id: node.define_schema() for node in nodes}
    assert list(schemas) == [*OWN, "FactGenerate"]
    (adapter, _) = schemas["FactLoad"].inputs
    assert "adapter.safetensors" in adapter.said["options"]
    assert len(nodes) == len(schemas)
    for node, schema in zip(nodes, schemas.values(), strict=True):
        names = node.execute.__code__.co_varnames[1 : node.execute.__code__.co_argcount]
        assert set(names) == {port.id for port in schema.inputs}


def test_without_fact_infer_there_are_four(comfy, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "fact_infer" else find(name)
    )
    extension = asyncio.run(comfy.package.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    assert [node.define_schema().node_id for node in nodes] == OWN


def test_the_folder_needs_what_every_comfyui_has():
    allowed = {"torch", "numpy", "PIL", "safetensors", "insightface", *stub.modules(stub.NODES)}
    for path in stub.NODES.glob("*.py"):
        own = {"fact_infer", "fact_jax"} if path.name == "generate.py" else set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", ())]
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module]
            elif not isinstance(node, ast.Import):
                continue
            for name in names:
                assert name.split(".")[0] in allowed | own | sys.stdlib_module_names, (path, name)


@pytest.mark.parametrize("name", ["portrait", "people", "generate"])
def test_examples_fit_the_nodes(comfy, name):
    """Every input of ours is in the workflow; the PNG carries the same, and the server's form."""
    path = stub.NODES / "example_workflows" / f"{name}.json"
    workflow = json.loads(path.read_text())
    with Image.open(path.with_suffix(".png")) as png:
        assert json.loads(png.text["workflow"]) == workflow
        prompt = json.loads(png.text["prompt"])
    extension = asyncio.run(comfy.package.comfy_entrypoint())
    schemas = [node.define_schema() for node in asyncio.run(extension.get_node_list())]
    schemas = {schema.node_id: schema for schema in schemas}
    ours = [node for node in workflow["nodes"] if node["type"] in schemas]
    used = {node["type"] for node in ours}
    combined = {"FactCombineFaces"} if name == "portrait" else set()
    assert used == ({"FactGenerate"} if name == "generate" else set(OWN) - combined)
    for node in ours:
        schema = schemas[node["type"]]
        assert {port["name"] for port in node["inputs"]} == {port.id for port in schema.inputs}
        needed = {port.id for port in schema.inputs if not port.said.get("optional")}
        sent = prompt[str(node["id"])]
        assert sent["class_type"] == node["type"]
        assert needed <= set(sent["inputs"])
