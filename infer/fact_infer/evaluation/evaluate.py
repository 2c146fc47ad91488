"""Evaluation of an adapter of the miniature: identity, copying, leakage, colours and captions."""

import functools

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from fact_infer.evaluation.measures import (
    Copied,
    Ratio,
    Samples,
    estimates,
    expression_copied,
    identity_samples,
)
from fact_infer.evaluation.page import Case
from fact_infer.evaluation.world import REGIONS, MetricNetworks, MetricOutputs, People
from fact_jax.metrics.copying import head_pose
from fact_jax.metrics.identity import rank_one
from fact_jax.metrics.intervals import INTERVALS, Estimate
from fact_jax.metrics.pictures import change, dilate, diversity, fid, kid
from fact_jax.portraits import sample_identity
from fact_jax.portraits.metric_networks import ATTRIBUTES, FACE_FEATURES, face_features

NOTES = (
    f"{INTERVALS}. Brackets hold the interval.",
    "Similarity: crops aligned by the parser's points, background blanked by its head mask, drawn "
    "and generated pictures alike.",
    "'true photo' is another photo of the person (similarity, rank-1: the ceiling), the reference "
    "photo (colours), or the person drawn in the caption's scene (captions).",
    "Copied: coefficients of the reference photo's property beside the base picture's; what a true "
    "photo has there is what the person alone brings.",
    "Latents: of the pictures, encoded. FAIR: at four timesteps of the picture's own noising. KID "
    "and FID: of the parser's features, against the true photos of the captions.",
    "Head and face: where the parser sees one in either of the two pictures, grown by one pixel. "
    "The ratio is of the means.",
)


def measure(
    networks: MetricNetworks, people: People, pictures: dict[str, UInt8[np.ndarray, "m h w 3"]]
) -> dict[str, Estimate]:
    """All measures, by the keys of ``fact_infer.evaluation.table.SECTIONS`` and the column."""
    samples, _ = measured_samples(networks, people, pictures)
    return estimates(samples, whose(people, len(pictures["fact"])))


def whose(people: People, rows: int) -> Int[np.ndarray, " m"]:
    """The person, from 0, of each picture."""
    return np.arange(rows) % len(people.crops)


def measured_samples(
    networks: MetricNetworks, people: People, pictures: dict[str, UInt8[np.ndarray, "m h w 3"]]
) -> tuple[Samples, dict[str, MetricOutputs]]:
    """What was measured on each picture, and what the networks saw."""
    seen = {name: networks(images) for name, images in pictures.items()}
    seen["reference"] = networks(people.first_references)
    seen["another"] = networks(people.another)
    seen["scene"] = networks(people.scenes.images)
    who = whose(people, len(pictures["fact"]))
    samples = {
        **_identity(seen, who),
        **_copied(seen, people, who),
        **_changes(seen, pictures),
        **_colours(seen, people),
        **_face_features(seen, people),
        **_captions(seen, people),
        **_variety(seen, pictures, who),
    }
    return samples, seen


_PICTURES = (("fact", "fact"), ("base", "base"))


def _identity(seen: dict[str, MetricOutputs], who: Int[np.ndarray, " m"]) -> Samples:
    reference, another = seen["reference"].embeddings, seen["another"].embeddings
    wrong = np.roll(reference, -1, axis=0)
    samples: Samples = {}
    for column, source in _PICTURES:
        samples |= identity_samples(
            seen[source].embeddings,
            reference[who],
            wrong[who],
            another,
            who,
            column,
            another[who],
        )
    # The ceiling looks for the reference photo's owner among the other photos.
    own = np.arange(len(reference))
    true = identity_samples(another, reference, wrong, another, own, "true")
    true["rank_one/true"] = rank_one(reference, another)
    # The person drawn in the caption's scene: as near to one photo as to the other.
    scene = identity_samples(
        seen["scene"].embeddings, reference, wrong, another, own, "true", another
    )
    gain = samples["reference/fact"] - samples["reference/base"]  # type: ignore[operator]
    copies = {"copy_paste/true": scene["copy_paste/true"], "over_base/fact": gain}
    return samples | true | copies


def _copied(seen: dict[str, MetricOutputs], people: People, who: Int[np.ndarray, " m"]) -> Samples:
    samples: Samples = {}
    first = slice(len(people.crops))
    given = seen["reference"]
    caption = people.scenes.portrait.expression
    properties = {
        name: {**head_pose(outputs.points), "light": outputs.light}
        for name, outputs in seen.items()
    }
    for column, source in (*_PICTURES, ("true", "scene")):
        rows, base = (who[first], first) if column == "true" else (who, slice(None))
        for name, values in properties[source].items():
            reference = properties["reference"][name][rows]
            samples[f"copied/{name}/{column}"] = Copied(
                values, reference, properties["base"][name][base]
            )
        samples[f"copied/expression/{column}"] = expression_copied(
            seen[source].attributes["expression"],
            given.attributes["expression"][rows],
            caption[rows],
        )
    return samples


