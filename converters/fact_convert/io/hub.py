"""Folders of models by path or by the name of a repository on the Hugging Face Hub."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from fact_jax.utils.errors import UserError, first_line
from fact_jax.utils.miniature import require_miniature

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def local_folder(
    name: str | os.PathLike,
    patterns: Iterable[str],
    variant: str | None,
    *,
    weights: bool = True,
) -> Path:
    """``name`` itself if it is a folder, else the folder of the Hub repository of that name.

    ``patterns`` are the small files to fetch; of the weights only safetensors of the variant are,
    and without ``weights`` none. A safety checker, as large as a UNet's half, only by its name.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(
            f"{path}: not a folder in diffusers' layout; of a single file `fact-convert to-torch` "
            "makes one"
        )
    require_miniature({"": path})
    if not _HUB_NAME.fullmatch(str(name)) or path.parent.exists():
        raise UserError(f"{path}: no such folder")
    tensors = f"*/*.{variant}*safetensors" if variant else "*/*model*.safetensors"
    wanted = [*patterns, *([tensors] if weights else ())]
    unwanted = [] if variant else ["*.fp16.*", "*.non_ema.*"]
    if not any(pattern.startswith("safety_checker/") for pattern in wanted):
        unwanted.append("safety_checker/*")
    found = fetch_snapshot(name, "folder", str(name), wanted, unwanted)
    rest = _without_variant(found, variant) if weights and variant else []
    if rest:
        unwanted += ["*.fp16.*", "*.non_ema.*"]
        fetch_snapshot(name, "folder", str(name), rest, unwanted)
    return found


def fetch_snapshot(
    name: str | os.PathLike,
    what: str,
    repository: str,
    wanted: list[str],
    unwanted: list[str] | None = None,
) -> Path:
    """The Hub client's local copy of the files of a repository that are ``wanted`` (patterns).

    Raises UserError in one line: that ``name`` is no ``what`` here, and why the Hub gives none.
    """
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(repository, allow_patterns=wanted, ignore_patterns=unwanted)
        return Path(found)
    except Exception as err:  # the client has a dozen sorts for offline, absent and forbidden
        raise UserError(
            f"{name}: no such {what} here, and the Hub does not give it ({first_line(err)})"
        ) from err


def _without_variant(folder: Path, variant: str) -> list[str]:
    """Patterns of the ordinary weights of parts that came without any of the variant."""
    return [
        f"{config.parent.name}/*model*.safetensors"
        for config in folder.glob("*/config.json")
        if not any(config.parent.glob(f"*.{variant}*safetensors"))
    ]
