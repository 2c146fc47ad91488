"""Who is who: by labels, by faces, and what is told where they disagree; models in the pipeline."""

import base64
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from fact_jax.face.align import template_points
from fact_jax.portraits import make_batch
from fact_train.data.records import Records, decode
from fact_train.prepare import pairs
from fact_train.prepare.build import build
from fact_train.prepare.decide import decide, split_of, write_units
from fact_train.prepare.product.dataset import write_lines
from fact_train.prepare.settings import BuildSettings, Gates
from fact_train.prepare.store import Store
from fact_train.prepare.table import read_table
from tests.train.prepare.conftest import noise, rejected, write_photo

SIZES = {"size": 16, "crop": 16}


def face(person, photo, spread=0.15, dimensions=256):
    """The direction of a person, and a little else in each photo."""
    own = np.random.default_rng([1, person]).normal(size=dimensions)
    return own + spread * np.random.default_rng([2, person, photo]).normal(size=dimensions)


def write_faces(folder, people, photos, name):
    """``name(person, photo)`` is the path of a photo in the folder."""
    for person in range(people):
        for photo in range(photos):
            path = folder / name(person, photo)
            write_photo(path, seed=100 * person + photo)
            np.save(path.with_suffix(".embedding.npy"), face(person, photo))


def suspects(out):
    return [json.loads(line) for line in (out / "suspects.jsonl").read_text().splitlines()]


def who(out):
    """Name of a photo -> its person in the records."""
    records = Records(out)
    rows = [records[i] for i in range(len(records))]
    return {row["name"].decode(): row["identity"].decode() for row in rows}


def test_photos_without_labels_are_put_together_by_face(tmp_path):
    write_faces(tmp_path / "in", 4, 3, lambda person, photo: f"{photo}-{person}.png")
    (tmp_path / "in" / "0-3.embedding.npy").unlink()  # nobody knows who that is
    summary = build(BuildSettings(source=str(tmp_path / "in"), **SIZES), str(tmp_path / "out"))
    assert summary.summary["people"] == 5
    found = who(tmp_path / "out")
    assert found.pop("0-3.png") == "only 0-3.png"
    groups = {}
    for name, person in found.items():
        groups.setdefault(person, set()).add(name.split("-")[1])
    assert all(len(people) == 1 for people in groups.values())
    assert suspects(tmp_path / "out") == []


def test_the_names_of_labels_are_given_to_nobody_else(tmp_path):
    """A table as an earlier build may have named its people, with rows that nobody labelled."""
    write_faces(tmp_path / "in", 4, 2, lambda person, photo: f"{person}-{photo}.png")
    (tmp_path / "in" / "3-1.embedding.npy").unlink()
    labels = {0: "person-0000001", 1: "only 3-1.png"}
    with open(tmp_path / "in" / "metadata.jsonl", "w", encoding="utf-8") as lines:
        for person in range(4):
            for photo in range(2):
                row = {"file_name": f"{person}-{photo}.png", "identity": labels.get(person)}
                lines.write(json.dumps(row) + "\n")
    build(BuildSettings(source=str(tmp_path / "in"), **SIZES), str(tmp_path / "out"))
    assert who(tmp_path / "out") == {
        **{f"0-{photo}.png": "person-0000001" for photo in range(2)},
        **{f"1-{photo}.png": "only 3-1.png" for photo in range(2)},
        **{f"2-{photo}.png": "person-0000002" for photo in range(2)},
        "3-0.png": "person-0000003",
        "3-1.png": "only only 3-1.png",
    }


def test_a_chain_of_likenesses_is_no_person(tmp_path):
    """Ten directions in a half circle: neighbours are alike, the ends are opposite."""
    for number in range(10):
        path = tmp_path / "in" / f"{number}.png"
        write_photo(path, seed=number)
        angle = np.pi * number / 9
        np.save(path.with_suffix(".embedding.npy"), np.array([np.cos(angle), np.sin(angle)]))
    settings = BuildSettings(source=str(tmp_path / "in"), same_face=0.9, **SIZES)
    summary = build(settings, str(tmp_path / "out")).summary
    assert 3 <= summary["people"] <= 9
    found = who(tmp_path / "out")
    assert found["0.png"] != found["9.png"]


