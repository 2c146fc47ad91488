"""Evaluations of a manifest, and of an adapter on a folder of people, from options to files."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fact_infer.evaluation.any_model.manifest import Entry, read_manifest, write_manifest
from fact_infer.evaluation.any_model.measure import NOTES, measure_entries, sorted_by
from fact_infer.evaluation.any_model.networks import Clip, OnnxNetwork
from fact_infer.evaluation.any_model.observations import Observer
from fact_infer.evaluation.any_model.people_folder import (
    Plan,
    check_photos,
    draw,
    leaked,
    read_people,
)
from fact_infer.evaluation.any_model.record_people import records_in, unpack_people
from fact_infer.evaluation.measures import Samples, estimates
from fact_infer.evaluation.page import write_page
from fact_infer.evaluation.results import Cost, PictureStore, fingerprint, save
from fact_infer.evaluation.world import MiniatureRecogniser, Parser, Recogniser, guidance_line
from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.jax_config import enable_compilation_cache
from fact_infer.request import GenerationParams
from fact_jax.utils.cache import ArrayCache
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write
from fact_jax.utils.miniature import require_miniature

Open = Callable[[argparse.Namespace, dict], Path]
_SORTED = {
    "another/fact": "similarity to the target photo",
    "reference/fact": "similarity to the reference photo",
}


@dataclasses.dataclass(frozen=True)
class MetricNetworks:
    """The networks that look at pictures, and what they are, for settings."""

    recognisers: Sequence[Recogniser]
    parser: Parser | None
    clip: Clip | None
    features: OnnxNetwork | Clip | None
    about: dict[str, str]

    def observer(self, out: Path, pack: str | None) -> Observer:
        return Observer(
            self.recognisers,
            cache=ArrayCache(out / "seen"),
            parser=self.parser,
            clip=self.clip,
            features=self.features,
            pack=pack,
            about=str(sorted(self.about.items())),
        )


def open_networks(arguments: argparse.Namespace) -> MetricNetworks:
    """Open the networks that the options name; without a recogniser the miniature's judge looks."""
    enable_compilation_cache()
    names = arguments.recogniser or ["judge"]
    about: dict[str, str] = {}
    recognisers: list[Recogniser] = []
    parser = None
    for name in dict.fromkeys(names):
        if name == "judge":
            require_miniature({"--judge": arguments.judge})
            recognisers.append(MiniatureRecogniser(arguments.judge))
            # Whose pictures are of other sizes needs points or a detector.
            parser = Parser(arguments.judge)
            about["judge"] = fingerprint(arguments.judge)
        else:
            recognisers.append(OnnxNetwork(name))
            about[str(name)] = fingerprint(name)
    clip = None if arguments.clip is None else Clip(arguments.clip)
    if clip is not None:
        about[clip.name] = fingerprint(clip.path)
    features: OnnxNetwork | Clip | None = None
    if arguments.features == "clip":
        if clip is None:
            raise UserError("--features clip needs --clip DIR")
        features = clip
    elif arguments.features is not None:
        features = OnnxNetwork(arguments.features)
        about[f"features {arguments.features}"] = fingerprint(arguments.features)
    return MetricNetworks(recognisers, parser, clip, features, about)


def evaluate_manifest(arguments: argparse.Namespace, open_folder: Open) -> str:
    """Measure the pictures of ``--pictures``; gives the table."""
    cost, entries, networks = Cost(), read_manifest(arguments.pictures), open_networks(arguments)
    about: dict[str, Any] = {
        "pictures": str(arguments.pictures),
        "manifest": fingerprint(arguments.pictures),
        "networks": networks.about,
        "features": arguments.features,
    }
    out = open_folder(arguments, about)
    observer = networks.observer(out, arguments.detector)
    title = f"{len(entries)} pictures of {arguments.pictures}"
    return _finish(out, title, about, entries, observer, networks, cost, "pictures", {})


def evaluate_folder(
    arguments: argparse.Namespace,
    params: GenerationParams,
    encoder: Path | None,
    open_folder: Open,
) -> str:
    """Draw and measure the people of ``--folder``; gives the table."""
    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder} is not a folder of people, nor of records")
    cost, networks = Cost(), open_networks(arguments)
    paths = {"--base": arguments.base, "--encoder": encoder}
    require_miniature({option: path for option, path in paths.items() if path is not None})
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    pipeline = FlaxPipeline.load(arguments.base, arguments.adapter, encoder)
    pipeline.base.check(params)
    assert pipeline.face is not None  # --adapter is required
    for line in pipeline.base.cut_prompts(arguments.prompt):
        print(f"note: {line}", file=sys.stderr)
    about: dict[str, Any] = {
        "folder": str(arguments.folder),
        "people": arguments.people,
        "photos of each": arguments.photos,
        "prompts": arguments.prompt,
        "seeds": list(seeds),
        "params": dataclasses.asdict(params),
        "batch": arguments.batch,
        "networks": networks.about,
        "features": arguments.features,
        "files": {
            name: fingerprint(path)
            for name, path in (
                ("base", pipeline.base.folder),
                ("adapter", pipeline.face.adapter),
                ("encoder", pipeline.face.encoder),
                ("folder", arguments.folder),
            )
        },
    }
    out = open_folder(arguments, about)
    observer = networks.observer(out, arguments.detector)
    observer.check_drawn(pipeline.base.picture_size(params))
    folder, count = arguments.folder, arguments.people
    if (records := records_in(folder)) is not None:
        folder = unpack_people(records, out / "people", arguments.photos, count)
    people = read_people(folder, arguments.photos, count, arguments.detector)
    check_photos(people)
    plan = Plan(people=people, prompts=arguments.prompt, seeds=seeds)
    about["people"] = len(people)
    store = PictureStore(out / "pictures")
    print(f"drawing {len(plan.rows())} pictures, and the base's", file=sys.stderr)
    with cost.drawing(store):
        entries = draw(pipeline, plan, params, store, arguments.batch)
    with atomic_write(out / "manifest.jsonl") as path:
        path.write_text(write_manifest(entries, out), encoding="utf-8")
    more = leaked(pipeline, plan, store, observer, min(arguments.batch, len(entries)))
    title = (
        f"{len(people)} people of {arguments.folder}, {len(plan.prompts)} prompt(s), {len(seeds)} "
        f"seed(s), {params.sampler} {params.steps} steps, guidance {arguments.guidance:g}, face "
        f"scale {guidance_line(dataclasses.asdict(params.guidance))}"
    )
    return _finish(out, title, about, entries, observer, networks, cost, "FACT", more)


def _finish(
    out: Path,
    title: str,
    about: dict,
    entries: Sequence[Entry],
    observer: Observer,
    networks: MetricNetworks,
    cost: Cost,
    label: str,
    more: Samples,
) -> str:
    found = measure_entries(entries, observer, networks.clip)
    samples = found.samples | more
    measures = estimates(samples, found.who)
    columns = {"fact": label, "base": "base model", "true": "true photo"}
    look = f"Looked at by {', '.join(networks.about)}."
    notes = (*NOTES, look)
    page = write_page(
        "Evaluation of pictures",
        title,
        measures,
        found.cases,
        sorted_by=_SORTED[sorted_by(samples)],
        notes=notes,
        columns=columns,
    )
    text = save(
        out,
        title,
        about,
        measures,
        samples,
        found.rows,
        notes=notes,
        page=page,
        columns=columns,
        cost=cost,
    )
    print(f"{cost.line()}; {out / 'pictures.html'}", file=sys.stderr)
    return text
