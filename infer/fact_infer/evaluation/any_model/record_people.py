"""People of a folder of records (``fact-train records``), unpacked to files as photos lie in one.

Records are a tensorflow_datasets folder; it is read without TensorFlow.
"""

import json
from pathlib import Path
from typing import Any

from fact_infer.evaluation.any_model.people_folder import safe_name
from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write

_INNER = Path("face_records") / "1.0.0"


def records_in(folder: Path) -> Path | None:
    """The folder of a data set of records: ``folder`` or one in it; None if it is no such thing."""
    return next((f for f in (folder, folder / _INNER) if (f / "features.json").is_file()), None)


def unpack_people(records: Path, out: Path, photos: int, count: int | None) -> Path:
    """``out`` with PERSON/0.png and so on: the first ``photos`` of each person, and his last.

    Points and head masks lie beside them. Of the first ``count`` people (all for None) that have as
    many photos. UserError for what is no whole data set.
    """
    source = _open(records)
    try:
        whose: dict[str, list[int]] = {}
        for number in range(len(source)):
            whose.setdefault(source[number]["identity"].decode(), []).append(number)
        enough = {name: rows for name, rows in whose.items() if len(rows) >= photos}
        for name, rows in list(enough.items())[:count]:
            chosen = rows[:photos] + rows[photos:][-1:]
            for i, number in enumerate(chosen):
                _unpack(source[number], out / safe_name(name) / f"{i:03d}")
    except UserError:
        raise
    except Exception as error:  # array_record and protobuf have their own kinds
        raise UserError(f"{records} cannot be read: {one_line(error)}") from error
    return out


def _unpack(row: dict[str, Any], path: Path) -> None:
    ending = ".png" if row["photo"].startswith(b"\x89PNG") else ".jpg"
    points = json.dumps({"points": row["points"].astype(float).tolist()}).encode()
    files = {".points.json": points, ".mask.png": row["head_mask"], ending: row["photo"]}
    for suffix, content in files.items():
        with atomic_write(path.with_name(path.name + suffix)) as temporary:
            temporary.write_bytes(content)


def _open(records: Path) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"records need tensorflow-datasets ({one_line(error)}): pip install 'fact-jax[data]'"
        ) from None
    skip = dict.fromkeys(("photo", "face_mask", "head_mask", "crop"), tfds.decode.SkipDecoding())
    try:
        builder = tfds.builder_from_directory(records)
        return builder.as_data_source("train", decoders=skip)
    except Exception as error:  # whatever the first damaged file causes
        raise UserError(f"{records} cannot be opened: {one_line(error)}") from error
