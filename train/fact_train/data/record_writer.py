"""Writing records: ``Example``s into a tensorflow_datasets folder of array_record shards."""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fact_convert.io.output_paths import output_folder
from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError
from fact_train.data.dataset_files import (
    Coder,
    face_features,
    shard_name,
    shard_writer,
    write_info,
)
from fact_train.data.records import NAME, PICTURES, VERSION, Example

_SHARD_BYTES = 256 << 20


def as_row(example: Example) -> dict[str, Any]:
    """An example as tfds takes it: an open file is stored as it is."""
    pictures = {name: io.BytesIO(getattr(example, name)) for name in PICTURES}
    texts = {name: getattr(example, name) for name in ("caption", "identity", "name")}
    return {**pictures, **texts, "points": example.points}


def write_records(
    examples: Iterable[Example], out: Path, *, size: int, crop_size: int, force: bool = False
) -> tuple[int, int]:
    """Write ``out`` whole or not at all; gives the number of photos and of people.

    Photos and masks are ``size`` x ``size``, crops ``crop_size`` x ``crop_size``. Examples may come
    in any order, which is kept. Raises UserError for an example of another size, for none at all,
    and if ``out`` exists and ``force`` is not given.
    """
    with output_folder(out, force=force) as temporary:
        folder = temporary / NAME / VERSION
        folder.mkdir(parents=True)
        try:
            return _write(examples, folder, out, size, crop_size)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {one_line(error)}") from error


def _write(
    examples: Iterable[Example], folder: Path, out: Path, size: int, crop_size: int
) -> tuple[int, int]:
    people: dict[str, int] = {}
    identities: list[int] = []
    features = face_features(size, crop_size)
    coder, writer = Coder(features), None
    lengths: list[int] = []
    filled = 0
    for example in examples:
        _check_sizes(example, size, crop_size)
        record = coder.encode(as_row(example))
        if writer is None or filled > _SHARD_BYTES:
            if writer is not None:
                writer.close()
            writer, filled = shard_writer(folder / f"{len(lengths)}"), 0
            lengths.append(0)
        writer.write(record)
        lengths[-1] += 1
        filled += len(record)
        identities.append(people.setdefault(example.identity, len(people)))
    if writer is None:
        raise UserError(f"{out}: there is no usable photo, so nothing was written")
    writer.close()
    sizes = {}
    for shard in range(len(lengths)):
        name = shard_name(shard, len(lengths))
        os.rename(folder / f"{shard}", folder / name)
        sizes[name] = (folder / name).stat().st_size
    splits = {"train": (lengths, sum(sizes.values()))}
    write_info(folder, features, splits, {"train": np.asarray(identities)}, sizes)
    return len(identities), len(people)


def _check_sizes(example: Example, size: int, crop_size: int) -> None:
    for name in PICTURES:
        with Image.open(io.BytesIO(getattr(example, name))) as image:
            wanted = crop_size if name == "crop" else size
            if image.size != (wanted, wanted):
                raise UserError(
                    f"{example.name}: its {name} is {image.size[0]} x {image.size[1]}, these "
                    f"records hold {wanted} x {wanted}"
                )
