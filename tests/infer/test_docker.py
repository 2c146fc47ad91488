"""The Docker files, as far as they can be checked without Docker; ``hadolint`` finds nothing."""

import fnmatch
import json
import re
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fact_infer.cli.main import _parser
from fact_infer.parts import load_parts
from fact_infer.service.http.api import build_app
from tests.infer.service.conftest import OPERATOR, service_of

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "infer" / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def parts():
    return load_parts(*(OPERATOR[name] for name in ("base", "adapter", "encoder")))


def instructions(path):
    """Of a Docker file: the arguments of each instruction, by its name."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    found: dict[str, list[str]] = {}
    for line in filter(None, text.splitlines()):
        name, _, rest = line.partition(" ")
        found.setdefault(name, []).append(rest.strip())
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_docker_file_fits_the_project(path, parts):
    found = instructions(path)
    (base,), (user,), (port,) = found["FROM"], found["USER"], found["EXPOSE"]
    name, _, tag = base.partition(":")
    assert (name, tag.partition("-")[0]) == ("python", "3.11")
    assert int(user) > 0
    assert f"--uid {user} " in found["RUN"][-1]
    # What is installed: extras that there are, versions of a file that is there.
    extras = re.search(r'"\.\[([\w,]+)\]"', found["RUN"][-1]).group(1).split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    constraints = re.findall(r"-c (\S+)", found["RUN"][-1])
    assert constraints
    # What is copied is not ignored.
    assert found["COPY"] == [". ."]
    ignored = path.with_suffix(".Dockerfile.dockerignore").read_text().split()
    needed = (*constraints, "pyproject.toml", "README.md", "LICENSE", "miniature", "fact_jax")
    for name in (*needed, "converters", "train", "infer"):
        assert (ROOT / name).exists()
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in ignored), name
    # What it starts, and where it is asked whether it lives.
    (entry,), command = json.loads(found["ENTRYPOINT"][0]), json.loads(found["CMD"][0])
    assert entry in PROJECT["scripts"]
    arguments = _parser().parse_args(command)
    assert (arguments.command, arguments.host, arguments.port) == ("serve", "0.0.0.0", int(port))
    url = urlsplit(re.search(r"http://[^'\"]+", found["HEALTHCHECK"][0]).group())
    assert url.port == int(port)
    paths = build_app(service_of(parts)).openapi()["paths"]
    assert "get" in paths[url.path]
    assert found["STOPSIGNAL"] == ["SIGTERM"]


def test_the_commands_in_them_are_those_of_the_program():
    """Of each line of the comments that runs the image: the options that follow its name."""
    for path in FILES:
        comments = re.sub(r"\\\n#", " ", path.read_text())
        words = [line.split() for line in re.findall(r"docker run (.*)", comments)]
        assert words
        for line in words:
            image = next(i for i, word in enumerate(line) if word.startswith("fact-jax:"))
            if line[image + 1 :]:
                _parser().parse_args(line[image + 1 :])
            assert f":{instructions(path)['EXPOSE'][0]}" in " ".join(line[:image])
        for built in re.findall(r"docker build -f (\S+)", comments):
            assert ROOT / built == path
