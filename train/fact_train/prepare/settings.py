"""What a build is told: inputs, models, gates, splits."""

import dataclasses
import hashlib
import json
import sys
from typing import Annotated, Literal

from fact_jax.utils.errors import UserError
from fact_jax.utils.ranges import CheckedFields, Count, Positive, Range

Share = Annotated[float, Range(0, 1)]
Fraction = Annotated[float, Range(0, 1, open_low=True, open_high=True)]

ROLES = {
    "image": ("file_name", "image_file", "image", "jpg"),
    "identity": ("identity", "person", "person_id"),
    "caption": ("caption", "text"),
    "points": ("points", "landmarks"),
    "mask": ("mask", "mask_file"),
    "quality": ("quality",),
    "embedding": ("embedding",),
    "licence": ("licence", "license"),
    "source": ("source", "url"),
    "consent": ("consent",),
}
"""What a column of a table may hold, and the names that are looked for where none is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gates(CheckedFields):
    """What a photo must hold to; sizes in pixels of the photo as stored, angles in degrees."""

    face: Annotated[float, Range(0)] = 24.0
    """Least distance that the aligned crop (112 px wide in ArcFace's layout) spans in the photo."""
    sharpness: Annotated[float, Range(0)] = 0.0
    """Least variance of the Laplacian of the aligned grey crop of 112 px, in grey levels^2."""
    clipped: Share = 1.0
    """Largest share of the aligned crop's pixels that are black (below 5) or white (above 250)."""
    yaw: Annotated[float, Range(0, 180)] = 180.0
    pitch: Annotated[float, Range(0, 180)] = 180.0
    roll: Annotated[float, Range(0, 180)] = 180.0
    second: Share = 1.0
    """Largest area of another face, of the chosen one's: below 1, one person dominates."""
    score: Share = 0.5
    """Least score of a detector."""
    quality: Annotated[float, Range(-sys.float_info.max)] | None = None
    """Least score of the quality model, in its own units."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildSettings(CheckedFields):
    """Everything that the records depend on; how many processes write them is no part of it."""

    source: str
    size: Count = 512
    crop: Count = 112
    buckets: Count | None = None
    """Photos keep about their aspect ratio: sides in multiples of it, area about size^2."""
    format: str = "auto"
    root: str | None = None
    """Folder of the images that a table names; its own without."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Role -> column, for names other than those of ``ROLES``."""
    detector: str | None = None
    parser: str | None = None
    quality: str | None = None
    embedder: str | None = None
    captioner: str | None = None
    provider: Literal["cpu", "cuda"] = "cpu"
    batch: Count = 16
    chunk: Count = 64
    gates: Gates = Gates()
    duplicates: Share = 0.22
    """Two photos of like colours are one picture if at most this share of their hashes differs."""
    same_face: Fraction = 0.5
    """Least cosine of the embeddings of one person's photos."""
    other_face: Fraction = 0.2
    """A labelled person's photo below this cosine to the rest of theirs is reported."""
    min_photos: Count = 1
    splits: dict[str, float] = dataclasses.field(default_factory=dict)
    """Name -> share of the people; the rest is ``train``."""
    shard_megabytes: Positive = 256.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for role in self.columns:
            if role not in ROLES:
                raise ValueError(f"column {role}: known are {', '.join(ROLES)}")
        check_splits(self.splits)
        if self.buckets and (self.size % self.buckets or len(self.shapes) == 1):
            raise ValueError(
                f"buckets {self.buckets}: size {self.size} is to be a multiple of it, with others "
                "beside it (64 for a size of 512)"
            )

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(height, width) that photos are cut to: the square, and the rest up to 2 : 1 or so.

        Each short side has the long one that brings the area nearest to that of the square.
        """
        size, step = self.size, self.buckets or self.size
        found = [(size, size)]
        for short in range(size - step, int(size / 2**0.5), -step):
            long = round(size**2 / short / step) * step
            found += [(short, long), (long, short)]
        return found

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "BuildSettings":
        found = json.loads(text)
        return cls(**found | {"gates": Gates(**found["gates"])})

    def columns_of(self, role: str) -> tuple[str, ...]:
        """The names of a role's column, the first that a row has counts."""
        return (self.columns[role],) if role in self.columns else ROLES[role]


def check_splits(splits: dict[str, float]) -> None:
    """ValueError unless names and shares of splits leave people to train on."""
    for name, share in splits.items():
        if name in ("train", "all") or not name.isidentifier() or not 0 < share < 1:
            raise ValueError(f"split {name}={share:g}: give a name but train and all, and a share")
    if sum(splits.values()) >= 1:
        raise ValueError("the splits leave no people to train on")


class RejectedError(UserError):
    """A photo that makes no record: the ``reason`` that it is counted under, and a line."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def digest(*parts: str | bytes) -> str:
    """A digest of texts, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
        found.update(b"\0")
    return found.hexdigest()[:16]
