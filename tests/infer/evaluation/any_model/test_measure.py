"""Pictures of any model: manifests, matching, copying, leakage, and what is seen once."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fact_infer.evaluation.any_model.manifest import Entry, Shown, read_manifest, write_manifest
from fact_infer.evaluation.any_model.measure import measure_entries
from fact_infer.evaluation.any_model.observations import Observer
from fact_infer.evaluation.measures import estimates
from fact_infer.evaluation.page import SHOWN, Case, write_page
from fact_jax.utils.cache import ArrayCache
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy

SIZE = 60
FACE = [[24.0, 24.0], [36.0, 24.0], [30.0, 31.0], [25.0, 38.0], [35.0, 38.0]]
SHIFTED = [[x - 18.0, y] for x, y in FACE]
_PAGE = {"title": "t", "summary": "s", "measures": {}, "sorted_by": "x"}


class ColourRecogniser:
    """Who it is is the colour in the middle of the crop; counts how often it is asked."""

    name, size, blanked, asked = "colour", 16, False, 0

    def __call__(self, crops):
        self.asked += len(crops)
        return crops[:, 5:11, 5:11].mean((1, 2)) - 127.5


def picture(path: Path, colours: dict, tone: int = 40, faces: list | None = None) -> Path:
    """A grey picture with a coloured face around the points of each colour."""
    pixels = np.full((SIZE, SIZE, 3), tone, np.uint8)
    for points, colour in colours.items():
        left, top = np.min(points, axis=0).astype(int) - 4
        right, bottom = np.max(points, axis=0).astype(int) + 5
        pixels[top:bottom, max(left, 0) : right] = colour
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    found = list(colours) if faces is None else faces
    content = {"faces": [{"points": points} for points in found]}
    path.with_suffix(".points.json").write_text(json.dumps(content))
    return path


def at(points):
    return tuple(map(tuple, points))


HERE, LEFT = at(FACE), at(SHIFTED)
RED, GREEN, BLUE = (230, 60, 60), (60, 230, 60), (60, 60, 230)


@pytest.fixture
def photos(tmp_path):
    """Two photos each of a red and a green person, which differ a little."""
    made = {}
    for name, colour in (("red", RED), ("green", GREEN)):
        for number, tint in ((0, 0), (1, 60)):
            own = tuple(min(255, c + tint * (i == 2)) for i, c in enumerate(colour))
            made[name, number] = picture(tmp_path / name / f"{number}.png", {HERE: own})
    return made


def shown(photos, name) -> Shown:
    return Shown(person=name, references=(photos[name, 0],), target=photos[name, 1])


def measured(tmp_path, entries, recogniser=None):
    recogniser = recogniser or ColourRecogniser()
    observer = Observer([recogniser], cache=ArrayCache(tmp_path / "seen"), about="test")
    found = measure_entries(entries, observer)
    return found, estimates(found.samples, found.who)


def test_a_copied_picture_scores_one_and_the_target_minus_one(tmp_path, photos):
    entries = [
        Entry(picture=photos["red", 0], people=(shown(photos, "red"),)),
        Entry(picture=photos["green", 1], people=(shown(photos, "green"),)),
    ]
    found, measures = measured(tmp_path, entries)
    np.testing.assert_allclose(found.samples["copy_paste/fact"], [1.0, -1.0], atol=1e-6)
    np.testing.assert_allclose(found.samples["reference/fact"][0], 1.0)
    np.testing.assert_allclose(found.samples["another/fact"][1], 1.0)
    assert measures["rank_one/fact"].mean == 1.0
    assert measures["reference/true"].mean < 1.0


def test_a_row_without_a_target_is_compared_with_the_persons(tmp_path, photos):
    """Of two pictures of red only the first names a target photo."""
    bare = Shown(person="red", references=(photos["red", 0],), target=None)
    people = [shown(photos, "red"), bare, shown(photos, "green")]
    entries = [Entry(picture=photos["red", 1], people=(one,)) for one in people]
    found, _ = measured(tmp_path, entries)
    another = found.samples["another/fact"]
    np.testing.assert_allclose(another[:2], 1.0)
    assert another[2] < 0.9


def test_a_base_picture_leaks_nothing(tmp_path, photos):
    base = picture(tmp_path / "base.png", {HERE: BLUE})
    leaking = picture(tmp_path / "leaking.png", {HERE: RED}, tone=91)  # 51 = a fifth, everywhere
    entries = [
        Entry(picture=base, base=base, people=(shown(photos, "red"),)),
        Entry(picture=leaking, base=base, people=(shown(photos, "green"),)),
    ]
    found, _ = measured(tmp_path, entries)
    assert found.samples["head/outside/fact"] == pytest.approx([0.0, 0.2])
    assert found.samples["over_base/fact"][0] == 0.0


def test_two_people_are_matched_wherever_they_stand(tmp_path, photos):
    both = picture(tmp_path / "both.png", {LEFT: RED, HERE: GREEN})
    alone = picture(tmp_path / "alone.png", {HERE: GREEN})
    people = (shown(photos, "green"), shown(photos, "red"))
    entries = [Entry(picture=both, people=people), Entry(picture=alone, people=people)]
    found, measures = measured(tmp_path, entries)
    np.testing.assert_allclose(found.samples["reference/fact"], [1, 1, 1, 0], atol=1e-6)
    assert found.samples["found/fact"].tolist() == [True, True, True, False]
    assert np.isnan(found.samples["copy_paste/fact"][3])
    assert found.samples["rank_one/fact"].tolist() == [True, True, True, False]
    assert measures["reference/fact"].n == 2  # people, not pictures
    assert measures["reference/fact"].mean == pytest.approx((1.0 + 0.5) / 2)
    assert found.cases[3].score is None


def test_a_picture_without_a_face_counts_as_nobody(tmp_path, photos):
    empty = picture(tmp_path / "empty.png", {}, faces=[])
    entries = [
        Entry(picture=empty, people=(shown(photos, "red"),)),
        Entry(picture=photos["green", 0], people=(shown(photos, "green"),)),
    ]
    found, measures = measured(tmp_path, entries)
    assert found.samples["reference/fact"][0] == 0.0
    assert measures["found/fact"].mean == 0.5
    nobody = Entry(picture=empty, people=(Shown(person="x", references=(empty,)),))
    with pytest.raises(UserError, match=r"no face found in .*empty"):
        measured(tmp_path, [nobody, *entries])


def test_what_was_seen_is_not_looked_at_again(tmp_path, photos):
    entries = [Entry(picture=photos[n, 1], people=(shown(photos, n),)) for n in ("red", "green")]
    first, again = ColourRecogniser(), ColourRecogniser()
    one, _ = measured(tmp_path, entries, first)
    assert first.asked == 4  # two pictures are targets too
    (tmp_path / "seen" / sorted(p.name for p in (tmp_path / "seen").iterdir())[0]).write_text("?")
    other, _ = measured(tmp_path, entries, again)
    assert again.asked == 1  # the damaged file alone
    for key, value in one.samples.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other.samples[key])


def test_photos_without_points_or_a_detector_are_told_of(tmp_path, photos, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = photos["red", 1]
    path.with_suffix(".points.json").unlink()
    entries = [Entry(picture=path, people=(shown(photos, n),)) for n in ("red", "green")]
    with pytest.raises(UserError, match=r"no face points for .*1\.png: write them to"):
        measured(tmp_path, entries)


def test_a_manifest_is_read_as_it_was_written(tmp_path, photos):
    entries = [
        Entry(picture=photos["red", 0], people=(shown(photos, "red"),), prompt="grün", seed=3),
        Entry(
            picture=photos["red", 1],
            people=(shown(photos, "red"), shown(photos, "green")),
            base=photos["green", 0],
        ),
    ]
    path = tmp_path / "sub" / "manifest.jsonl"
    path.parent.mkdir()
    path.write_text(write_manifest(entries, path.parent), encoding="utf-8")
    back = read_manifest(path)
    assert [e.picture.resolve() for e in back] == [e.picture for e in entries]
    assert back[0].prompt == "grün"
    assert [s.person for s in back[1].people] == ["red", "green"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1: not an object"),
        ('{"picture": "red/0.png", "person": "\\ud800", "references": "red/0.png"}',
         "line 1 is not JSON: 'utf-8' codec can't encode"),
        ('{"picture": "p", "person": "a", "refs": []}', "unknown 'refs'; known are base"),
        ('{"picture": "no.png", "person": "a", "references": "red/0.png"}', "no.png is no file"),
        ('{"picture": "red/0.png"}', "give person and references, or a list"),
        ('{"picture": "red/0.png", "person": "", "references": ["red/0.png"]}', "person must be"),
        ('{"picture": "red/0.png", "person": "a", "references": []}', "references must be 1 to 64"),
        ('{"picture": "red/0.png", "people": []}', "people must be a list of 1 to 32"),
        ('{"picture": "red/0.png", "person": "a", "references": ["red/0.png"], "seed": true}',
         "seed must be a whole number"),
        ('{"picture": "red/0.png", "people": [{"person": "a", "references": ["red/0.png"]},'
         ' {"person": "a", "references": ["red/0.png"]}]}', "the same person twice"),
        ("", "no picture in it"),
    ],
)  # fmt: skip
def test_wrong_manifests_are_one_line(line, message, tmp_path, photos):
    path = tmp_path / "manifest.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=".*".join(map(str.strip, message.split(";")))) as error:
        read_manifest(path)
    assert "\n" not in str(error.value)


def test_a_page_shows_the_worst_first_and_reads_only_what_it_shows():
    asked = []

    def read(score):
        asked.append(score)
        return np.full((8, 8, 3), 9, np.uint8)

    scores = [*np.random.default_rng(0).permutation(SHOWN + 50).tolist(), None]
    cases = [Case({"picture": lambda s=s: read(s)}, s, [f"<{s}>"]) for s in scores]
    text = write_page(cases=cases, **_PAGE)
    assert len(asked) == SHOWN
    assert asked[:3] == [None, 0, 1]
    assert asked[-1] == SHOWN + 49
    assert "&lt;0&gt;" in text
    assert "51 in between are not shown" in text
    assert "http" not in text.replace("http-equiv", "")
