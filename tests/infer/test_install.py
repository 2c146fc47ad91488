"""What has to be installed: the extras that messages name, and what pictures are made without."""

import ast
import re
import tomllib

import pytest

from tests.test_layout import GRAPH, MODULES, ROOT

TRAINING = {"orbax", "tensorboardX", "grain", "array_record", "tensorflow_datasets", "apache_beam"}


def test_every_extra_that_a_message_names_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    named = set()
    for path in [*MODULES.values(), *ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        found = re.findall(r"fact-jax\[([\w,-]+)\]", path.read_text())
        named |= {extra for text in found for extra in text.split(",")}
    assert {"torch", "faces", "data", "serve", "provenance", "watermark", "infer"} <= named
    assert named <= extras


@pytest.mark.parametrize(
    "start", ["fact_infer.torch.pipeline", "fact_infer.torch.loading", "fact_infer.jax.pipeline"]
)
def test_pictures_need_nothing_of_training(start):
    """Neither our package nor the libraries that only it uses, at import."""
    seen, left = set(), [start]
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += GRAPH[name]
    assert not [name for name in seen if name.startswith("fact_train")]
    for name in seen:
        tree = ast.parse(MODULES[name].read_text())
        for node in tree.body:
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            assert not TRAINING & {module.split(".")[0] for module in modules}, name
