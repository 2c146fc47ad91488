"""Photos that keep their form: points and masks against the portrait world, and the training."""

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from fact_convert import load_encoder, load_pipeline
from fact_jax.face import Face, align_face
from fact_jax.portraits import make_batch
from fact_jax.utils.errors import UserError
from fact_train.cli.main import main
from fact_train.data.cached_dataset import CachedDataset, CacheWriter
from fact_train.data.frozen_encoders import FrozenEncoders
from fact_train.data.loader import GrainSource
from fact_train.data.pixel_dataset import open_records
from fact_train.data.records import DamagedError, Records, data_libraries, decode
from fact_train.prepare.build import build
from fact_train.prepare.models.provider import Photo
from fact_train.prepare.photos.photo import cut_out
from fact_train.prepare.settings import BuildSettings
from fact_train.prepare.sources import Item
from fact_train.run.loop import run
from fact_train.tasks.adapter import AdapterTask
from fact_train.tasks.validation import read_validation
from tests.train.data.test_loader import NumberRows
from tests.train.tiny import tiny_config
from tests.train.toy import ToySource

pytestmark = pytest.mark.heavy
SIDE = 64
FRAMES = [(SIDE, SIDE), (SIDE, 105), (SIDE, 116), (105, SIDE), (116, SIDE)]
"""Height and width of the photos: each portrait stands somewhere in a wider background."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of 5 people, a photo in each frame, and the true points and masks by name."""
    folder, truth, rng = tmp_path_factory.mktemp("world"), {}, np.random.default_rng(0)
    ids = np.repeat(np.arange(5), len(FRAMES))
    batch = make_batch(ids, np.arange(len(ids)), SIDE)
    for number, image in enumerate(batch.images):
        height, width = FRAMES[number % len(FRAMES)]
        down, right = rng.integers(0, (height - SIDE + 1, width - SIDE + 1))
        around = ((down, height - SIDE - down), (right, width - SIDE - right))
        photo = np.pad(image, (*around, (0, 0)), "reflect")
        # Beyond the portrait nobody's head is mirrored.
        mask = np.pad(np.asarray(batch.portrait.head_mask[number]), around)
        points = np.asarray(batch.portrait.points[number], np.float64) + (right, down)
        path = folder / f"p{ids[number]}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo).save(path)
        path.with_suffix(".points.json").write_text(json.dumps({"points": points.tolist()}))
        Image.fromarray(np.rint(mask * 255).astype(np.uint8)).save(path.with_suffix(".mask.png"))
        truth[f"p{ids[number]}/{number}.png"] = photo, points, mask
    return folder, truth


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    settings = BuildSettings(source=str(world[0]), size=64, crop=48, buckets=16)
    return out, build(settings, str(out)).summary


def test_the_sides_of_stable_diffusion():
    shapes = BuildSettings(source="x", buckets=64).shapes
    assert shapes == [(512, 512), (448, 576), (576, 448), (384, 704), (704, 384)]
    assert BuildSettings(source="x").shapes == [(512, 512)]
    for size, step in ((512, 48), (512, 512), (512, 256)):
        with pytest.raises(ValueError, match="is to be a multiple of it"):
            BuildSettings(source="x", size=size, buckets=step)


def test_points_and_masks_are_where_the_world_has_them(world, made):
    """Aligned by its own points, a record shows what the photo shows aligned by the true ones."""
    out, summary = made
    records, truth = Records(out), world[1]
    assert summary["shapes"] == {"48 x 80": 10, "80 x 48": 10, "64 x 64": 5}
    assert len(data_libraries().tfds.data_source("face_records", data_dir=out)["train"]) == 25
    for number in range(len(records)):
        row = records[number]
        photo, points, mask = truth[row["name"].decode()]
        own, head = decode(row["photo"]), decode(row["head_mask"]) / np.float32(255)
        shape = tuple(records.shapes[number])
        assert own.shape == (*shape, 3)
        assert head.shape == decode(row["face_mask"]).shape == shape
        # Of the three forms the photo's own, and the face within.
        assert np.sign(shape[0] - shape[1]) == np.sign(photo.shape[0] - photo.shape[1])
        assert (row["points"] > 0).all()
        assert (row["points"] < (shape[1] - 1, shape[0] - 1)).all()
        # A pixel beside its points it is at least twice as wrong: of the photo, and of the mask.
        whole = mask.astype(np.float32)
        true = aligned(photo, points, whole)
        here, right, below = (
            np.abs(aligned(own, row["points"] + np.float32(move), head) - true).mean((1, 2, 3))
            for move in ((0, 0), (1, 0), (0, 1))
        )
        assert (2 * here < np.minimum(right, below)).all()


