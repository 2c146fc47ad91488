"""Is a built set whole? Every record read, against the lines about it and the index."""

import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError, error_context, listed
from fact_train.data.dataset_files import split_name
from fact_train.data.records import IDENTITIES, NAME, PICTURES, SHAPES, VERSION, open_folder
from fact_train.prepare.product.curate import open_product, read_records
from fact_train.prepare.product.dataset import FOLDER, REJECTED, SUSPECTS, count_lines
from fact_train.prepare.store import Store


def verify(folder: Path) -> dict[str, int]:
    """Read every record of a set; counts. Raises UserError for the first that is damaged."""
    try:
        return _verify(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        raise UserError(f"{folder} is damaged: {one_line(error)}") from error


def _verify(folder: Path) -> dict[str, int]:
    from tensorflow_datasets.proto import tf_example_pb2

    summary = open_product(folder)
    for split in summary["splits"]:
        open_folder(folder, NAME, VERSION, split=split)
    arrays = {
        name: np.load(folder / FOLDER / name, allow_pickle=False)
        for name in os.listdir(folder / FOLDER)
        if name.endswith(".npy")
    }
    counts: Counter[str] = Counter()
    seen: dict[str, dict[str, int]] = {}
    for split, shard, record, line in read_records(folder, summary):
        where = f"{folder}: record {counts[split]} of {split} (shard {shard})"
        example = tf_example_pb2.Example.FromString(record).features.feature
        name = example["identity"].bytes_list.value[0].decode()
        numbers = seen.setdefault(split, {})
        file = split_name(IDENTITIES, split)
        if arrays[file][counts[split]] != numbers.setdefault(name, len(numbers)):
            raise UserError(f"{where}: {file} does not name {name}")
        said = {"identity": name, "name": example["name"].bytes_list.value[0].decode()}
        for key, value in said.items():
            if value != line[key]:
                raise UserError(f"{where}: it is {value}, the line about it says {line[key]}")
        shape = line.get("shape", [summary["size"]] * 2)
        shapes = arrays.get(split_name(SHAPES, split))
        held = [summary["size"]] * 2 if shapes is None else shapes[counts[split]].tolist()
        if held != shape:
            raise UserError(f"{where}: it is {held} px, the line about it says {shape}")
        with error_context(where):
            _check_pictures(example, shape, summary["crop"])
        counts[split] += 1
    for split, about in summary["splits"].items():
        found = counts[split], len(seen.get(split, {}))
        if found != (about["records"], about["people"]):
            raise UserError(
                f"{folder}: {found[0]} records of {found[1]} people in {split}, not "
                f"{about['records']} of {about['people']}"
            )
    store = Store(str(folder))
    reasons = Counter(line["reason"] for line in store.lines(REJECTED))
    suspects = Counter(line["kind"] for line in store.lines(SUSPECTS))
    alarms = sum(line["alarm"] for line in store.lines(SUSPECTS))
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


def _check_pictures(example: Any, shape: Sequence[int], crop: int) -> None:
    """``shape`` is height and width of photo and masks."""
    for part in PICTURES:
        wanted = (crop, crop) if part == "crop" else (shape[1], shape[0])
        try:
            with Image.open(io.BytesIO(example[part].bytes_list.value[0])) as opened:
                opened.load()
                if opened.size != wanted:
                    raise UserError(f"its {part} is {opened.size[0]} x {opened.size[1]}")
        except (OSError, ValueError, SyntaxError, IndexError) as error:
            raise UserError(f"its {part} is damaged: {one_line(error)}") from None
    points = np.array(example["points"].float_list.value)
    if points.shape != (10,) or not np.isfinite(points).all():
        raise UserError("its points are no five finite points")
