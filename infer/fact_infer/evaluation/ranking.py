"""Ranking of pictures by likeness to a person."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from fact_convert.models.face_encoder import load_encoder
from fact_infer.parts import FaceModels
from fact_jax.face.align import align_face
from fact_jax.face.landmarks import DEFAULT_PACK, detect_faces, find_pack, local_pack
from fact_jax.face.mask import head_mask
from fact_jax.metrics.identity import cosine
from fact_jax.models.transface import TransFaceConfig
from fact_jax.ops.precision import matmul_precision
from fact_jax.utils.pixels import normalize_pixels


class IdentityRanking:
    """Compares pictures with a person's photos by the face encoder's own identity embedding.

    The adapter was trained on what this encoder sees: the order is good for choosing among
    candidates, its numbers are no independent measure of likeness. ``pack`` is the insightface
    model pack that finds the pictures' faces, by default buffalo_l where it is installed. Without
    one a face is taken to lie at ``points``, in shares of a picture's width and height; UserError
    if there are none either.
    """

    def __init__(
        self,
        face: FaceModels,
        crops: UInt8[np.ndarray, "p s s 3"],
        pack: str | Path | None = None,
        points: Float[np.ndarray, "5 2"] | None = None,
    ):
        self._size, self._points = crops.shape[1], points
        self._pack = find_pack(pack or DEFAULT_PACK) if points is None else local_pack(pack)
        self._embed = _embedder(face.encoder, face.encoder_config)
        own = self._embeddings(crops)
        own /= np.linalg.norm(own, axis=-1, keepdims=True)
        self._wanted = own.mean(0)

    def similarity(self, picture: UInt8[np.ndarray, "h w 3"]) -> float | None:
        """Cosine of the picture's largest face with the photos; None where no face is found."""
        points = self._find(picture)
        if points is None:
            return None
        mask, _ = head_mask(picture.shape, points)
        crop = align_face(picture, points, self._size, mask)
        return float(cosine(self._embeddings(crop[None])[0], self._wanted))

    def _find(self, picture: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "5 2"] | None:
        if self._pack is not None:
            faces = detect_faces(picture, self._pack)
            largest = max(faces, key=lambda f: np.prod(f.box[2:] - f.box[:2]), default=None)
            return None if largest is None else largest.points
        height, width, _ = picture.shape
        return None if self._points is None else self._points * (width, height)

    def _embeddings(self, crops: UInt8[np.ndarray, "b s s 3"]) -> Float[np.ndarray, "b k"]:
        return np.array(self._embed(normalize_pixels(crops)))


@functools.lru_cache(maxsize=1)  # a service asks again and again
def _embedder(
    encoder: Path, config: TransFaceConfig
) -> Callable[[Float[Array, "b s s 3"]], Float[Array, "b d"]]:
    graph, state = nnx.split(load_encoder(encoder, config=config))

    @jax.jit
    def embed(images: Float[Array, "b s s 3"]) -> Float[Array, "b d"]:
        with matmul_precision("float32"):
            return nnx.merge(graph, state)(images)[1]

    return embed


def best_first(similarities: Sequence[float | None]) -> list[int]:
    """Indices from the most similar to the least; pictures without a face come last."""
    known = [-np.inf if similarity is None else similarity for similarity in similarities]
    return sorted(range(len(known)), key=known.__getitem__, reverse=True)