def aligned(image, points, mask):
    """What the face encoder sees, and the mask likewise."""
    grey = np.repeat(np.rint(mask[..., None] * 255), 3, -1).astype(np.uint8)
    return np.stack(
        [align_face(image, points, 48, mask), align_face(grey, points, 48)], dtype=float
    )


def test_the_form_that_holds_the_head_is_taken_before_the_nearest():
    """The nearest bucket where the head fits into its cut, else the nearest that holds the head."""
    image = np.zeros((100, 170, 3), np.uint8)
    mask = np.zeros((100, 170), np.float32)
    shapes = BuildSettings(source="x", size=64, buckets=16).shapes
    points = np.float32([[60, 40], [80, 40], [70, 50], [62, 60], [78, 60]])
    for rows in (slice(10, 90), slice(0, 100)):  # it fits, also where it is as high as the photo
        mask[:] = 0
        mask[rows, 30:110] = 1
        photo = Photo(Item("a"), image, (100, 170), face=Face(points, np.zeros(4)), mask=mask)
        assert cut_out(photo, shapes)[2].shape == (48, 80)
    # 108 x 80 is nearer to 80 x 48, but only 64 x 64 holds a head that is 80 wide.
    tall = np.zeros((108, 80, 3), np.uint8)
    mask = np.zeros((108, 80), np.float32)
    mask[20:70, :] = 1
    photo = Photo(Item("a"), tall, (108, 80), face=Face(points - (30, 0), np.zeros(4)), mask=mask)
    assert cut_out(photo, [(80, 48), (64, 64)])[2].shape == (64, 64)
    mask[:, :10] = mask[:, 70:] = 0
    assert cut_out(photo, [(80, 48), (64, 64)])[2].shape == (80, 48)


class ShapedRows(NumberRows):
    """Eleven rows of three shapes: six, four and one."""

    shapes = np.array([[1, 1], [2, 1]] * 4 + [[1, 1], [1, 2], [1, 1]])


def test_a_batch_is_of_one_form_and_all_rows_come_equally_often():
    source = GrainSource(ShapedRows(np.arange(11)), 4, seed=3)
    times, order = Counter[int](), []
    for step in range(11 * 4):  # sixteen epochs
        numbers = [source.choose(step, row)[0] for row in range(4)]
        assert len({tuple(ShapedRows.shapes[number]) for number in numbers}) == 1
        times.update(numbers)
        order.append(tuple(ShapedRows.shapes[numbers[0]]))
    assert set(times.values()) == {16}
    assert [order.count(one) for one in ((1, 1), (2, 1), (1, 2))] == [24, 16, 4]
    assert order[:11] != order[11:22]
    # The step is the whole position.
    fresh = GrainSource(ShapedRows(np.arange(11)), 4, seed=3)
    assert [fresh.choose(30, row) for row in range(4)] == [
        source.choose(30, row) for row in range(4)
    ]


def test_a_form_of_which_nothing_can_be_read_is_one_line():
    class Damaged(ShapedRows):
        def load(self, number, partner):
            if number == 9:
                raise DamagedError(Path("data"), 9, ValueError("torn"))
            return super().load(number, partner)

    rows = Damaged(np.arange(11))
    source = GrainSource(rows, 4, seed=3)
    step = next(i for i in range(99) if source.choose(i, 0)[0] == 9)
    with pytest.raises(UserError, match="torn; no photo of its shape is left"):
        source.load(step, 0)


def command(*arguments):
    return main(["data", *map(str, arguments)])


def test_everything_that_takes_a_set_takes_this_one(made, world, tmp_path, capsys):
    """Verified, merged with a square one, split, without a person; a wrong shape is found."""
    out, square, both = made[0], tmp_path / "square", tmp_path / "both"
    other = tmp_path / "others"
    shutil.copytree(world[0] / "p0", other / "q0")
    settings = BuildSettings(source=str(other), size=64, crop=48)
    build(settings, str(square))
    assert command("merge", out, square, "--to", both) == 0
    merged = Records(both)
    np.testing.assert_array_equal(merged.shapes[:25], Records(out).shapes)
    np.testing.assert_array_equal(merged.shapes[25:], [[64, 64]] * 5)
    assert command("split", both, "--to", tmp_path / "s", "--split", "validation=0.3") == 0
    assert command("remove", tmp_path / "s", "--person", "p1") == 0
    assert command("report", tmp_path / "s") == 0
    for folder in (out, both, tmp_path / "s"):
        assert command("verify", folder) == 0
    files = {path.name for path in (tmp_path / "s").rglob("shapes*.npy")}
    assert files == {"shapes.npy", "shapes-validation.npy"}
    assert "48 x 80 (10)" in (out / "README.md").read_text()
    capsys.readouterr()
    (path,) = both.rglob("shapes.npy")
    shapes = np.load(path)
    np.save(path, shapes[:, ::-1])
    assert command("verify", both) == 2
    assert "the line about it says" in capsys.readouterr().err
    np.save(path, shapes[:-1])
    with pytest.raises(UserError, match="29 shapes for 30 records"):
        Records(both)