def test_labels_that_disagree_with_the_faces_are_told(tmp_path):
    """A photo of p1 lies in p0's folder; p2 and p3 are one person, in two splits."""
    write_faces(tmp_path / "in", 3, 4, lambda person, photo: f"p{person}/{photo}.png")
    stray = tmp_path / "in" / "p0" / "stray.png"
    write_photo(stray, seed=999)
    np.save(stray.with_suffix(".embedding.npy"), face(1, 99))
    for photo in range(3):
        path = tmp_path / "in" / "p3" / f"{photo}.png"
        write_photo(path, seed=500 + photo)
        np.save(path.with_suffix(".embedding.npy"), face(2, 50 + photo))
    share = next(
        share
        for share in np.linspace(0.05, 0.95, 19)
        if split_of("p2", {"test": share}) != split_of("p3", {"test": share})
    )
    splits = {"test": float(share)}
    settings = BuildSettings(source=str(tmp_path / "in"), splits=splits, **SIZES)
    summary = build(settings, str(tmp_path / "out")).summary
    assert (summary["records"], summary["alarms"]) == (16, 1)
    same, stray = suspects(tmp_path / "out")
    assert (same["kind"], same["people"], same["alarm"]) == ("same face", ["p2", "p3"], True)
    assert (stray["kind"], stray["photos"]) == ("disagrees", ["p0/stray.png"])
    assert stray["cosine"] < 0.2


def test_people_of_too_few_photos_go(tmp_path):
    for number in range(5):
        write_photo(tmp_path / "in" / ("a" if number < 3 else "b") / f"{number}.png", seed=number)
    write_photo(tmp_path / "in" / "b" / "copy.png", seed=3)  # counts no second time
    settings = BuildSettings(source=str(tmp_path / "in"), min_photos=3, **SIZES)
    summary = build(settings, str(tmp_path / "out")).summary
    assert summary["reasons"] == {"few photos": 2, "duplicate": 1}
    assert set(who(tmp_path / "out").values()) == {"a"}
    assert "b has 2 usable photos, 3 are needed" in rejected(tmp_path / "out")["b/4.png"][1]


def test_splits_are_of_people_and_stay_as_people_are_added():
    names = [f"person {number}" for number in range(4000)]
    found = [split_of(name, {"validation": 0.1, "test": 0.25}) for name in names]
    assert found == [split_of(name, {"test": 0.25, "validation": 0.1}) for name in names]
    for split, share in (("validation", 0.1), ("test", 0.25), ("train", 0.65)):
        # Four standard deviations of a binomial share.
        wide = 4 * np.sqrt(share * (1 - share) / len(names))
        assert abs(found.count(split) / len(names) - share) < wide


def test_pairs_over_blocks_are_those_of_all_with_all(monkeypatch, tmp_path):
    """Blocks of 5 among 13 vectors, in tiles of 2 x 3, against one plain product."""
    monkeypatch.setattr(pairs, "BLOCK", 5)
    monkeypatch.setattr(pairs, "_TILE", (2, 3))
    rng = np.random.default_rng(0)
    vectors = rng.integers(-127, 128, (13, 24)).astype(np.int8)
    vectors[11] = vectors[2]
    vectors[7] = -vectors[3]
    store = Store(str(tmp_path))
    (tmp_path / "plan").mkdir()
    np.save(tmp_path / "plan" / "face.npy", vectors)
    for name in pairs.block_names("face", 13):
        pairs.compare_blocks(str(tmp_path), "plan", {"face": 0.3, "hash": 1.0}, name)
    unit = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    wanted = {(i, j) for i, j in np.argwhere(unit @ unit.T >= 0.3).tolist() if i < j}
    found = pairs.Pairs(store, "plan", "face")
    assert set(found) == wanted
    assert list(found) == list(found)  # it can be looped over again
    assert (2, 11) in wanted


