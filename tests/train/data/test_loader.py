"""Feeding: the batch of a step follows from the seed and the step, on any number of processes."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from fact_convert import tokenize
from fact_convert.models.tokenizer import read_tokenizer
from fact_jax.face import resize_area
from fact_jax.utils.errors import UserError
from fact_train.data.loader import GrainSource, SameIdentityPairs
from fact_train.data.pixel_dataset import PixelDataset
from fact_train.data.records import DamagedError, Records, decode
from tests.train.data.conftest import PHOTOS

pytestmark = pytest.mark.heavy


class NumberRows:
    """Rows that hold nothing but their own number and their partner's."""

    fingerprint = "numbers"
    shapes = None

    def __init__(self, identities):
        self.identities = np.asarray(identities)

    def load(self, number, partner):
        return {"number": np.asarray(number), "partner": np.asarray(partner)}


# Photos in no order; the third person has one.
PEOPLE_OF = [0, 1, 0, 0, 1, 3, 2, 3, 1, 3, 3]
BATCH = 4


def take(source, start, steps, rows=range(BATCH)):
    """(step, row) -> (number, partner)"""
    batches = list(itertools.islice(source.batches(start, np.asarray(rows)), steps))
    numbers = np.stack([[batch["number"], batch["partner"]] for batch in batches])
    return numbers.transpose(0, 2, 1)


@pytest.fixture
def source():
    return GrainSource(NumberRows(PEOPLE_OF), BATCH, seed=7)


