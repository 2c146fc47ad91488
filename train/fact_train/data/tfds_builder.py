"""The tensorflow_datasets builder of records. Imported only where they are written."""

import contextlib
import io
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from fact_train.data.records import NAME, PICTURES, VERSION, Example

_DESCRIPTION = """\
Photos of people for training FACT (Face Adapter with deCoupled Training, arXiv 2410.12312).

One record is one photo: `photo` (square RGB, PNG or JPEG), `caption` (it names the scene, not the
person), `face_mask` and `head_mask` (grey, of the photo's size, 255 on the face or on the head
with its hair), `crop` (the face aligned to the ArcFace template by its five points, everything but
the head black, as the face encoder takes it), `points` (left eye, right eye, nose tip, left and
right mouth corner as the viewer sees them; x and y in pixels of the photo), `identity` (the same
text for all photos of a person) and `name` (where the photo came from).

Records stand in the order in which they were written; `identities.npy` beside them holds the number
of the person in each, int32, `sizes.json` the bytes of every shard. Reading needs no TensorFlow:

    tfds.data_source("face_records", split="train", data_dir=...)
"""


# Left out of the registry: tfds then opens a folder by the features written in it, whose sizes
# are not the same in all of them.
with tfds.core.registered.skip_registration():

    class FaceRecords(tfds.core.GeneratorBasedBuilder):
        """``Example``s -> ``FOLDER/face_records/1.0.0``, array_record shards."""

        name = NAME
        VERSION = tfds.core.Version(VERSION)
        RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012 (as the base class has it)
        # Nothing is downloaded, so nobody need look for checksums (that takes a package which
        # tfds does not install).
        url_infos = None

        def __init__(self, folder: Path, examples: Iterable[Example], *, size: int, crop_size: int):
            self._examples, self._sizes = examples, (size, crop_size)
            super().__init__(data_dir=folder, file_format="array_record")

        def write(self) -> None:
            """Write all examples."""
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):  # it tells of a download
                self.download_and_prepare()
            shutil.rmtree(self.data_path.parents[1] / "downloads", ignore_errors=True)

        def _info(self) -> tfds.core.DatasetInfo:
            size, crop_size = self._sizes
            kinds = tfds.features
            mask = kinds.Image(shape=(size, size, 1), encoding_format="png")
            features = {
                "photo": kinds.Image(shape=(size, size, 3)),
                "caption": kinds.Text(),
                "face_mask": mask,
                "head_mask": mask,
                "crop": kinds.Image(shape=(crop_size, crop_size, 3), encoding_format="png"),
                "points": kinds.Tensor(shape=(5, 2), dtype=np.float32),
                "identity": kinds.Text(),
                "name": kinds.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=_DESCRIPTION,
                features=kinds.FeaturesDict(features),
                citation="Yu et al., FaceChain-FACT, arXiv 2410.12312, 2024",
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager) -> dict:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict]]:
            for number, example in enumerate(self._examples):
                # An open file is stored as it is; an array would need TensorFlow.
                pictures = {name: io.BytesIO(getattr(example, name)) for name in PICTURES}
                texts = {name: getattr(example, name) for name in ("caption", "identity", "name")}
                yield number, {**pictures, **texts, "points": example.points}
