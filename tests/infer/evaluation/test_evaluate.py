"""Evaluation: who is compared with whom, on judges and pictures that are made up."""

import json

import jax
import numpy as np
import pytest

from fact_infer.evaluation.evaluate import cases, measure, measured_samples
from fact_infer.evaluation.page import write_page
from fact_infer.evaluation.results import read_scores, save
from fact_infer.evaluation.table import COLUMNS, SECTIONS
from fact_infer.evaluation.world import MetricOutputs, People, render_people
from fact_jax.portraits import SPLITS, sample_identity
from fact_jax.portraits.metric_networks import ATTRIBUTES, face_features
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy

COUNT = 3


@pytest.fixture(scope="module")
def people() -> People:
    return render_people(COUNT, 2, 32)


class KnowingJudges:
    """Judges that recognise a picture by its pixels and say what they were told of it."""

    def __init__(self):
        self._known: list[tuple[np.ndarray, MetricOutputs]] = []

    def tell(self, images: np.ndarray, judgement: MetricOutputs) -> None:
        self._known.append((images, judgement))

    def __call__(self, images: np.ndarray) -> MetricOutputs:
        (found,) = [said for known, said in self._known if np.array_equal(known, images)]
        return found


def judgement(
    embeddings, people: People, *, attributes_right=True, colour_error=0.0
) -> MetricOutputs:
    truth = people.scenes.portrait
    head = np.zeros((COUNT, 64, 64), bool)
    head[:, 10:20, 10:20] = True
    return MetricOutputs(
        embeddings=np.asarray(embeddings, np.float32),
        head=head,
        face=head & False,
        skin=truth.skin + colour_error,
        hair=truth.hair - colour_error,
        attributes={n: getattr(truth, n) + (not attributes_right) for n in ATTRIBUTES},
        points=truth.points,
        light=np.zeros(COUNT),
        features=np.asarray(embeddings, np.float32),
        face_features=face_features(sample_identity(people.scenes.ids)) + colour_error,
    )


def scored_networks(people, pictures) -> KnowingJudges:
    basis = np.eye(4)
    networks = RepeatedJudges()
    networks.tell(pictures["fact"], judgement(basis[:3] + basis[3], people, colour_error=0.1))
    networks.tell(pictures["base"], judgement(basis[[1, 2, 0]], people, attributes_right=False))
    networks.tell(people.first_references, judgement(basis[:3], people))
    networks.tell(people.another, judgement(basis[:3], people))
    networks.tell(people.scenes.images, judgement(basis[:3], people))
    return networks


@pytest.fixture(scope="module")
def scored(people):
    draw = np.random.default_rng(0)
    base = draw.integers(0, 200, (COUNT, 64, 64, 3), np.uint8)
    fact = base.copy()
    fact[:, 9:21, 9:21] += 51  # the head, grown by one pixel
    pictures = {"base": base, "fact": fact}
    networks = scored_networks(people, pictures)
    samples, _ = measured_samples(networks, people, pictures)
    measures = measure(networks, people, pictures)
    return measures, pictures, samples


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reference/fact", np.sqrt(0.5)),
        ("reference/base", 0.0),
        ("reference/true", 1.0),
        ("wrong/fact", 0.0),
        ("wrong/base", 1.0),  # the base drew the next person
        ("over_wrong/fact", np.sqrt(0.5)),
        ("over_base/fact", np.sqrt(0.5)),
        ("rank_one/fact", 1.0),
        ("rank_one/base", 0.0),
        ("rank_one/true", 1.0),
        ("head/inside/fact", 0.2),
        ("head/outside/fact", 0.0),
        ("head/ratio/fact", 0.0),
        ("face/outside/fact", 0.2 * 144 / 4096),
        ("hair/fact", 0.1),
        ("iris/fact", 0.1),
        ("lips/base", 0.0),
        ("skin/base", 0.0),
        ("caption/shirt/fact", 1.0),
        ("caption/all/base", 0.0),
    ],
)
def test_measures_of_known_judgements(scored, name, value):
    assert scored[0][name].mean == pytest.approx(value, abs=1e-6)
    assert scored[0][name].n == COUNT