def test_every_epoch_visits_every_row_once_in_another_order(source):
    count = len(PEOPLE_OF)
    seen = take(source, 0, 11)[..., 0].ravel()
    epochs = [list(seen[i : i + count]) for i in range(0, 4 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = take(GrainSource(NumberRows(PEOPLE_OF), BATCH, seed=8), 0, 11)[..., 0].ravel()
    assert list(other) != list(seen)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_see_the_global_batch(source, processes):
    whole = take(source, 0, 9)
    shares = np.array_split(np.arange(BATCH), processes)
    parts = [take(source, 0, 9, rows) for rows in shares]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_going_on_in_mid_epoch_with_another_number_of_processes(source):
    whole = take(source, 0, 12)
    np.testing.assert_array_equal(take(source, 5, 7), whole[5:])
    fresh = GrainSource(NumberRows(PEOPLE_OF), BATCH, seed=7)
    parts = [take(fresh, 5, 7, rows) for rows in ([0, 1], [2, 3])]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[5:])
    # Rows that do not stand together, as a mesh may ask for them.
    np.testing.assert_array_equal(take(fresh, 5, 7, [0, 2]), whole[5:, [0, 2]])


def test_partners_are_the_same_person_on_all_its_other_photos(source):
    people, met = np.asarray(PEOPLE_OF), set()
    for number, partner in take(source, 0, 150).reshape(-1, 2):
        assert people[number] == people[partner]
        assert (number != partner) == (people[number] != 2)
        met.add((int(number), int(partner)))
    pairs = {
        (a, b)
        for a, b in itertools.product(range(len(people)), repeat=2)
        if people[a] == people[b] and (a != b or people[a] == 2)
    }
    assert met == pairs


def test_partners_are_equally_likely():
    rng = np.random.default_rng(0)
    partners = SameIdentityPairs(np.asarray([5, 9, 5, 5, 9]))
    drawn = [partners.draw(2, rng) for _ in range(600)]
    assert set(drawn) == {0, 3}
    assert 250 < drawn.count(0) < 350


def test_the_fingerprint_holds_data_order_and_seed(source):
    rows = NumberRows(PEOPLE_OF)
    assert source.fingerprint == GrainSource(rows, BATCH, seed=7).fingerprint
    others = [GrainSource(rows, BATCH, seed=8), GrainSource(rows, 2, seed=7)]
    more = NumberRows([*PEOPLE_OF, 4])
    others.append(GrainSource(more, BATCH, seed=7))
    assert len({source.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_a_seed_that_grain_does_not_take(source):
    with pytest.raises(UserError, match="seed=-1"):
        GrainSource(NumberRows(PEOPLE_OF), BATCH, seed=-1)


@pytest.fixture(scope="module")
def tokenizer(miniature):
    return read_tokenizer(miniature / "base" / "tokenizer", 32)


def test_records_arrive_decoded_beside_their_partners(records, tokenizer):
    stored = Records(records)
    source = GrainSource(PixelDataset(stored, tokenizer, region="face", cell=2), BATCH, seed=0)
    batch = next(source.batches(2, np.arange(BATCH)))
    shapes = {name: (value.shape, value.dtype.name) for name, value in batch.items()}
    assert shapes == {
        "images": ((4, 16, 16, 3), "uint8"),
        "crops": ((4, 16, 16, 3), "uint8"),
        "partner_crops": ((4, 16, 16, 3), "uint8"),
        "ids": ((4, 32), "int32"),
        "mask": ((4, 8, 8), "float32"),
    }
    with_points = PixelDataset(stored, tokenizer, region="face", cell=2, points=True)
    np.testing.assert_array_equal(with_points.load(3, 3)["points"], stored[3]["points"])
    for row in range(BATCH):
        number, partner = source.choose(2, row)
        assert number // PHOTOS == partner // PHOTOS
        assert number != partner
        own = stored[number]
        np.testing.assert_array_equal(batch["images"][row], decode(own["photo"]))
        np.testing.assert_array_equal(batch["crops"][row], decode(own["crop"]))
        other = decode(stored[partner]["crop"])
        np.testing.assert_array_equal(batch["partner_crops"][row], other)
        mask = resize_area(decode(own["face_mask"]).astype(np.float32) / 255, (8, 8))
        np.testing.assert_allclose(batch["mask"][row], mask, atol=1e-6)
        ids = tokenize(tokenizer, [own["caption"].decode()])[0][0]
        np.testing.assert_array_equal(batch["ids"][row], ids)


class DamagedRows(NumberRows):
    """Of these numbers nothing can be read."""

    def __init__(self, identities, damaged):
        super().__init__(identities)
        self.damaged = damaged

    def load(self, number, partner):
        for one in (number, partner):
            if one in self.damaged:
                raise DamagedError(Path("data"), one, ValueError("torn"))
        return super().load(number, partner)


def test_a_damaged_record_changes_its_own_places_only(caplog):
    """Person 1 has photos 1, 4 and 8, of which 4 is damaged."""
    whole = take(GrainSource(NumberRows(PEOPLE_OF), BATCH, seed=7), 0, 33)
    damaged = GrainSource(DamagedRows(PEOPLE_OF, {4}), BATCH, seed=7)
    found = take(damaged, 0, 33)
    own, beside = whole[..., 0] == 4, whole[..., 1] == 4
    np.testing.assert_array_equal(found[~own & ~beside], whole[~own & ~beside])
    np.testing.assert_array_equal(found[beside & ~own][:, 0], whole[beside & ~own][:, 0])
    assert own.sum() == 12
    assert (beside & ~own).sum() > 3
    assert 4 not in found
    people = np.asarray(PEOPLE_OF)
    assert (people[found[..., 0]] == people[found[..., 1]]).all()
    assert len(set(found[own][:, 0])) > 3
    # From the seed and the place alone: the same again, in mid-run, and told once.
    again = GrainSource(DamagedRows(PEOPLE_OF, {4}), BATCH, seed=7)
    np.testing.assert_array_equal(take(again, 9, 24, [1, 2]), found[9:, [1, 2]])
    told = [record.message for record in caplog.records]
    assert told == ["warning: data: record 4 is damaged: torn; it is skipped (1 so far)"] * 2


def test_beside_itself_where_no_other_photo_can_be_read():
    found = take(GrainSource(DamagedRows([0, 0, *[1] * 30], {1}), BATCH, seed=0), 0, 20)
    assert {tuple(pair) for pair in found.reshape(-1, 2) if pair[0] == 0} == {(0, 0)}


@pytest.mark.parametrize(("people", "damaged"), [([0], {0}), (PEOPLE_OF, {4, 5})])
def test_too_many_damaged_records_are_an_error(people, damaged):
    with pytest.raises(UserError, match=rf"{len(damaged)} damaged records, more than the"):
        take(GrainSource(DamagedRows(people, damaged), BATCH, seed=7), 0, 33)


def test_no_thread_goes_on_looking_where_too_many_are_damaged():
    source = GrainSource(DamagedRows([0, 0], {0, 1}), BATCH, seed=7)
    for _ in range(3):
        with pytest.raises(UserError, match="more than the 1"):
            source.load(0, 0)


def test_a_flipped_bit_is_found(records, tokenizer, tmp_path):
    copy = tmp_path / "records"
    shutil.copytree(records, copy)
    shard = next((copy / "face_records" / "1.0.0").glob("*array_record*"))
    data = bytearray(shard.read_bytes())
    data[10_000] ^= 1  # one bit of what the 15 small records fill at the beginning
    shard.write_bytes(data)
    rows = PixelDataset(Records(copy), tokenizer, region="head", cell=2)
    said = {}
    for number in range(len(rows.identities)):
        try:
            rows.load(number, number)
        except DamagedError as error:
            said[number] = (error.number, str(error))
    assert said
    for number, (told, text) in said.items():
        assert told == number
        assert f"record {number} is damaged: " in text
