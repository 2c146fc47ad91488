"""Argument parser, ``--version``, and package versions."""

import argparse
import importlib.metadata
import logging
import platform
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """argparse's own, but a wrong command line is one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add ``--version``: the program's, Python's and JAX's, on one line."""
    parser.add_argument("--version", action=_Version, nargs=0, help="say the version and exit")


def version_of(package: str = "fact-jax") -> str:
    """The version of an installed package, without importing it; ``unknown`` if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return "unknown"


def silence_loggers(*names: str) -> None:
    """Nothing below critical is heard of these libraries."""
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        with_python = f"Python {platform.python_version()}, jax {version_of('jax')}"
        print(f"{parser.prog} {version_of()} ({with_python})")
        parser.exit()
