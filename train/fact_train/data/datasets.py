"""Opening the dataset that an experiment names: records, or a cache of them."""

from fact_convert import Pipeline
from fact_jax.models.transface import TransFace
from fact_jax.utils.errors import UserError
from fact_train.data.cached_dataset import CachedDataset
from fact_train.data.frozen_encoders import FrozenEncoders
from fact_train.data.loader import Dataset
from fact_train.data.pixel_dataset import PixelDataset
from fact_train.data.records import Records


def open_records(folder: str, pipeline: Pipeline, encoder: TransFace) -> Records:
    """Records of the sizes that the base and the face encoder take; UserError for others."""
    records = Records(folder)
    size = pipeline.unet.config.sample_size * pipeline.vae.config.downscale
    wanted = {
        "--size": (records.size, size),
        "--crop": (records.crop_size, encoder.config.img_size),
    }
    wrong = [f"{name} {need} (it is {has})" for name, (has, need) in wanted.items() if has != need]
    if wrong:
        raise UserError(
            f"{folder} does not fit the base and the face encoder: write the records with "
            f"{' and '.join(wrong)}"
        )
    return records


def open_rows(options, pipeline: Pipeline, encoder: TransFace, encoders: FrozenEncoders) -> Dataset:
    """Rows of ``options.cache`` if it is given, else of ``options.records``."""
    records = None
    if options.records is not None:
        records = open_records(options.records, pipeline, encoder)
    if options.cache is not None:
        rows = CachedDataset(options.cache, options.region)
        rows.check(encoders, records)
        return rows
    cells = pipeline.unet.config.sample_size
    return PixelDataset(records, pipeline.tokenizer, region=options.region, cells=cells)
