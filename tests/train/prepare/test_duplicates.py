"""Planted copies are found, whatever was done to them, and nothing else is."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from fact_jax.face.align import template_points
from fact_jax.portraits import make_batch
from fact_train.prepare.build import build
from fact_train.prepare.photos import measures
from fact_train.prepare.settings import BuildSettings
from tests.train.prepare.conftest import noise, rejected

SIDE = 128


def resized(image, points, rng):
    side = int(rng.integers(72, 200))
    small = image.resize((side, side), Image.BICUBIC)
    return small, (points + 0.5) * (side / image.width) - 0.5


def recompressed(image, points, rng):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(30, 80)))
    return Image.open(buffer), points


def mirror(image, points, rng):
    flipped = points.copy()
    flipped[:, 0] = image.width - 1 - flipped[:, 0]
    return image.transpose(Image.FLIP_LEFT_RIGHT), flipped[[1, 0, 2, 4, 3]]


def cropped(image, points, rng):
    """5 % of the width and of the height are gone, somewhere."""
    cut = round(0.05 * image.width)
    left, top = rng.integers(0, cut + 1, 2)
    box = (left, top, left + image.width - cut, top + image.height - cut)
    return image.crop(box), points - (left, top)


CHANGES = (resized, recompressed, mirror, cropped)


def world(first, count):
    """Made-up people, one photo each."""
    ids = np.arange(first, first + count)
    batch = make_batch(ids, ids + 7_000_000, SIDE)
    return zip(batch.images, np.asarray(batch.portrait.points), strict=True)


def patterns(first, count):
    """Patterns of all scales, with a face's points somewhere in the middle."""
    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        points = template_points(112) * rng.uniform(0.5, 0.7) + rng.uniform(20, 40, 2)
        yield noise(seed, (SIDE, SIDE, 3)), points


def plant(folder, draw, people, copies, seed, off):
    """One photo each, and copies of some in which a detector is ``off`` by a share of the eyes."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    chosen = set(rng.choice(people, copies, replace=False).tolist())
    made = 0
    for first in range(0, people, 250):
        for number, (pixels, points) in enumerate(draw(first, min(250, people - first)), first):
            image = Image.fromarray(pixels)
            write(folder / f"{number:05d}.png", image, points)
            if number in chosen:
                changes = [CHANGES[made % 4]] + [c for c in CHANGES if rng.uniform() < 0.25]
                for change in changes:
                    image, points = change(image, points, rng)
                eyes = np.linalg.norm(points[1] - points[0])
                moved = np.clip(points + rng.normal(0, off * eyes, (5, 2)), 0, image.width - 1)
                write(folder / f"{number:05d}-copy.png", image, moved)
                made += 1
    return {f"{number:05d}" for number in chosen}


def write(path, image, points):
    image.save(path, compress_level=1)
    text = json.dumps({"points": np.asarray(points, float).tolist()})
    path.with_suffix(".points.json").write_text(text)


def check(folder, chosen, people, out):
    build(BuildSettings(source=str(folder), size=64, crop=48), str(out))
    found, false = set(), 0
    for name, (reason, detail) in rejected(out).items():
        assert reason == "duplicate"
        same = detail.rsplit(" ", 1)[1]
        one, other = (text.split(".")[0].removesuffix("-copy") for text in (name, same))
        found |= {one} if one == other else set()
        false += one != other
    assert len(found & chosen) >= 0.99 * len(chosen)
    assert false < 0.001 * people
    return len(found), false


def test_planted_copies_are_found(tmp_path):
    chosen = plant(tmp_path / "flat", patterns, 120, 40, seed=0, off=0.01)
    check(tmp_path / "flat", chosen, 120, tmp_path / "out")


@pytest.mark.slow
def test_a_thousand_of_five_thousand(tmp_path):
    chosen = plant(tmp_path / "flat", world, 4000, 1000, seed=1, off=0.01)
    found, false = check(tmp_path / "flat", chosen, 4000, tmp_path / "out")
    print(f"{found} of 1,000 copies found, {false} false")


def test_the_hash_of_the_mirrored_picture_is_the_mirrored_hash():
    pixels, points = next(patterns(5, 1))
    flipped, moved = mirror(Image.fromarray(pixels), points, None)
    hashes = [
        measures.view_hash(measures.picture_view(np.asarray(one), five.astype(np.float32)))
        for one, five in ((pixels, points), (flipped, moved))
    ]
    signs = [2 * one.astype(np.int8) - 1 for one in hashes]
    same = (measures.mirrored(signs[:1]) == signs[1]).mean()
    assert same > 0.9
    assert (signs[0] == signs[1]).mean() < 0.8


@pytest.mark.parametrize(("axis", "wanted"), [(1, "yaw"), (0, "pitch"), (2, "roll")])
def test_the_pose_of_a_turned_head(axis, wanted):
    """The model's own points, turned by 20 degrees and projected."""
    angle = np.radians(20.0)
    c, s = np.cos(angle), np.sin(angle)
    turns = {
        # Around y, so that the nose (z > 0) goes to the right; around x, so that it goes down;
        # around z, clockwise as y points down.
        1: [[c, 0, s], [0, 1, 0], [-s, 0, c]],
        0: [[1, 0, 0], [0, c, s], [0, -s, c]],
        2: [[c, -s, 0], [s, c, 0], [0, 0, 1]],
    }
    head = measures._HEAD_POINTS
    points = (head @ np.array(turns[axis]).T)[:, :2] * 1.5 + 100
    found = dict(zip(("yaw", "pitch", "roll"), measures.pose(points), strict=True))
    assert found.pop(wanted) == pytest.approx(20.0, abs=1e-6)
    np.testing.assert_allclose(list(found.values()), 0.0, atol=1e-6)
