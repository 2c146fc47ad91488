"""What the measuring networks see in a picture file, kept on disk by the file's contents."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from fact_infer.evaluation.any_model.networks import Clip, OnnxNetwork
from fact_infer.evaluation.results import fingerprint
from fact_infer.evaluation.world import SIZE, Parser, Recogniser, averaged, fits_parser
from fact_jax.face import align_batch, detect_faces, head_mask, read_image, read_sidecar
from fact_jax.face.landmarks import local_pack
from fact_jax.metrics.copying import light_side
from fact_jax.metrics.identity import average_recognisers, unit
from fact_jax.utils.cache import ArrayCache
from fact_jax.utils.errors import UserError

_LIGHT_CROP = 48
_INSTALL = (
    "install a detector (pip install 'fact-jax[faces]' and an insightface pack, "
    "--detector names it)"
)


class Observation(NamedTuple):
    """The faces of a picture, the largest first, and features of all of it (of size 0 if none)."""

    points: Float[np.ndarray, "f 5 2"]
    embeddings: Float[np.ndarray, "f k"]
    light: Float[np.ndarray, " f"]
    clip: Float[np.ndarray, " c"]
    features: Float[np.ndarray, " d"]


class Observer:
    """Finds faces and asks the networks; what was seen once is read from ``cache``.

    Faces lie where ``NAME.points.json`` beside the picture says, or where the detector of ``pack``
    finds them. With a ``parser``, the miniature's, square pictures of a multiple of its size have
    the one face that it sees, whatever lies beside them.
    """

    def __init__(
        self,
        recognisers: Sequence[Recogniser],
        *,
        cache: ArrayCache,
        parser: Parser | None = None,
        clip: Clip | None = None,
        features: OnnxNetwork | Clip | None = None,
        pack: str | None = None,
        about: str = "",
    ):
        self._recognisers, self._cache, self._parser = recognisers, cache, parser
        self._clip, self._features = clip, features
        self._pack = local_pack(pack)
        self._about = f"{about} {self._pack and fingerprint(self._pack)}"

    def check_drawn(self, size: tuple[int, int]) -> None:
        """UserError if faces in pictures of this height and width could not be found."""
        if self._pack is None and (self._parser is None or not fits_parser(size)):
            raise UserError(
                f"nothing finds faces in drawn pictures of {size[1]} x {size[0]}: {_INSTALL}"
            )

    def __call__(self, path: Path) -> Observation:
        """UserError if there is nothing to find faces with."""
        digest = hashlib.sha256(self._about.encode())
        digest.update(path.read_bytes())
        sidecar = path.with_suffix(".points.json")
        if sidecar.is_file():
            digest.update(sidecar.read_bytes())
        found = self._cache.get(digest.hexdigest(), lambda: self._observe(path)._asdict())
        return Observation(**found)

    def _observe(self, path: Path) -> Observation:
        image = read_image(path, to_srgb=True)
        points, masks = self._faces(path, image)
        nothing = np.zeros(0, np.float32)
        if len(points):
            images = np.broadcast_to(image, (len(points), *image.shape))
            seen = []
            for one in self._recognisers:
                crops = align_batch(images, points, masks if one.blanked else None, one.size)
                seen.append(one(crops))
            embeddings = average_recognisers(seen) if len(seen) > 1 else unit(seen[0])
            light = light_side(align_batch(images, points, masks, _LIGHT_CROP))
        else:
            embeddings, light = np.zeros((0, 0), np.float32), nothing
        return Observation(
            points=points,
            embeddings=embeddings,
            light=light,
            clip=self._clip.features(image) if self._clip else nothing,
            features=self._features.features(image) if self._features else nothing,
        )

    def _faces(
        self, path: Path, image: UInt8[np.ndarray, "h w 3"]
    ) -> tuple[Float[np.ndarray, "f 5 2"], Float[np.ndarray, "f h w"]]:
        """Points and head masks."""
        if self._parser is not None and fits_parser(image.shape):
            found, factor = self._parser(averaged(image[None])), image.shape[0] // SIZE
            points = (found["points"] + 0.5) * factor - 0.5
            return points, found["head"].repeat(factor, axis=1).repeat(factor, axis=2)
        sidecar = path.with_suffix(".points.json")
        if sidecar.is_file():
            faces = read_sidecar(sidecar)
        elif self._pack is not None:
            faces = detect_faces(image, self._pack)
        else:
            raise UserError(f"no face points for {path}: write them to {sidecar}, or {_INSTALL}")
        faces = sorted(faces, key=lambda f: -float(np.prod(f.box[2:] - f.box[:2])))
        points = np.asarray([face.points for face in faces], np.float32).reshape(-1, 5, 2)
        masks = [head_mask(image.shape, face.points).mask for face in faces]
        return points, np.asarray(masks, np.float32).reshape(-1, *image.shape[:2])


def heads(points: Float[np.ndarray, "f 5 2"], shape: tuple[int, ...]) -> Bool[np.ndarray, "h w"]:
    """Where the heads of these faces are: ellipses fitted to the points."""
    mask = np.zeros(shape[:2], bool)
    for own in points:
        mask |= head_mask(shape, own).mask >= 0.5
    return mask
