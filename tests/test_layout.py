"""The layout of the source: who imports whom, and how much lies side by side."""

import ast
import re
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "fact_jax": ROOT / "fact_jax",
    "fact_convert": ROOT / "converters" / "fact_convert",
    "fact_train": ROOT / "train" / "fact_train",
    "fact_infer": ROOT / "infer" / "fact_infer",
}
MAY_IMPORT = {
    "fact_jax": set(),
    "fact_convert": {"fact_jax"},
    "fact_train": {"fact_jax", "fact_convert"},
    "fact_infer": {"fact_jax", "fact_convert"},
}


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = _modules()


def _imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


GRAPH = {name: _imported(path) - {name} for name, path in MODULES.items()}


def _folder(module: str) -> str:
    """The folder of a module; files directly in a package stand for themselves."""
    package, *rest = module.split(".")
    return ".".join((package, *rest[:1]))


def test_no_circle_of_files():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]))


def test_no_circle_of_folders():
    folders: dict[str, set[str]] = {}
    for name, imported in GRAPH.items():
        inside = folders.setdefault(_folder(name), set())
        inside |= {_folder(other) for other in imported} - {_folder(name)}
    try:
        TopologicalSorter(folders).prepare()
    except CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]))


def test_packages_import_only_what_lies_under_them():
    for name, imported in GRAPH.items():
        package = name.split(".")[0]
        others = {other.split(".")[0] for other in imported} - {package}
        assert others <= MAY_IMPORT[package], f"{name} imports {others - MAY_IMPORT[package]}"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_has_at_most_twelve_files(package):
    for folder in [PACKAGES[package], *(p for p in PACKAGES[package].rglob("*") if p.is_dir())]:
        assert len(list(folder.glob("*.py"))) <= 12, folder


@pytest.mark.parametrize("package", PACKAGES)
def test_a_file_has_at_most_400_lines(package):
    for path in PACKAGES[package].rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_every_imported_package_is_declared():
    """By the names of pyproject.toml, which are those of the import but for these."""
    named = {
        "PIL": "pillow",
        "orbax": "orbax-checkpoint",
        "skimage": "scikit-image",
        "c2pa": "c2pa-python",
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = project["dependencies"] + [line for extra in extras for line in extra]
    declared = {re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in declared}
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names:
                if name not in PACKAGES:
                    wanted = named.get(name, name).lower().replace("_", "-")
                    assert wanted in declared, f"{path} imports {name}"
