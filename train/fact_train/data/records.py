"""Records of faces: ``Example``s go in, a tensorflow_datasets folder comes out and is opened again.

Whatever finds, cleans and captions photos only has to give ``Example``s; what trains only sees
``Records``. Neither needs TensorFlow.
"""

import dataclasses
import hashlib
import io
import json
import types
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError

NAME, VERSION = "face_records", "1.0.0"
IDENTITIES, SHAPES, SIZES = "identities.npy", "shapes.npy", "sizes.json"
PICTURES = ("photo", "face_mask", "head_mask", "crop")


class DamagedError(UserError):
    """A record that cannot be read; ``number`` is its place in ``folder``."""

    def __init__(self, folder: Path, number: int, error: Exception, what: str = ""):
        part = f"the {what} of record {number}" if what else f"record {number}"
        super().__init__(f"{folder}: {part} is damaged: {one_line(error)}")
        self.number = number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One photo of one person; pictures are encoded files (the photo PNG or JPEG, the rest PNG).

    ``identity`` is the same text for all photos of a person and for nobody else. ``photo`` and
    the masks (grey, 255 on the face or head) are of one size; ``crop`` is the aligned face, a
    square, with everything but the head black; ``points`` are (x, y) in pixels of the photo.
    """

    identity: str
    name: str
    photo: bytes
    caption: str
    face_mask: bytes
    head_mask: bytes
    crop: bytes
    points: Float[np.ndarray, "5 2"]


def encode_png(pixels: UInt8[np.ndarray, "..."]) -> bytes:
    """A grey (h, w) or RGB (h, w, 3) picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def encode_mask(mask: Float[np.ndarray, "h w"]) -> bytes:
    """A mask in [0, 1] as a grey PNG file."""
    return encode_png(np.rint(255 * np.clip(mask, 0.0, 1.0)).astype(np.uint8))


def decode(picture: bytes) -> UInt8[np.ndarray, "..."]:
    """The pixels of an encoded picture."""
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image)


class Records:
    """Records on disk by number, pictures still encoded; only who is who is held in memory."""

    def __init__(self, folder: str | Path):
        self.folder, self.fingerprint, source = open_folder(folder, NAME, VERSION, PICTURES)
        self._source = source
        features = source.dataset_info.features
        self.size: int | None = features["photo"].shape[0]
        """Side of the photos; None where they are of several ``shapes``."""
        self.crop_size: int = features["crop"].shape[0]
        self.shapes = read_shapes(self.folder, len(source)) if self.size is None else None
        self.identities: Int[np.ndarray, " n"] = read_identities(self.folder, len(source))

    def __len__(self) -> int:
        return len(self.identities)

    @property
    def root(self) -> Path:
        """The folder that was written to: of the files, or two above it."""
        whole = self.folder.parts[-2:] == (NAME, VERSION)
        return self.folder.parents[1] if whole else self.folder

    def __getitem__(self, number: int) -> dict:
        """The features of a record; DamagedError if it cannot be read."""
        return read_row(self._source, number, self.folder)

    def picture(self, number: int, row: dict, name: str) -> UInt8[np.ndarray, "..."]:
        """The pixels of a picture in a record; DamagedError if they cannot be decoded."""
        try:
            return decode(row[name])
        except (OSError, ValueError, SyntaxError) as error:
            raise DamagedError(self.folder, number, error, name) from error

    def caption(self, number: int, row: dict) -> str:
        """The caption of a record; DamagedError if it is no text."""
        try:
            return row["caption"].decode()
        except UnicodeDecodeError as error:
            raise DamagedError(self.folder, number, error, "caption") from error


def open_folder(
    folder: str | Path,
    name: str,
    version: str,
    encoded: Sequence[str] = (),
    split: str = "train",
) -> tuple:
    """(folder of the files, fingerprint of the files, tfds data source) of a dataset.

    ``folder`` is what was written to, or the version's folder in it. The pictures named in
    ``encoded`` are given as bytes. Raises UserError when there is no whole dataset.
    """
    tfds = data_libraries().tfds
    folder = Path(folder)
    inner = folder if (folder / "features.json").is_file() else folder / name / version
    if not (inner / "features.json").is_file():
        what = "holds no whole data set" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what} of the kind {name} {version}: write it with fact-train")
    check_sizes(inner)
    skip = {key: tfds.decode.SkipDecoding() for key in encoded}
    try:
        builder = tfds.builder_from_directory(inner)
        if builder.info.name != name:
            raise UserError(f"{folder} holds {builder.info.name}, {name} is needed")
        if split not in builder.info.splits:
            raise UserError(f"{folder} has no split {split}, only {', '.join(builder.info.splits)}")
        source = builder.as_data_source(split, decoders=skip)
        len(source)
    except UserError:
        raise
    except Exception as error:  # whatever the first damaged file causes
        raise UserError(f"{folder} cannot be opened: {one_line(error)}") from error
    return inner, fingerprint_files(inner), source


def read_row(source: Sequence[dict], number: int, folder: Path) -> dict:
    """A row of a data source; DamagedError if it cannot be read."""
    try:
        return source[number]
    except Exception as error:  # array_record and protobuf have their own kinds
        raise DamagedError(folder, number, error) from error


def read_identities(folder: Path, count: int) -> Int[np.ndarray, " n"]:
    """Number of the person in every record."""
    try:
        identities = np.load(folder / IDENTITIES)
    except (OSError, ValueError, EOFError, SyntaxError, TokenError) as error:
        raise UserError(f"{folder / IDENTITIES} cannot be read: {one_line(error)}") from error
    if identities.shape != (count,):
        raise UserError(
            f"{folder}: {len(identities)} identities for {count} records: the folder is not whole"
        )
    return identities


def read_shapes(folder: Path, count: int) -> Int[np.ndarray, "n 2"]:
    """Height and width of the photo in every record."""
    try:
        shapes = np.load(folder / SHAPES)
    except (OSError, ValueError, EOFError, SyntaxError, TokenError) as error:
        raise UserError(f"{folder / SHAPES} cannot be read: {one_line(error)}") from error
    if shapes.shape != (count, 2):
        raise UserError(f"{folder}: {len(shapes)} shapes for {count} records: it is not whole")
    return shapes


def check_sizes(folder: Path) -> None:
    """UserError unless all shards are there, as large as they were written.

    A flipped byte array_record finds itself, but of a shard cut off between its blocks it reads
    wrong records without a word.
    """
    try:
        sizes = json.loads((folder / SIZES).read_text())
        if not isinstance(sizes, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SIZES} cannot be read: {one_line(error)}") from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: copy the folder again, or write it again")
        if path.stat().st_size != size:
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes, {size:,} were written: copy the folder "
                "again, or write it again"
            )


def fingerprint_files(folder: Path) -> str:
    """Digest of the names and sizes of a folder's files, and of who is who."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    digest.update((folder / IDENTITIES).read_bytes() if (folder / IDENTITIES).is_file() else b"")
    return digest.hexdigest()[:32]


def data_libraries() -> types.SimpleNamespace:
    """tensorflow_datasets and grain; UserError when they are not installed."""
    try:
        import grain
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"records need tensorflow-datasets and grain ({one_line(error)}): "
            "pip install 'fact-jax[data]'"
        ) from None
    return types.SimpleNamespace(tfds=tfds, grain=grain)