def test_a_picture_without_a_face_counts_for_nobody(scored):
    assert scored[0]["face/inside/fact"].n == 0


def test_every_measure_has_a_place_in_the_table(scored):
    shown = {
        f"{row.key}/{column}" for rows in SECTIONS.values() for row in rows for column in COLUMNS
    }
    assert set(scored[0]) <= shown
    # These take an adapter, other networks, several seeds, or pictures without a face.
    other = {"latents", "fair", "clip", "diversity/pixels", "diversity/features", "found"}
    assert other == {
        r.key
        for s in SECTIONS.values()
        for r in s
        if not any(k.startswith(f"{r.key}/") for k in scored[0])
    }


class RepeatedJudges(KnowingJudges):
    """Of pictures that come twice they say twice what they know."""

    def __call__(self, images):
        once = super().__call__(images[:COUNT])
        if len(images) == COUNT:
            return once
        return jax.tree.map(lambda a: np.concatenate([a, a]), once)


def test_several_pictures_of_a_person_count_as_one(scored, people):
    measures, pictures, _ = scored
    twice = {name: np.concatenate([images, images]) for name, images in pictures.items()}
    repeated = measure(scored_networks(people, pictures), people, twice)
    for name, estimate in measures.items():
        assert repeated[name].n == estimate.n, name
        assert repeated[name].mean == pytest.approx(estimate.mean, nan_ok=True), name
    assert repeated["diversity/pixels/fact"].mean == 0.0
    assert repeated["diversity/pixels/fact"].n == COUNT


def test_people_are_of_the_test_split_in_scenes_of_their_own(people):
    assert set(people.references.ids) <= set(SPLITS["test"])
    assert people.crops.shape == (COUNT, 2, 32, 32, 3)
    assert (people.first_references == people.references.images[[0, 2, 4]]).all()
    shown = [people.first_references, people.references.images[1::2], people.scenes.images]
    shown.append(people.another)
    for i, one in enumerate(shown):
        for other in shown[i + 1 :]:
            assert (one != other).any((1, 2, 3)).all()
    # The crops are of heads alone, and the same person's skin is in them.
    assert (people.crops == 0).all(-1).mean() > 0.1


def test_saved_evaluation_holds_all_that_the_table_shows(scored, people, tmp_path):
    measures, pictures, samples = scored
    page = write_page("t", "s", measures, cases(people, pictures, samples), sorted_by="likeness")
    rows = [{"person": int(number), "seed": i} for i, number in enumerate(people.scenes.ids)]
    arrays = {**pictures, "captions": np.asarray(people.scenes.captions)}
    more = {"notes": ["a note"], "page": page, "arrays": arrays}
    text = save(tmp_path, "3 people", {"people": 3}, measures, samples, rows, **more)
    assert (tmp_path / "evaluation.txt").read_text() == text
    assert "3 people" in text.splitlines()[0]
    held = json.loads((tmp_path / "evaluation.json").read_text())
    assert held["measures"]["head/inside/fact"]["mean"] == pytest.approx(0.2)
    assert held["measures"]["face/inside/fact"]["mean"] is None
    with np.load(tmp_path / "pictures.npz") as kept:
        assert (kept["fact"] == pictures["fact"]).all()
        assert kept["captions"].tolist() == people.scenes.captions
    first, *_ = read_scores(tmp_path)
    assert first["person"] == people.scenes.ids[0]
    assert first["scores"]["reference"] == pytest.approx(np.sqrt(0.5))
    assert first["base_scores"]["wrong"] == pytest.approx(1.0)
    assert page.count('class="case"') == COUNT


@pytest.mark.parametrize(("count", "photos"), [(1, 1), (2001, 1), (3, 0), (3, 9)])
def test_impossible_numbers_are_refused(count, photos):
    with pytest.raises(UserError, match="must be"):
        render_people(count, photos, 32)
