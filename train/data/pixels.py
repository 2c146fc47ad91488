"""Records as what the training step encodes itself: pictures, crops and token ids."""

import numpy as np
from jaxtyping import Float

from converters import Tokenizer, tokenize
from fact_jax.errors import UserError
from fact_jax.face import area_weights
from fact_jax.face.images import one_line
from train.data.records import Records, decode


class PixelRows:
    """``images``, ``crops`` and ``partner_crops`` in 0..255, ``ids``, and ``mask`` in [0, 1].

    ``region`` ("head" or "face") says which mask, averaged to ``cells`` x ``cells``.
    """

    def __init__(self, records: Records, tokenizer: Tokenizer, *, region: str, cells: int):
        self._records, self._tokenizer = records, tokenizer
        self._mask, self._weights = f"{region}_mask", area_weights(records.size, cells)
        self.identities, self.fingerprint = records.identities, records.fingerprint

    def load(self, number: int, partner: int) -> dict[str, np.ndarray]:
        own = self._records[number]
        other = own if partner == number else self._records[partner]
        caption = own["caption"].decode()
        return {
            "images": self._pixels(own, "photo", number),
            "crops": self._pixels(own, "crop", number),
            "partner_crops": self._pixels(other, "crop", partner),
            "ids": tokenize(self._tokenizer, [caption])[0][0],
            "mask": self._shrink(self._pixels(own, self._mask, number)),
        }

    def _pixels(self, row: dict, name: str, number: int) -> np.ndarray:
        try:
            return decode(row[name])
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(
                f"{self._records.folder}: the {name} of record {number} is damaged: "
                f"{one_line(error)}"
            ) from error

    def _shrink(self, mask: np.ndarray) -> Float[np.ndarray, "h w"]:
        return self._weights @ (mask.astype(np.float32) / 255.0) @ self._weights.T