def _changes(seen: dict[str, MetricOutputs], pictures: dict[str, np.ndarray]) -> Samples:
    samples: Samples = {}
    for region in REGIONS:
        mask = changed_region(seen, pictures["fact"].shape[1], region)
        inside, outside = change(pictures["fact"], pictures["base"], mask)
        samples[f"{region}/inside/fact"] = inside
        samples[f"{region}/outside/fact"] = outside
        samples[f"{region}/ratio/fact"] = Ratio(outside, inside)
    return samples


def changed_region(
    seen: dict[str, MetricOutputs], size: int, region: str = "head"
) -> Bool[np.ndarray, "m h w"]:
    """Where the adapter may change pictures of ``size``: the region in either, and a pixel more."""
    mask = dilate(getattr(seen["base"], region) | getattr(seen["fact"], region))
    factor = size // mask.shape[1]
    return mask.repeat(factor, axis=1).repeat(factor, axis=2)


def _colours(seen: dict[str, MetricOutputs], people: People) -> Samples:
    samples: Samples = {}
    for name in ("hair", "skin"):
        truth = getattr(people.scenes.portrait, name)
        for column, source in (*_PICTURES, ("true", "reference")):
            found = getattr(seen[source], name)
            samples[f"{name}/{column}"] = np.abs(found - _tiled(truth, found)).mean(-1)
    return samples


def _face_features(seen: dict[str, MetricOutputs], people: People) -> Samples:
    """Errors of colours; of numbers in standard deviations over the people (a guess: about 1.1)."""
    truth = face_features(sample_identity(people.scenes.ids))
    samples: Samples = {}
    for column, source in (*_PICTURES, ("true", "reference")):
        found = seen[source].face_features
        error = np.abs(found - _tiled(truth, found))
        samples[f"iris/{column}"] = error[:, :3].mean(-1)
        samples[f"lips/{column}"] = error[:, 3:6].mean(-1)
        for name, values in zip(FACE_FEATURES[2:], (error / truth.std(0))[:, 6:].T, strict=True):
            samples[f"{name}/{column}"] = values
    return samples


def _captions(seen: dict[str, MetricOutputs], people: People) -> Samples:
    samples: Samples = {}
    for column, source in (*_PICTURES, ("true", "scene")):
        found = seen[source].attributes
        truth = people.scenes.portrait
        right = {n: found[n] == _tiled(getattr(truth, n), found[n]) for n in ATTRIBUTES}
        for name, hits in right.items():
            samples[f"caption/{name}/{column}"] = hits
        samples[f"caption/all/{column}"] = np.mean(list(right.values()), axis=0)
    return samples


def _variety(
    seen: dict[str, MetricOutputs], pictures: dict[str, np.ndarray], who: Int[np.ndarray, " m"]
) -> Samples:
    """Diversity over seeds, where there are several, and distances from true photos."""
    samples: Samples = {}
    truth = seen["scene"].features
    for column, source in _PICTURES:
        features = seen[source].features
        samples[f"kid/{column}"] = kid(features[: len(truth)], truth)
        value = fid(features[: len(truth)], truth)
        samples[f"fid/{column}"] = Estimate(value, np.nan, np.nan, len(truth))
        if len(who) > len(truth):
            samples |= diversity_samples(pictures[source], features, who, column)
    return samples


def diversity_samples(
    pictures: UInt8[np.ndarray, "m h w 3"],
    features: Float[np.ndarray, "m d"] | None,
    groups: Int[np.ndarray, " m"],
    column: str,
) -> Samples:
    """How different the pictures of each group are: one number a group."""
    rows = [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]
    apart = [diversity(pictures[r].reshape(len(r), -1) / 255, "absolute") for r in rows]
    samples: Samples = {f"diversity/pixels/{column}": np.asarray(apart)}
    if features is not None:
        apart = [diversity(features[r]) for r in rows]
        samples[f"diversity/features/{column}"] = np.asarray(apart)
    return samples


def _tiled(truth: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The truth about each person for each of his pictures."""
    return truth[np.arange(len(rows)) % len(truth)]


def cases(
    people: People, pictures: dict[str, UInt8[np.ndarray, "m h w 3"]], samples: Samples
) -> list[Case]:
    """Rows of the page, by the similarity to the reference photo."""
    first, found = people.first_references, []
    for row, person in enumerate(whose(people, len(pictures["fact"]))):
        shown = {"reference": first[person], "base": pictures["base"][row]}
        shown |= {"FACT": pictures["fact"][row], "true photo": people.another[person]}
        scores = {
            name: float(np.asarray(samples[f"{key}/fact"])[row])
            for name, key in (
                ("similarity to the reference", "reference"),
                ("to another photo", "another"),
                ("copy-paste", "copy_paste"),
                ("change outside the head", "head/outside"),
            )
        }
        about = [f"person {people.scenes.ids[person]}: {people.scenes.captions[person]}"]
        about += [f"{name} {value:.3f}" for name, value in scores.items()]
        readers = {name: functools.partial(np.copy, image) for name, image in shown.items()}
        found.append(Case(readers, scores["similarity to the reference"], about))
    return found