def test_little_of_a_record_stays_in_memory(tmp_path):
    """4,000 records of 1,000 people: what is compared lies in files, NumPy reads these."""
    store, count, rng = Store(str(tmp_path)), 4000, np.random.default_rng(0)
    texts = rng.integers(0, 256, (count, 32 + 192 + 128)).astype(np.uint8)
    texts[:, 224:] = texts[::4, 224:].repeat(4, 0)  # a person's photos agree

    def lines():
        for number, text in enumerate(texts):
            hashed, colours, face = (
                base64.b85encode(part.tobytes()).decode() for part in np.split(text, [32, 224])
            )
            yield {
                "name": f"p{number // 4:06d}/{number}.jpg",
                "identity": f"p{number // 4:06d}",
                **{"hash": hashed, "colours": colours, "embedding": face},
                **{"row": number, "bytes": 2000, "width": 64, "height": 64},
            }

    write_lines(store, "done/a.jsonl", lines())
    read_table(store, "warm", ["a"])
    tracemalloc.start()
    table = read_table(store, "plan", ["a"])
    units = write_units(table, store, "plan")
    decisions = decide(table, units, [], [], BuildSettings(source="x"))
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept / count < 130
    assert most / count < 220
    assert len(decisions.written) == count
    hashes = np.load(tmp_path / "plan" / "hash.npy")
    assert hashes.shape == (count, 255)
    bits = np.unpackbits(texts[:, :32], axis=1)[:, :255]
    np.testing.assert_array_equal(hashes, bits.astype(np.int8) * 2 - 1)
    np.testing.assert_array_equal(np.load(tmp_path / "plan" / "colours.npy"), texts[:, 32:224])
    np.testing.assert_array_equal(table.embeddings, texts[:, 224:].view(np.int8))
    assert table.names[count - 1] == "p000999/3999.jpg"


@pytest.mark.parametrize(
    ("gates", "reason"),
    [
        ({"face": 60}, "gate face"),
        ({"sharpness": 1e6}, "gate sharpness"),
        ({"clipped": 0.0001}, "gate clipped"),
        ({"roll": 5}, "gate roll"),
        ({"second": 0.3}, "gate second"),
        ({"quality": 0.6}, "gate quality"),
    ],
)
def test_every_gate_rejects_what_it_should(tmp_path, gates, reason):
    """The good photo is upright, sharp and alone; the bad one fails the gate that is asked for."""
    upright = template_points(112) / 2 + (40, 10)
    good = tmp_path / "in" / "a" / "good.png"
    write_photo(good, seed=1, points=template_points(112) * 0.6 + (20, 5), mask=False)
    good.with_suffix(".quality.txt").write_text("0.9")
    bad = tmp_path / "in" / "a" / "bad.png"
    write_photo(bad, seed=2, points=upright, mask=False)
    bad.with_suffix(".quality.txt").write_text("0.5")
    if "sharpness" in gates:
        gates = {"sharpness": 50}
        Image.fromarray(noise(2)).resize((12, 8)).resize((120, 80), Image.BICUBIC).save(bad)
    if "clipped" in gates:
        gates = {"clipped": 0.5}
        Image.fromarray(np.full((80, 120, 3), 255, np.uint8)).save(bad)
    if "roll" in gates:
        angle = np.radians(12)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        turned = (upright - upright.mean(0)) @ turn + upright.mean(0)
        bad.with_suffix(".json").write_text(json.dumps({"points": turned.tolist()}))
    if "second" in gates:
        faces = [{"points": (upright * scale).tolist()} for scale in (1.0, 0.8)]
        bad.with_suffix(".json").write_text(json.dumps({"faces": faces}))
    settings = BuildSettings(source=str(tmp_path / "in"), gates=Gates(**gates), **SIZES)
    build(settings, str(tmp_path / "out"))
    found = rejected(tmp_path / "out")
    assert {name: why for name, (why, _) in found.items()} == {"a/bad.png": reason}


