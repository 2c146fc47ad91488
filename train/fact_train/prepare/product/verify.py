"""Is a built set whole? Every record read, against the lines about it and the index."""

import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError, error_context, listed
from fact_train.data.dataset_files import split_name
from fact_train.data.records import (
    IDENTITIES,
    NAME,
    PICTURES,
    SHAPES,
    SIZES,
    VERSION,
    open_folder,
    read_row,
)
from fact_train.prepare.product.curate import open_product, read_lines
from fact_train.prepare.product.dataset import (
    FOLDER,
    REJECTED,
    SUMMARY,
    SUSPECTS,
    count_lines,
    removed_digests,
)
from fact_train.prepare.store import Store


def verify(folder: Path) -> dict[str, int]:
    """Read every record of a set; counts. Raises UserError for the first that is damaged."""
    try:
        return _verify(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        raise UserError(f"{folder} is damaged: {one_line(error)}") from error


def _verify(folder: Path) -> dict[str, int]:
    summary = open_product(folder)
    inner = folder / FOLDER
    sources = {
        split: open_folder(folder, NAME, VERSION, PICTURES, split)[2] for split in summary["splits"]
    }
    _check_features(folder, summary, sources)
    arrays = {
        name: np.load(inner / name, allow_pickle=False)
        for name in os.listdir(inner)
        if name.endswith(".npy")
    }
    counts: Counter[str] = Counter()
    seen: dict[str, dict[str, int]] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for split, source in sources.items():
        numbers = seen.setdefault(split, {})
        files = split_name(IDENTITIES, split), split_name(SHAPES, split)
        wanted |= {files[0]: (len(source),), files[1]: (len(source), 2)}
        identities, shapes = arrays[files[0]], arrays.get(files[1])
        for number, line in enumerate(
            read_lines(folder, {"splits": {split: summary["splits"][split]}})
        ):
            where = f"{folder}: record {number} of {split}"
            row = read_row(source, number, folder)
            said = {key: row[key].decode() for key in ("identity", "name")}
            if identities[number] != numbers.setdefault(said["identity"], len(numbers)):
                raise UserError(f"{where}: {files[0]} does not name {said['identity']}")
            for key, value in said.items():
                if value != line[key]:
                    raise UserError(f"{where}: it is {value}, the line about it says {line[key]}")
            shape = line.get("shape", [summary["size"]] * 2)
            held = [summary["size"]] * 2 if shapes is None else shapes[number].tolist()
            if held != shape:
                raise UserError(f"{where}: it is {held} px, the line about it says {shape}")
            with error_context(where):
                row["caption"].decode()
                _check_pictures(row, shape, summary["crop"])
            counts[split] += 1
        if counts[split] != len(source):
            raise UserError(
                f"{folder}: {counts[split]} lines about {len(source)} records of {split}"
            )
    for name, array in arrays.items():
        if array.shape != wanted.get(name):
            raise UserError(f"{inner / name} is of shape {array.shape}: it is not of these records")
    people = Counter(name for names in seen.values() for name in names)
    if twice := [name for name, splits in people.items() if splits > 1]:
        raise UserError(f"{folder}: {twice[0]} is in several splits")
    for split, about in summary["splits"].items():
        found = counts[split], len(seen.get(split, {}))
        if found != (about["records"], about["people"]):
            raise UserError(
                f"{folder}: {found[0]} records of {found[1]} people in {split}, not "
                f"{about['records']} of {about['people']}"
            )
    store = Store(str(folder))
    reasons = Counter(line["reason"] for line in store.lines(REJECTED))
    about_suspects = list(store.lines(SUSPECTS))
    if lacking := [line for line in about_suspects if not {"photos", "people", "alarm"} <= {*line}]:
        raise UserError(
            f"{folder / SUSPECTS}: a line says no photos, people or alarm: {lacking[0]}"
        )
    suspects = Counter(line["kind"] for line in about_suspects)
    alarms = sum(line["alarm"] for line in about_suspects)
    removed_digests(store)  # each line of the log can be read
    shards = {split: range(about["shards"]) for split, about in summary["splits"].items()}
    told, _ = count_lines(store, shards, summary["size"])
    people = sum(about["people"] for about in summary["splits"].values())
    told |= {"reasons": reasons, "suspects": suspects, "alarms": alarms, "people": people}
    rejected = reasons.total()
    if (rejected, counts.total()) != (summary["rejected"], summary["records"]) or summary[
        "in"
    ] != rejected + counts.total():
        raise UserError(
            f"{folder}: {summary['in']} photos in, but {counts.total()} records and {rejected} "
            "rejected"
        )
    if wrong := [key for key, value in told.items() if summary.get(key) != value]:
        raise UserError(f"{folder}: summary.json counts other {listed(wrong)} than there are")
    return dict(counts) | {"rejected": rejected}


def _check_features(folder: Path, summary: dict, sources: Mapping[str, Any]) -> None:
    """UserError where the set's features or sizes are other than its summary's."""
    sizes = json.loads((folder / FOLDER / SIZES).read_text())
    shards = {path.name for path in (folder / FOLDER).glob("*.array_record*")}
    if shards != sizes.keys():
        raise UserError(f"{folder / FOLDER / SIZES} tells of other shards than are there")
    for source in sources.values():
        features = source.dataset_info.features
        found = features["crop"].shape[0], features["photo"].shape[0] or summary["size"]
        if found != (summary["crop"], summary["size"]):
            raise UserError(f"{folder}: features.json tells of other sizes than {SUMMARY}")


def _check_pictures(row: dict, shape: Sequence[int], crop: int) -> None:
    """``shape`` is height and width of photo and masks."""
    for part in PICTURES:
        size = (crop, crop) if part == "crop" else (shape[1], shape[0])
        wanted = ("L" if part.endswith("mask") else "RGB", size)
        try:
            with Image.open(io.BytesIO(row[part])) as opened:
                opened.load()
                if (found := (opened.mode, opened.size)) != wanted:
                    raise UserError(f"its {part} is {found}, not {wanted}")
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"its {part} is damaged: {one_line(error)}") from None
    if row["points"].shape != (5, 2) or not np.isfinite(row["points"]).all():
        raise UserError("its points are no five finite points")
