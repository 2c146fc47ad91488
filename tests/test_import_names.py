"""A user's own infer.py, train.py and converters.py do not hide ours: checkout and wheel."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[1]
SHORT = "import fact_convert.mapping, fact_infer.request, fact_train.config, fact_jax.losses"


@pytest.fixture
def folder(tmp_path):
    """A user's folder with files of these names, each of which fails when it is imported."""
    for name in ("infer", "train", "converters"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('the own {name}.py')\n")
    (tmp_path / "miniature").symlink_to(ROOT / "miniature")
    return tmp_path


def run(folder, code, **environment):
    (folder / "script.py").write_text(code)
    command = [sys.executable, "script.py"]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_from_a_checkout(folder):
    run(folder, SHORT)


@pytest.mark.slow
def test_the_readmes_example_from_a_wheel(folder, tmp_path_factory):
    """The wheel alone, unpacked: nothing of the checkout is on the path."""
    built = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", built, ROOT]
    subprocess.run(command, check=True)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(built / "site")
    environment = {"PYTHONPATH": str(built / "site")}
    portraits = "import sys; from fact_infer.cli.main import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run(
        [sys.executable, "-c", portraits, "portraits", "--people", "1", "--out", "photos"],
        cwd=folder,
        env=os.environ | environment,
        check=True,
    )
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"In your own diffusers code:\n\n```python\n(.*?)```", text, re.DOTALL)
    run(folder, code.replace("steps=25", "steps=2"), **environment)
    assert (folder / "portrait.png").is_file()
