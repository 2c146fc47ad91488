"""Photos of made-up people as files: generation finds in them what training has in memory."""

import numpy as np
import pytest
from PIL import Image

from fact_infer.evaluation.portrait_files import write_portraits
from fact_jax.face import align_batch, prepare_photo
from fact_jax.portraits import SPLITS, make_batch
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy


def test_files_hold_the_person_the_points_and_the_head(tmp_path):
    paths = write_portraits("test", 2, 2, tmp_path)
    person = SPLITS["test"][1]
    assert [path.name for path in paths[2:]] == [f"{person:06d}-0.png", f"{person:06d}-1.png"]
    truth = make_batch([person], [person * 1000 + 1], 128)
    assert (np.asarray(Image.open(paths[3])) == truth.images[0]).all()

    found = prepare_photo(paths[3], mask_file=tmp_path / f"{person:06d}-1.mask.png", crop_size=48)
    points, mask = truth.portrait.points, truth.portrait.head_mask
    np.testing.assert_allclose(found.points, points[0], atol=1e-3)
    # The mask file has 256 levels, the points three decimals.
    crop = align_batch(truth.images, points, mask, 48)[0]
    assert np.abs(found.crop.astype(int) - crop).max() <= 2


@pytest.mark.parametrize(
    ("people", "photos", "size"),
    [(0, 1, 64), (2001, 1, 64), (1, 0, 64), (1, 101, 64), (1, 1, 31), (1, 1, 1025)],
)
def test_impossible_numbers_are_refused(tmp_path, people, photos, size):
    with pytest.raises(UserError, match="must be"):
        write_portraits("test", people, photos, tmp_path, size)
    assert not list(tmp_path.iterdir())
