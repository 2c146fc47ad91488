"""People of records that fact-train wrote come out as a folder of photos."""

import numpy as np
import pytest

from fact_infer.evaluation.any_model.people_folder import read_people
from fact_infer.evaluation.any_model.record_people import records_in, unpack_people
from fact_jax.face import read_image, read_sidecar
from fact_jax.utils.errors import UserError
from fact_train.data.portraits import draw_portraits, portrait_examples
from fact_train.data.record_writer import write_records

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Three people with three photos each, of the portrait world."""
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("records")
    examples = portrait_examples("adapter", 3, 3, size=16, crop_size=16)
    write_records(examples, folder, size=16, crop_size=16)
    return folder


def test_people_are_those_of_the_records(records, tmp_path):
    inner = records_in(records)
    assert inner is not None
    assert records_in(inner) == inner
    assert records_in(tmp_path) is None
    out = unpack_people(inner, tmp_path / "people", 1, 2)
    people = read_people(out, 1, None)
    batch = draw_portraits("adapter", 3, 3, size=16)
    assert [one.shown.person for one in people] == [f"adapter-{n}" for n in (40000, 40001)]
    for i, one in enumerate(people):
        (photo,) = one.photos
        np.testing.assert_array_equal(read_image(photo.path), batch.images[3 * i])
        np.testing.assert_array_equal(read_image(one.shown.target), batch.images[3 * i + 2])
        (face,) = read_sidecar(photo.path.with_suffix(".points.json"))
        np.testing.assert_allclose(face.points, batch.portrait.points[3 * i], atol=1e-5)
        assert photo.mask is not None


def test_damaged_records_are_one_line(records, tmp_path):
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(UserError, match="cannot be opened"):
        unpack_people(tmp_path, tmp_path / "out", 1, None)