def test_models_say_what_side_files_do_not(tmp_path):
    """Detector, parser, quality and embedder as ONNX files of the public layouts, in one build."""
    pytest.importorskip("onnx")
    from tests.fact_jax.face.test_detector import OFFSETS, save_red_square_detector
    from tests.train.prepare import onnx_files

    models = tmp_path / "models"
    models.mkdir()
    save_red_square_detector(models / "det.onnx")
    onnx_files.save_parser(models / "parser.onnx")
    onnx_files.save_quality(models / "quality.onnx")
    onnx_files.save_embedder(models / "embedder.onnx")
    (models / "README.md").write_text("---\nlicense: mit\n---\n")
    source = tmp_path / "in"
    source.mkdir()
    for number in range(4):
        pixels = noise(number, (640, 640, 3)) // 4
        pixels[320:352, 256:288] = (255, 0, 0)
        Image.fromarray(pixels).save(source / f"{number}.png")
    Image.fromarray(noise(9, (640, 640, 3)) // 4).save(source / "empty.png")
    settings = BuildSettings(
        source=str(source),
        size=160,
        crop=112,
        **{role: str(models / f"{role}.onnx") for role in ("parser", "quality", "embedder")},
        detector=str(models / "det.onnx"),
        batch=3,
    )
    summary = build(settings, str(tmp_path / "out")).summary
    assert (summary["records"], summary["rejected"]) == (4, 1)
    assert rejected(tmp_path / "out")["empty.png"][0] == "no face"
    assert {role: about["licence"] for role, about in summary["models"].items()} == dict.fromkeys(
        ("points", "mask", "quality", "embedding"), "mit"
    )
    assert summary["made_by"]["points: det.onnx"] == 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert summary["models"]["points"]["sha256"] in card
    records = Records(tmp_path / "out")
    row = records[0]
    # Stride 8: the first red cell is at (256, 320), and 640 px become 160.
    wanted = (OFFSETS + (256, 320) + 0.5) / 4 - 0.5
    np.testing.assert_allclose(row["points"], wanted, atol=1e-3)
    head = decode(row["head_mask"]).reshape(160, 160)
    assert head[84, 68] > 200  # in the red square
    assert head[20, 20] < 20
    assert len(set(who(tmp_path / "out").values())) == summary["people"]


def test_the_worlds_masks_and_points_come_through(tmp_path):
    """Made-up people with exact points and masks beside them: what the records hold is the truth.

    And against it, how good the ellipse is that stands in for a mask.
    """
    size = 64
    batch = make_batch(np.repeat(np.arange(4), 2), np.arange(8), size)
    truth = {}
    for i, image in enumerate(batch.images):
        for kind in ("exact", "ellipse"):
            path = tmp_path / kind / f"p{batch.ids[i]}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            points = np.asarray(batch.portrait.points[i], float).tolist()
            path.with_suffix(".points.json").write_text(json.dumps({"points": points}))
        head = np.asarray(batch.portrait.head_mask[i])
        mask = tmp_path / "exact" / f"p{batch.ids[i]}" / f"{i}.mask.png"
        Image.fromarray(np.rint(255 * head).astype(np.uint8)).save(mask)
        truth[f"p{batch.ids[i]}/{i}.png"] = (image, np.asarray(batch.portrait.points[i]), head)
    overlap = {}
    for kind in ("exact", "ellipse"):
        settings = BuildSettings(
            source=str(tmp_path / kind), size=size, crop=48, gates=Gates(face=8), duplicates=0.0
        )
        build(settings, str(tmp_path / f"{kind}-out"))
        records = Records(tmp_path / f"{kind}-out")
        assert len(records) == 8
        for number in range(8):
            row = records[number]
            image, points, head = truth[row["name"].decode()]
            np.testing.assert_allclose(row["points"], points, atol=1e-3)
            found = decode(row["head_mask"]).reshape(size, size) / 255
            both, either = np.minimum(found, head).sum(), np.maximum(found, head).sum()
            overlap.setdefault(kind, []).append(both / either)
            if kind == "exact":
                photo = decode(row["photo"]).astype(int)
                assert np.abs(photo - image).mean() < 4  # JPEG of quality 95
    assert min(overlap["exact"]) > 0.99
    assert np.mean(overlap["ellipse"]) > 0.6


def test_an_unlabelled_copy_does_not_join_two_people(tmp_path):
    """One picture as anna's, as nobody's and as ben's: ben keeps his, and it is told of."""
    lines = [{"image": "x.png", "identity": "anna"}, {"image": "y.png"}]
    lines += [{"image": "z.png", "identity": "ben"}]
    for line in lines:
        write_photo(tmp_path / "in" / line["image"], seed=3)
    (tmp_path / "in" / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = BuildSettings(source=str(tmp_path / "in" / "list.jsonl"), **SIZES)
    build(settings, str(tmp_path / "out"))
    records = Records(tmp_path / "out")
    assert sorted(records[i]["identity"].decode() for i in range(len(records))) == ["anna", "ben"]
    assert {name: why for name, (why, _) in rejected(tmp_path / "out").items()} == {
        "y.png": "duplicate"
    }
    told = [one for one in suspects(tmp_path / "out") if one["kind"] == "same picture"]
    assert {tuple(sorted(one["people"])) for one in told} == {("anna", "ben")}


def test_embeddings_of_another_length_than_most_reject_their_photos(tmp_path):
    """Also the first one, and a photo whose copy is usable."""
    write_faces(tmp_path / "in", 3, 2, lambda person, photo: f"p{person}/{photo}.png")
    write_photo(tmp_path / "in" / "p2" / "copy.png", seed=201)
    for name in ("p0/0", "p2/copy"):
        np.save(tmp_path / "in" / f"{name}.embedding.npy", np.ones(5))
    build(BuildSettings(source=str(tmp_path / "in"), **SIZES), str(tmp_path / "out"))
    line = "its embedding has 5 numbers, most have 256"
    assert rejected(tmp_path / "out") == {
        name: ("embedding", f"{name}: {line}") for name in ("p0/0.png", "p2/copy.png")
    }
    assert who(tmp_path / "out").keys() == {"p0/1.png", "p1/0.png", "p1/1.png"} | {
        f"p2/{photo}.png" for photo in range(2)
    }


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no archive", b"\x93NUMPY\1\0v\0{'descr': '<f4'"])
def test_a_damaged_embedding_rejects_its_photo_alone(tmp_path, content):
    write_faces(tmp_path / "in", 2, 2, lambda person, photo: f"p{person}/{photo}.png")
    (tmp_path / "in" / "p0" / "0.embedding.npy").write_bytes(content)
    summary = build(BuildSettings(source=str(tmp_path / "in"), **SIZES), str(tmp_path / "out"))
    assert (summary.summary["in"], summary.summary["rejected"]) == (4, 1)
    assert rejected(tmp_path / "out")["p0/0.png"][0] == "embedding"


def test_a_quality_gate_takes_nothing_on_trust(tmp_path):
    """Where no model and no file tells a photo's quality, the gate does not let it through."""
    write_faces(tmp_path / "in", 2, 1, lambda person, photo: f"p{person}/{photo}.png")
    (tmp_path / "in" / "p0" / "0.quality.txt").write_text("0.9")
    settings = BuildSettings(source=str(tmp_path / "in"), gates=Gates(quality=0.5), **SIZES)
    assert build(settings, str(tmp_path / "out")).summary["records"] == 1
    reason, line = rejected(tmp_path / "out")["p1/0.png"]
    assert (reason, "nothing tells its quality" in line) == ("gate quality", True)
