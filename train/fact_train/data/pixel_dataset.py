"""Records as pixels and token ids, which the training step encodes itself."""

import numpy as np
from jaxtyping import Float

from fact_convert import Pipeline, Tokenizer, tokenize
from fact_jax.face.warp import crop_to_picture
from fact_jax.models.transface import TransFace
from fact_jax.utils.errors import UserError
from fact_train.data.records import Records


def open_records(folder: str, pipeline: Pipeline, encoder: TransFace) -> Records:
    """Records of the sizes that the base and the face encoder take; UserError for others."""
    records = Records(folder)
    size = pipeline.unet.config.sample_size * pipeline.vae.config.downscale
    wanted: dict[str, tuple[object, int]] = {"--crop": (records.crop_size, encoder.config.img_size)}
    if records.shapes is None:
        wanted["--size"] = (records.size, size)
    else:
        # What the encoder of the UNet halves comes out even.
        step = pipeline.vae.config.downscale << (len(pipeline.unet.config.block_out_channels) - 1)
        areas = records.shapes.prod(1, dtype=np.int64) / size**2
        if (records.shapes % step).any() or np.abs(areas - 1).max() > 0.25:
            sides = np.unique(records.shapes, axis=0).tolist()
            found = ", ".join(f"{height} x {width}" for height, width in sides)
            wanted[f"--size {size} --buckets"] = (f"photos of {found}", step)
    wrong = [f"{name} {need} (it is {has})" for name, (has, need) in wanted.items() if has != need]
    if wrong:
        raise UserError(
            f"{folder} does not fit the base and the face encoder: write the records with "
            f"{' and '.join(wrong)}"
        )
    return records


class PixelDataset:
    """Rows with ``images``, ``crops`` and ``partner_crops`` in 0..255, ``ids``, and ``mask``.

    ``region`` ("head" or "face") says which mask; it is averaged over squares of ``cell`` pixels,
    which divides the photo's sides. Photos and masks are of one shape where ``shapes`` is None.
    With ``identity`` also what an identity loss takes: ``head`` masks in 0..255, ``warp`` (2, 3)
    from the crop to the photo, and the ``person``'s number; with ``points`` these of the face.
    """

    def __init__(
        self,
        records: Records,
        tokenizer: Tokenizer,
        region: str,
        cell: int,
        *,
        identity: bool = False,
        points: bool = False,
    ):
        self._records, self._tokenizer = records, tokenizer
        self._region, self._cell = region, cell
        self._identity, self._points = identity, points
        self.identities, self.fingerprint = records.identities, records.fingerprint
        self.shapes = records.shapes

    def load(self, number: int, partner: int) -> dict[str, np.ndarray]:
        row = self._records[number]
        other = row if partner == number else self._records[partner]
        more = {"points": row["points"]} if self._points else {}
        if self._identity:
            more |= {
                "head": self._records.picture(number, row, "head_mask"),
                "warp": crop_to_picture(row["points"], self._records.crop_size),
                "person": np.int32(self.identities[number]),
            }
        return {
            **more,
            **self.sample(number, row),
            "mask": self.mask(number, row, self._region),
            "partner_crops": self._records.picture(partner, other, "crop"),
        }

    def sample(self, number: int, row: dict) -> dict[str, np.ndarray]:
        """What a record itself gives, but for the mask."""
        return {
            "images": self._records.picture(number, row, "photo"),
            "crops": self._records.picture(number, row, "crop"),
            "ids": tokenize(self._tokenizer, [self._records.caption(number, row)])[0][0],
        }

    def mask(self, number: int, row: dict, region: str) -> Float[np.ndarray, "h w"]:
        """A mask in [0, 1], each cell the mean of what it covers."""
        pixels = self._records.picture(number, row, f"{region}_mask")
        # Not by matrices: their own threads would fight with those that decode.
        side, (height, width) = self._cell, pixels.shape[:2]
        parts = pixels.reshape(height // side, side, width // side, side)
        return parts.mean((1, 3), dtype=np.float32) / np.float32(255.0)