@pytest.fixture(scope="module")
def tiny(world, tmp_path_factory):
    """For the random miniature: 12 x 20, 16 x 16 and 20 x 12."""
    out = tmp_path_factory.mktemp("tiny") / "out"
    settings = BuildSettings(source=str(world[0]), size=16, crop=16, buckets=4)
    assert build(settings, str(out)).summary["shapes"].keys() == {"12 x 20", "20 x 12", "16 x 16"}
    return out


@pytest.fixture
def cache(tiny, miniature, tmp_path):
    pipeline, encoder = load_pipeline(miniature / "base"), load_encoder(miniature / "encoder")
    records, frozen = open_records(str(tiny), pipeline, encoder), FrozenEncoders(pipeline, encoder)
    writer = CacheWriter(
        records, frozen, pipeline.tokenizer, tmp_path / "cache", cell=2, rows_per_shard=9
    )
    assert writer.write((0, 1), lambda line: None)
    return tmp_path / "cache"


def test_the_cache_keeps_the_forms(tiny, cache, miniature, tmp_path):
    """Latents and masks of 6 x 10, 8 x 8 and 10 x 6 cells, of all and without a person."""
    copy = shutil.copytree(tiny, tmp_path / "copy")
    for people in (5, 4):
        assert command("verify", cache) == 0
        found, shapes = CachedDataset(cache, "head"), Records(copy).shapes
        assert len(shapes) == 5 * people
        np.testing.assert_array_equal(found.shapes, shapes)
        for number, shape in enumerate(shapes // 2):
            row = found.load(number, number)
            assert row["mean"].shape[:2] == row["mask"].shape == tuple(shape)
        if people == 5:
            assert command("remove", copy, "--person", "p1", "--cache", cache) == 0


def test_the_loop_compiles_a_program_for_each_form(toy_config, tmp_path, monkeypatch, capsys):
    class Source(ToySource):
        def batches(self, start, rows):
            for step, batch in enumerate(super().batches(start, rows), start):
                yield batch | {"more": np.zeros((len(rows), 1 + step % 2), np.float32)}

    monkeypatch.setattr("experiment_toy.ToyTask.source", lambda task: Source(task.config))
    assert int(run(dataclasses.replace(toy_config, steps=4), tmp_path / "out").state.step) == 4
    said = capsys.readouterr()
    assert (said.out + said.err).count("compiling the training step") == 2


@pytest.mark.slow
def test_training_takes_all_forms_and_goes_on_alike(tiny, cache, miniature, tmp_path):
    """Of pixels and of the cache."""
    config = tiny_config(miniature, records=str(tiny))
    source = AdapterTask(config).source()
    batches = itertools.islice(source.batches(0, np.arange(4)), 8)
    assert len({batch["mask"].shape for batch in batches}) == 3
    whole = run(config, tmp_path / "whole").state
    assert int(whole.step) == 8
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["loss/fair"]) for line in lines)
    # Cut off at step 4 and gone on with, it is the same to the bit.
    run(dataclasses.replace(config, steps=4), tmp_path / "half")
    rest = run(config, tmp_path / "half").state
    jax.tree.map(np.testing.assert_array_equal, whole.params, rest.params)
    cached = dataclasses.replace(
        config, options=dataclasses.replace(config.options, cache=str(cache))
    )
    other = run(cached, tmp_path / "cached").state
    assert int(other.step) == 8
    for one, two in zip(jax.tree.leaves(whole.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-3)


def test_photos_of_other_sides_are_refused(made, tiny, miniature):
    config = tiny_config(miniature, records=str(made[0]))
    with pytest.raises(UserError, match=r"--size 16 --buckets 2 \(it is photos of 48 x 80"):
        AdapterTask(config)
    base, encoder = load_pipeline(miniature / "base"), load_encoder(miniature / "encoder")
    with pytest.raises(UserError, match="watching takes square photos"):
        read_validation(str(tiny), base, encoder)
