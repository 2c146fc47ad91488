"""The miniature: small models that come with the repository, not with the installed package."""

import os
from collections.abc import Mapping
from pathlib import Path

from fact_jax.utils.errors import UserError


def require_miniature(paths: Mapping[str, str | os.PathLike]) -> None:
    """UserError, with their options, for paths in ``miniature/`` that are not there.

    ``paths`` are given by the options that name them; other paths pass. The miniature is looked
    for below the working directory alone, and never on the Hub.
    """
    absent = [
        f"{option}={path}" if option else str(path)
        for option, path in paths.items()
        if Path(path).parts[:1] == ("miniature",) and not Path(path).exists()
    ]
    if absent:
        raise UserError(
            f"{', '.join(absent)}: not there; the miniature comes with the project's repository, "
            "not with the installed package: run this in a clone of it, or name your own files"
        )
