"""What a run's numbers depend on: versions of libraries, and of this program."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import jax

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and the libraries that the run's bits depend on, and the backend."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return found | {"python": platform.python_version(), "backend": jax.default_backend()}


def revision() -> str | None:
    """The git revision of this program, with "+" if files differ from it; None outside git."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    # A package that lies in someone else's repository is not of that revision.
    if commit is None or git("ls-files", "--error-unmatch", __file__) is None:
        return None
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
