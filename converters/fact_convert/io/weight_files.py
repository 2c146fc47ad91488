"""Reads weight files, single or sharded, as flat PyTorch state dicts of memory maps."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from fact_convert.io.file_types import HEAD, file_type_of
from fact_convert.io.json_io import check_file, check_names, read_json
from fact_convert.io.lazy_tensor import State, Tensor
from fact_convert.io.safetensors_io import read_safetensors
from fact_convert.io.torch_io import read_torch_file
from fact_jax.utils.errors import UserError, listed

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Endings of files that ``torch.save`` wrote."""
SAFETENSORS = (".safetensors", ".sft")
LEGACY_STEMS = {"model": "pytorch_model"}
"""What pickled weight files are called where safetensors have another name."""


def file_format(path: str | os.PathLike) -> str | None:
    """``safetensors`` or ``pickle``, by a file's ending in small or capital letters, or None."""
    suffix = Path(path).suffix.lower()
    if suffix in SAFETENSORS:
        return "safetensors"
    return "pickle" if suffix in PICKLES else None


def read_file(path: str | os.PathLike) -> tuple[State, dict[str, str]]:
    """Tensors and metadata of one weight file, by its ending.

    Raises UserError, which says what the file is, if it is something else.
    """
    path = Path(path)
    check_file(path)
    with open(path, "rb") as handle:
        found = file_type_of(handle.read(HEAD))
    stored = file_format(path)
    own = {"safetensors": ("a safetensors",), "pickle": ("a zip", "a pickle")}
    said = f"is {found}, " if found else ""
    if stored is None:
        known = ", ".join((*SAFETENSORS, *PICKLES))
        raise UserError(f"{path}: {said}not a weight file by its ending (known: {known})")
    if found and not found.startswith(own[stored]):
        raise UserError(f"{path}: {said}though its ending says {stored}")
    return read_safetensors(path) if stored == "safetensors" else read_torch_file(path)


def read_weights(folder: str | os.PathLike, stem: str, variant: str | None = None) -> State:
    """The weights of a diffusers or transformers model folder: safetensors, else legacy ``.bin``.

    ``stem`` is ``diffusion_pytorch_model`` or ``model``. One file or shards with their index;
    ``variant`` (as fp16) picks the files of that name.
    """
    folder = Path(folder)
    names = _weight_files(stem, variant)
    if found := next((folder / name for name in names if (folder / name).exists()), None):
        return _read_shards(found) if found.suffix == ".json" else read_file(found)[0]
    kind = re.compile(
        rf"(?:{stem}|{LEGACY_STEMS.get(stem, stem)})"
        r"(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    )
    files = folder.iterdir() if folder.is_dir() else ()
    there = {match[1] or "none" for file in files if (match := kind.fullmatch(file.name))}
    hint = f"; there are weights of variant {', '.join(sorted(there))}" if there else ""
    raise UserError(f"{folder}: no {', no '.join(names)}{hint}")


def _weight_files(stem: str, variant: str | None) -> list[str]:
    """Possible names of a folder's weight file or shard index; the first that exists counts."""
    dotted = f".{variant}" if variant else ""
    return [
        name
        for base, suffix in ((stem, "safetensors"), (LEGACY_STEMS.get(stem, stem), "bin"))
        for name in (f"{base}{dotted}.{suffix}", f"{base}.{suffix}.index{dotted}.json")
    ]


def part_variants(
    folder: Path, stems: Mapping[str, str], variant: str | None
) -> tuple[dict[str, str | None], list[str]]:
    """The variant to read of every part of a pipeline, and notes on parts without it.

    ``stems`` are what the weights are called, by part. As in diffusers the ordinary weights are
    read of a part that has none of the variant, unless no part has any.
    """
    names = {part: _weight_files(stem, variant) for part, stem in stems.items()}
    have = {p for p, files in names.items() if any((folder / p / file).exists() for file in files)}
    chosen = {part: variant if part in have or not have else None for part in stems}
    lines = [
        f"{folder / part}: no weights of variant {variant}: its ordinary ones are read"
        for part in stems
        if chosen[part] != variant
    ]
    return chosen, lines


def _read_shards(index: Path) -> State:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{index}: has no weight_map from keys to files")
    if not where:
        raise UserError(f"{index}: its weight_map names no file")
    state: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        if (
            Path(name).name != name
            or not name.isprintable()
            or not stays_inside(index.parent, name)
        ):
            raise UserError(f"{index}: names {name!a}, which is not a file of this folder")
        shard, _ = read_file(index.parent / name)
        if both := shard.keys() & state.keys():
            raise UserError(f"{index}: tensors stand in two shards: {listed(sorted(both))}")
        state |= shard
    missing, unexpected = sorted(set(where) - set(state)), sorted(set(state) - set(where))
    if missing or unexpected:
        check_names(index, missing)
        raise UserError(
            f"{index}: does not fit its shards: {len(missing)} missing ({listed(missing)}); "
            f"{len(unexpected)} unexpected ({listed(unexpected)})"
        )
    return state


def stays_inside(folder: Path, name: str) -> bool:
    """Whether a file is in the folder, or a link to where the Hub's cache keeps its files."""
    home = folder.resolve()
    found = (home / name).resolve()
    blobs = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    return found.parent in (home, *blobs)
