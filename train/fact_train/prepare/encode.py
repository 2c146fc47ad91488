"""``fact-train cache`` in several processes, or on a runner of Beam: a shard is a piece of work."""

import functools
from pathlib import Path

from fact_convert import load_encoder, load_pipeline
from fact_jax.ops.precision import matmul_precision
from fact_train.data.cached_dataset import CacheWriter
from fact_train.data.frozen_encoders import FrozenEncoders
from fact_train.data.pixel_dataset import open_records
from fact_train.prepare.engine import Engine


@functools.lru_cache(maxsize=1)
def cache_writer(base: str, encoder: str, records: str, out: str) -> CacheWriter:
    """The writer of a cache; its models are loaded and compiled once a process."""
    pipeline, face = load_pipeline(base), load_encoder(encoder)
    return CacheWriter(
        open_records(records, pipeline, face),
        FrozenEncoders(pipeline, face),
        pipeline.tokenizer,
        Path(out),
        cell=pipeline.vae.config.downscale,
    )


def encode_shard(parts: tuple[str, str, str, str], name: str) -> dict[str, int]:
    """Write shard number ``name`` if it is not there."""
    writer = cache_writer(*parts)
    with matmul_precision("float32"):
        if not writer.paths[int(name)].exists():
            writer.write_shard(int(name))
    return {}


def encode_all(
    parts: tuple[str, str, str, str], share: tuple[int, int], engine: Engine
) -> CacheWriter:
    """Write a share of the shards; ``parts`` are base, encoder, records and the cache's folder."""
    writer = cache_writer(*parts)
    writer.claim()
    names = [str(shard) for shard in writer.missing(share)]
    work = functools.partial(encode_shard, parts)
    engine.map("shards", work, names, lambda: len(names) - len(writer.missing(share)))
    return writer
