"""The files of a tensorflow_datasets folder: its shards, and what tells of them."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from fact_train.data.records import IDENTITIES, NAME, SHAPES, SIZES, VERSION, data_libraries

DESCRIPTION = """\
Photos of people for training FACT (Face Adapter with deCoupled Training, arXiv 2410.12312).

One record is one photo: `photo` (RGB, PNG or JPEG, square unless built with --buckets), `caption`
(it names the scene, not the person), `face_mask` and `head_mask` (grey, of the photo's size, 255 on
the face or on the head with its hair), `crop` (the face aligned to the ArcFace template by its five
points, everything but the head black, as the face encoder takes it), `points` (left eye, right eye,
nose tip, left and right mouth corner as the viewer sees them; x and y in pixels of the photo),
`identity` (the same text for all photos of a person) and `name` (where the photo came from).

Records stand in the order in which they were written; `identities.npy` beside them holds the number
of the person in each, int32, `shapes.npy`, if photos are not square, the height and width of each,
`sizes.json` the bytes of every shard. Reading needs no TensorFlow:

    tfds.data_source("face_records", split="train", data_dir=...)
"""
CITATION = "Yu et al., FaceChain-FACT, arXiv 2410.12312, 2024"


def face_features(size: int | None, crop_size: int) -> Any:
    """The tfds features of a record; photos and masks of ``size``, crops of ``crop_size``.

    Without a ``size`` photos may have any shape.
    """
    kinds = data_libraries().tfds.features
    mask = kinds.Image(shape=(size, size, 1), encoding_format="png")
    return kinds.FeaturesDict(
        {
            "photo": kinds.Image(shape=(size, size, 3)),
            "caption": kinds.Text(),
            "face_mask": mask,
            "head_mask": mask,
            "crop": kinds.Image(shape=(crop_size, crop_size, 3), encoding_format="png"),
            "points": kinds.Tensor(shape=(5, 2), dtype=np.float32),
            "identity": kinds.Text(),
            "name": kinds.Text(),
        }
    )


class Coder:
    """Rows to the bytes of a record; equal rows give equal bytes."""

    def __init__(self, features: Any):
        core = data_libraries().tfds.core
        self._features = features
        self._serializer = core.example_serializer.ExampleSerializer(features.get_serialized_info())

    def encode(self, row: Mapping[str, Any]) -> bytes:
        example = self._serializer.get_tf_example(self._features.encode_example(dict(row)))
        return example.SerializeToString(deterministic=True)


def with_identity(record: bytes, identity: str) -> bytes:
    """A record of faces under another name of its person."""
    data_libraries()
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example.FromString(record)
    example.features.feature["identity"].bytes_list.value[:] = [identity.encode()]
    return example.SerializeToString(deterministic=True)


def shard_writer(path: Path) -> Any:
    """A writer of array_record, one record a group: any can be read alone."""
    from array_record.python.array_record_module import ArrayRecordWriter

    return ArrayRecordWriter(str(path), "group_size:1")


def shard_reader(path: Path) -> Any:
    """A reader of array_record."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path))


def shard_name(shard: int, shards: int, split: str = "train", name: str = NAME) -> str:
    return f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def write_info(
    folder: Path,
    features: Any,
    splits: Mapping[str, tuple[list[int], int]],
    identities: Mapping[str, Int[np.ndarray, " n"]],
    sizes: Mapping[str, int],
    *,
    shapes: Mapping[str, Int[np.ndarray, "n 2"]] | None = None,
    name: str = NAME,
    version: str = VERSION,
    description: str = DESCRIPTION,
    module: str = __name__,
) -> None:
    """Write what tells of the shards, at last ``features.json``: a folder with it is whole.

    ``splits`` gives the records in each shard and the bytes of all, ``sizes`` the bytes of a file,
    ``shapes`` height and width of each photo where they differ.
    """
    core = data_libraries().tfds.core
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder) as temporary:
        whole = Path(temporary)
        info = core.DatasetInfo(
            builder=core.dataset_info.DatasetIdentity(
                name=name, version=core.Version(version), data_dir=temporary, module_name=module
            ),
            features=features,
            description=description,
            citation=CITATION,
            disable_shuffling=True,
        )
        info.set_file_format("array_record")
        split_infos = [
            core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=count)
            for split, (lengths, count) in splits.items()
        ]
        info.set_splits(core.splits.SplitDict(split_infos))
        info.write_to_directory(whole)
        for split, who in identities.items():
            np.save(whole / split_name(IDENTITIES, split), np.asarray(who, np.int32))
        for split, sides in (shapes or {}).items():
            np.save(whole / split_name(SHAPES, split), np.asarray(sides, np.int32))
        (whole / SIZES).write_text(json.dumps(dict(sizes), indent=1) + "\n")
        for path in sorted(whole.iterdir(), key=lambda path: path.name == "features.json"):
            os.replace(path, folder / path.name)


def split_name(name: str, split: str) -> str:
    """The file ``name`` of a split: identities.npy of train, identities-validation.npy."""
    return name if split == "train" else name.replace(".", f"-{split}.")
