"""Results by content: equal bytes are computed once, the oldest are forgotten."""

import numpy as np

from fact_jax.utils.cache import ContentCache


def test_by_content_and_not_by_place():
    cache, computed = ContentCache(2), []

    def get(array, *more):
        return cache.get(lambda: computed.append(array.sum()) or len(computed), array, *more)

    ones = np.ones((2, 3), np.uint8)
    assert [get(ones), get(ones.copy()), get(ones[::-1])] == [1, 1, 1]
    # Another shape, another type, another way.
    assert [get(ones.reshape(3, 2)), get(ones, "average")] == [2, 3]
    # Two are kept: the first was the oldest.
    assert [get(ones, "average"), get(ones)] == [3, 4]
    assert (cache.hits, cache.misses) == (3, 4)
