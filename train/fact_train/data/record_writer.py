"""Writing records: ``Example``s into a tensorflow_datasets folder of array_record shards."""

import contextlib
import io
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fact_convert.io.output_paths import output_folder
from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError
from fact_train.data.records import (
    NAME,
    PICTURES,
    VERSION,
    Example,
    data_libraries,
    write_index,
)

data_libraries()  # says what is missing

import tensorflow_datasets as tfds  # noqa: E402

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


def write_records(
    examples: Iterable[Example], out: Path, *, size: int, crop_size: int, force: bool = False
) -> tuple[int, int]:
    """Write ``out`` whole or not at all; gives the number of photos and of people.

    Photos and masks are ``size`` x ``size``, crops ``crop_size`` x ``crop_size``. Examples may come
    in any order, which is kept. Raises UserError for an example of another size, for none at all,
    and if ``out`` exists and ``force`` is not given.
    """
    people: dict[str, int] = {}
    identities: list[int] = []

    def numbered() -> Iterator[Example]:
        for example in examples:
            _check_sizes(example, size, crop_size)
            identities.append(people.setdefault(example.identity, len(people)))
            yield example
        if not identities:
            raise UserError(f"{out}: there is no usable photo, so nothing was written")

    with output_folder(out, force=force) as folder:
        builder = FaceRecords(folder, numbered(), size=size, crop_size=crop_size)
        try:
            builder.write()
        except OSError as error:
            raise UserError(f"{out} cannot be written: {one_line(error)}") from error
        folder = Path(builder.data_path)
        write_index(folder, identities, sorted(folder.glob("*.array_record*")))
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
