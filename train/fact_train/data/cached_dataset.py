"""Cached datasets: VAE moments, text hidden states, face tokens and masks, encoded once.

A shard is there whole or not at all. So writing goes on where it was interrupted, and several
processes can each write their share; whoever finds all shards written adds what makes the folder
a tensorflow_datasets data set.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from fact_convert import Tokenizer
from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write, replace_folder
from fact_train.data.dataset_files import (
    Coder,
    shard_name,
    shard_reader,
    shard_writer,
    write_info,
)
from fact_train.data.frozen_encoders import FrozenEncoders
from fact_train.data.pixel_dataset import PixelDataset
from fact_train.data.records import (
    SHAPES,
    Records,
    data_libraries,
    open_folder,
    read_identities,
    read_row,
    read_shapes,
)

NAME, VERSION = "face_cache", "1.0.0"
ORIGIN = "cache.json"
ROWS_PER_SHARD = 512
_ROWS_PER_DEVICE = 8
_REGIONS = ("face", "head")
_DESCRIPTION = """\
Records of faces for training FACT (arXiv 2410.12312), encoded once: `mean` and `log_variance` of
the unscaled latents, `text` (hidden states of the caption), `tokens` of the aligned face, and
`face_mask` and `head_mask` averaged to the latents' cells; all float32. `cache.json` tells of which
records and by which weights.
"""


class CachedDataset:
    """Encoded samples; ``region`` ("head" or "face") selects the mask."""

    def __init__(self, folder: str | Path, region: str):
        self.folder, self.fingerprint, self._source = open_folder(folder, NAME, VERSION)
        self._mask = f"{region}_mask"
        self.identities: Int[np.ndarray, " n"] = read_identities(self.folder, len(self._source))
        self.shapes = _shapes(self.folder, len(self._source))
        self._origin = _read_origin(self.folder)

    def load(self, number: int, partner: int) -> dict[str, np.ndarray]:
        own = read_row(self._source, number, self.folder)
        other = own if partner == number else read_row(self._source, partner, self.folder)
        names = ("mean", "log_variance", "text", "tokens")
        sample = {name: own[name] for name in names}
        return {**sample, "mask": own[self._mask], "partner": other["tokens"]}

    def check(self, encoders: FrozenEncoders, records: Records | None) -> None:
        """UserError unless the cache was made by these weights, and of these records if given."""
        wanted = {"weights": encoders.digest()}
        if records is not None:
            wanted["records"] = records.fingerprint
        _compare(self.folder, self._origin, wanted)


class CacheWriter:
    """Encodes records and writes them as shards into ``out``; a cell of latents is ``cell`` pixels.

    Raises UserError if ``out`` holds a cache of other records or by other weights.
    """

    def __init__(
        self,
        records: Records,
        encoders: FrozenEncoders,
        tokenizer: Tokenizer,
        out: Path,
        *,
        cell: int,
        rows_per_shard: int = ROWS_PER_SHARD,
    ):
        self._tfds = data_libraries().tfds
        self._records, self._encoders = records, encoders
        self._rows = PixelDataset(records, tokenizer, region="head", cell=cell)
        self.folder = out / NAME / VERSION
        self._per_shard, self._count = rows_per_shard, len(records)
        self._origin = {
            "records": records.fingerprint,
            "weights": encoders.digest(),
            "rows_per_shard": rows_per_shard,
        }
        shards = -(-self._count // rows_per_shard)
        self.paths = [self.folder / shard_name(shard, shards, name=NAME) for shard in range(shards)]
        # Whole batches go over all devices of this process.
        mesh = Mesh(np.asarray(jax.local_devices()), "data")
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        self._frozen = jax.device_put(encoders.arrays, NamedSharding(mesh, PartitionSpec()))
        self._at_once = _ROWS_PER_DEVICE * mesh.size
        self._encode = jax.jit(self._encode_samples)

    def write(self, share: tuple[int, int], say: Callable[[str], None]) -> bool:
        """Write those of shards ``i``, ``i + n``, ... that are not there; True when all are."""
        self.claim()
        for shard in self.missing(share):
            self.write_shard(shard)
            say(f"{self.paths[shard].name} written")
        return self.complete(say)

    def missing(self, share: tuple[int, int] = (0, 1)) -> list[int]:
        """Those of shards ``i``, ``i + n``, ... that are not there."""
        first, step = share
        numbers = range(first, len(self.paths), step)
        return [shard for shard in numbers if not self.paths[shard].exists()]

    def complete(self, say: Callable[[str], None]) -> bool:
        """Write what makes a data set of the shards, if all are there; whether they are."""
        missing = self.missing()
        if missing:
            say(f"{len(missing)} of {len(self.paths)} shards are still to be written")
        else:
            self._complete()
        return not missing

    def claim(self) -> None:
        """Say in the folder of what the cache is; UserError if it is one of something else.

        Or if it lies where the records do: what `fact-train data` does with their folder would meet
        it.
        """
        whole = self._records.root.resolve()
        if self.folder.resolve().is_relative_to(whole):
            raise UserError(
                f"{self.folder.parents[1]} lies within {whole}, which holds the records: name a "
                "folder beside it"
            )
        if (self.folder / ORIGIN).exists():
            _compare(self.folder, _read_origin(self.folder), self._origin)
            return
        with atomic_write(self.folder / ORIGIN) as temporary:
            temporary.write_text(json.dumps(self._origin, indent=1) + "\n")

    def write_shard(self, shard: int) -> None:
        """Write one shard, whole or not at all."""
        path = self.paths[shard]
        for leftover in self.folder.glob(f".{path.name}.*.tmp"):  # of a process that was killed
            leftover.unlink()
        coder = Coder(self._features())
        first = shard * self._per_shard
        numbers = range(first, min(first + self._per_shard, self._count))
        with atomic_write(path) as temporary:
            writer = shard_writer(temporary)
            for row in self._encoded(numbers):
                writer.write(coder.encode(row))
            writer.close()

    def _encoded(self, numbers: range) -> Iterator[dict[str, np.ndarray]]:
        """Rows with every feature, in order, encoded in batches of one shape."""
        shapes, ready = self._records.shapes, dict[int, dict[str, np.ndarray]]()
        for number in numbers:
            if number not in ready:
                alike: Sequence[int] = range(number, numbers.stop)
                if shapes is not None:
                    alike = [one for one in alike if (shapes[one] == shapes[number]).all()]
                ready |= self._encode_rows(alike[: self._at_once])
            yield ready.pop(number)

    def _encode_rows(self, numbers: Sequence[int]) -> dict[int, dict[str, np.ndarray]]:
        """Rows of one shape by their numbers; the batch is filled up to its full size."""
        rows = [self._records[number] for number in numbers]
        samples = [self._rows.sample(*pair) for pair in zip(numbers, rows, strict=True)]
        samples += samples[-1:] * (self._at_once - len(numbers))
        batch = {name: np.stack([one[name] for one in samples]) for name in samples[0]}
        batch = jax.device_put(batch, self._split)
        encoded = jax.tree.map(np.asarray, self._encode(self._frozen, batch))
        return {
            number: {name: array[i] for name, array in encoded.items()}
            | {f"{name}_mask": self._rows.mask(number, row, name) for name in _REGIONS}
            for i, (number, row) in enumerate(zip(numbers, rows, strict=True))
        }

    def _encode_samples(self, frozen: PyTree, batch: dict[str, Array]) -> dict[str, Array]:
        mean, log_variance = self._encoders.moments(frozen, batch["images"])
        return {
            "mean": mean,
            "log_variance": log_variance,
            "text": self._encoders.text(frozen, batch["ids"]),
            "tokens": self._encoders.tokens(frozen, batch["crops"]),
        }

    def _features(self) -> Any:
        (row,) = self._encode_rows([0]).values()
        shapes = {name: value.shape for name, value in row.items()}
        if self._records.shapes is not None:
            for name in shapes.keys() - {"text", "tokens"}:
                shapes[name] = (None, None, *shapes[name][2:])
        kinds = self._tfds.features
        return kinds.FeaturesDict(
            {
                # As raw bytes: lists of numbers are slow to read.
                name: kinds.Tensor(shape=shape, dtype=np.float32, encoding=kinds.Encoding.BYTES)
                for name, shape in shapes.items()
            }
        )

    def _complete(self) -> None:
        """Write the files about the whole; of several processes all write the same."""
        starts = range(0, self._count, self._per_shard)
        lengths = [min(self._per_shard, self._count - start) for start in starts]
        about = self._records.identities, self._records.shapes
        _write_about(self.folder, self._features(), lengths, self.paths, *about)


def _write_about(
    folder: Path,
    features: Any,
    lengths: list[int],
    paths: list[Path],
    identities: Int[np.ndarray, " n"],
    shapes: Int[np.ndarray, "n 2"] | None,
) -> None:
    sizes = {path.name: path.stat().st_size for path in paths}
    write_info(
        folder,
        features,
        {"train": (lengths, sum(sizes.values()))},
        {"train": identities},
        sizes,
        shapes=None if shapes is None else {"train": shapes},
        name=NAME,
        version=VERSION,
        description=_DESCRIPTION,
        module=__name__,
    )


def cache_folder(cache: Path) -> Path:
    """The folder that is replaced where rows are taken out of a cache."""
    return open_folder(cache, NAME, VERSION)[0].resolve()  # of a link the folder, not the link


def check_records(cache: Path, before: str, after: str) -> bool:
    """Whether a cache is still of records whose digest is ``before``, else of ``after``'s.

    Raises UserError if it is of others.
    """
    folder = cache_folder(cache)
    origin = _read_origin(folder)
    if origin.get("records") == after:
        return False
    _compare(folder, origin, {"records": before})
    return True


def drop_rows(cache: Path, gone: Sequence[int], before: str, after: str) -> None:
    """Take rows out of a cache, whose records lose the same: their digest was ``before``.

    Nothing is done where it is ``after`` already. Raises UserError if the cache is of other
    records, or not whole.
    """
    if not check_records(cache, before, after):
        return
    folder, _, source = open_folder(cache, NAME, VERSION)
    origin = _read_origin(folder)
    features, identities = source.dataset_info.features, read_identities(folder, len(source))
    shapes = _shapes(folder, len(source))
    kept = np.setdiff1d(np.arange(len(source)), gone)
    old = sorted(folder.glob("*.array_record*"))
    per_shard = origin["rows_per_shard"]
    shards = -(-len(kept) // per_shard)
    with replace_folder(folder.resolve()) as temporary:
        paths = [temporary / shard_name(i, shards, name=NAME) for i in range(shards)]
        lengths = []
        for number, path in enumerate(paths):
            some = kept[number * per_shard : (number + 1) * per_shard]
            writer = shard_writer(path)
            for row in some:
                reader = shard_reader(old[row // per_shard])
                writer.write(reader.read([int(row % per_shard)])[0])
                reader.close()
            writer.close()
            lengths.append(len(some))
        told = json.dumps(origin | {"records": after}, indent=1)
        (temporary / ORIGIN).write_text(told + "\n")
        kept_shapes = None if shapes is None else shapes[kept]
        _write_about(temporary, features, lengths, paths, identities[kept], kept_shapes)


def _shapes(folder: Path, count: int) -> Int[np.ndarray, "n 2"] | None:
    """Height and width of each row's photo; None where all are alike."""
    return read_shapes(folder, count) if (folder / SHAPES).is_file() else None


def _read_origin(folder: Path) -> dict:
    try:
        return json.loads((folder / ORIGIN).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / ORIGIN} cannot be read: {one_line(error)}") from error


def _compare(folder: Path, found: dict, wanted: dict) -> None:
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        raise UserError(
            f"{folder} is a cache with other {' and '.join(differing)}: write it again, into "
            "another folder, with `fact-train cache`"
        )


def verify_cache(cache: Path) -> int:
    """Read all rows of a cache; their number. UserError for the first that is damaged."""
    folder, _, source = open_folder(cache, NAME, VERSION)
    read_identities(folder, len(source))
    _read_origin(folder)
    for number in range(len(source)):
        for name, value in read_row(source, number, folder).items():
            if not np.isfinite(value).all():
                raise UserError(f"{folder}: {name} of record {number} is not finite")
    return len(source)
