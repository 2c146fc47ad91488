"""Sources of photos: a source is listed in chunks, which are JSON, and a chunk is read to items.

A listing names everything that could be a photo, in an order that depends on the source alone, so
that nothing is lost: what cannot be read becomes an item with a ``problem``.
"""

from fact_train.prepare.sources.items import Item, batched, list_chunks, read_chunk

__all__ = ["Item", "batched", "list_chunks", "read_chunk"]
