"""A few made-up people as records, written once."""

import pytest

from fact_train.data.portraits import portrait_examples
from fact_train.data.record_writer import write_records

PEOPLE, PHOTOS = 5, 3


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """Of the sizes that the random miniature takes."""
    out = tmp_path_factory.mktemp("data") / "records"
    sizes = {"size": 16, "crop_size": 16}
    examples = portrait_examples("adapter", PEOPLE, PHOTOS, **sizes)
    assert write_records(examples, out, **sizes) == (PEOPLE * PHOTOS, PEOPLE)
    return out
