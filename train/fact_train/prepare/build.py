"""``fact-train data build``: the phases one after the other, and what is decided between them."""

import contextlib
import dataclasses
import functools
import io
import json
import os
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from fact_jax.utils.command_line import version_of
from fact_jax.utils.errors import UserError, listed
from fact_jax.utils.files import folder_lock
from fact_train.data.dataset_files import shard_reader
from fact_train.data.records import data_libraries
from fact_train.prepare.decide import (
    Decisions,
    decide,
    name_digest,
    removed_photo,
    split_of,
    write_units,
)
from fact_train.prepare.engine import HERE, Engine
from fact_train.prepare.models.roles import describe_models, providers
from fact_train.prepare.pairs import BLOCK, Pairs, block_names, compare_blocks
from fact_train.prepare.photos.chunk import prepare_chunk, thumbnail
from fact_train.prepare.product import dataset as product
from fact_train.prepare.settings import BuildSettings, digest
from fact_train.prepare.sources import list_chunks
from fact_train.prepare.sources.items import chunk_text, readable_text
from fact_train.prepare.store import Store
from fact_train.prepare.table import Table, read_table

_SHOWN = 6
"""Thumbnails of each reason that is decided at the end."""


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build says at its end; ``fresh`` if it did not find everything there."""

    summary: dict[str, Any]
    fresh: bool


def build(
    settings: BuildSettings,
    out: str,
    engine: Engine = HERE,
    *,
    force: bool = False,
    keep_work: bool = False,
) -> Built:
    """Build records of ``settings.source`` in ``out``, or go on with it.

    Raises UserError for a source that holds nothing, models that do not load, no usable photo, and
    an ``out`` that holds anything but an unfinished build of the same.
    """
    with contextlib.ExitStack() as locks:
        return _build(settings, out, engine, force, keep_work, locks)


def _build(
    settings: BuildSettings,
    out: str,
    engine: Engine,
    force: bool,
    keep_work: bool,
    locks: contextlib.ExitStack,
) -> Built:
    data_libraries()
    store, source = Store(out), Store(settings.source)
    for reached in (source, store):
        reached.check_access()
    if source.fs == store.fs and _within(store, source):
        raise UserError(
            f"{out} lies within {settings.source}, which is read: name a folder beside it"
        )
    models = describe_models(settings)
    text = settings.to_json()
    providers(text)  # what does not load is said before anything is written
    ignored: Counter[str] = Counter()
    same = digest(text, json.dumps(models, sort_keys=True), f"fact-jax {version_of()}")
    names: list[str] = []
    listing = digest("")
    fresh = False
    try:
        for number, chunk in enumerate(list_chunks(settings, ignored)):
            if not names:
                fresh = _claim(store, same, force, locks)
            content = chunk_text(chunk)
            name = f"{number:07d}-{digest(same, content)}"
            names.append(name)
            listing = digest(listing, name)
            if not store.exists(f"{product.WORK}/list/{name}.json"):
                store.write(f"{product.WORK}/list/{name}.json", content)
    except UserError:
        if fresh:  # what is said is to be mended, which may change the settings
            store.remove(product.WORK)
        raise
    fingerprint = digest(same, listing)
    replaced = store.exists(product.SUMMARY)
    if replaced and not force:
        summary = store.json(product.SUMMARY)
        if summary.get("fingerprint") == fingerprint:
            if not keep_work:
                store.remove(product.WORK)
            return Built(summary, False)
        if not store.exists(f"{product.WORK}/build.json"):  # of a build that is to replace it
            store.remove(product.WORK)
        raise UserError(
            f"{out} holds records of another source or with other settings: name another folder, "
            "or replace it with --force"
        )
    work = Store(f"{out.rstrip('/')}/{product.WORK}")
    _prepare(engine, text, work, names)
    plan = f"plan/{digest(fingerprint, str(BLOCK))}"
    table = read_table(work, plan, names)
    decisions = _decide(engine, store, work, plan, table, settings) if len(table) else None
    if decisions is None or not len(decisions.written):
        told = work if replaced else store
        _tell_rejected(told, work, names, decisions, product.removed_digests(store))
        raise UserError(
            f"{out}: no usable photo is left, so no records were written; "
            f"{told.path(product.REJECTED)} says why"
        )
    if replaced:
        # In this order: killed in between, the next start writes all shards, and sees no summary.
        work.remove(f"{plan}/written")
        for name in ("report.html", product.SUMMARY, product.NAME, product.ABOUT):
            store.remove(name)
    photos, reasons = _tell_rejected(store, work, names, decisions, product.removed_digests(store))
    shards, people = _write(engine, store, work, plan, names, decisions, settings)
    suspects = Counter(suspect["kind"] for suspect in decisions.suspects)
    alarms = sum(suspect["alarm"] for suspect in decisions.suspects)
    product.write_lines(store, product.SUSPECTS, decisions.suspects)
    rejected = sum(reasons.values())
    written = sum(map(len, people.values()))
    if photos != written + rejected:
        raise RuntimeError(f"{photos} photos, but {written} records and {rejected} rejected")
    about = {
        "in": photos,
        "records": 0,
        "rejected": rejected,
        "reasons": dict(reasons.most_common()),
        "ignored": dict(sorted((readable_text(kind), count) for kind, count in ignored.items())),
        "suspects": dict(suspects),
        "alarms": alarms,
        "models": models,
        "settings": json.loads(text),
        "fingerprint": fingerprint,
    }
    product.finish(store, shards, people, (settings.size, settings.crop), about)
    if keep_work:
        work.write("build.json", json.dumps({"settings": same}))
    else:
        store.remove(product.WORK)
    return Built(store.json(product.SUMMARY), True)


def _within(inner: Store, outer: Store) -> bool:
    """Whether a folder lies under another, whatever links lead there."""
    paths = [os.path.realpath(one.root) if one.local else one.root for one in (inner, outer)]
    return paths[0].startswith(f"{paths[1].rstrip('/')}/")


def _claim(store: Store, same: str, force: bool, locks: contextlib.ExitStack) -> bool:
    """Take the folder for a build: whether it is new. UserError if it holds anything else.

    ``force`` is to replace the build that is there.

    On this machine ``locks`` keep other builds out from here on.
    """
    held = [name for name in store.names("") if not name.startswith(".")]
    if held == [product.WORK] and not store.names(product.WORK):
        held = []  # of a build that was killed before it wrote anything
    strange = [name for name in held if name not in product.OURS]
    marked = store.exists(f"{product.WORK}/build.json") or store.exists(product.SUMMARY)
    if held and (strange or not marked):
        raise UserError(
            f"{store.url} holds {listed(strange or held)}, which no build wrote: name another "
            "folder"
        )
    folder = Path(store.root)
    if store.local:
        folder.mkdir(parents=True, exist_ok=True)
    if store.local and os.access(folder, os.W_OK):
        locks.enter_context(folder_lock(folder, keep=False))
    for part in ("", product.WORK, product.FOLDER, product.ABOUT):
        store.sweep(part)
    begun = f"{product.WORK}/build.json"
    found, fresh = None, not held
    try:
        found = store.json(begun) if store.exists(begun) else None
        if found is not None and "settings" not in found:
            raise UserError(f"{store.path(begun)} is damaged: it names no settings")
    except UserError as error:
        if not force:
            raise UserError(f"{error}; begin anew with --force") from None
    if force and found != {"settings": same, "replaces": True}:
        # First whose it is, then what is not its own: killed in between it is still a build.
        store.write(begun, json.dumps({"settings": same, "replaces": True}))
        for name in store.names(product.WORK):
            if name != "build.json":
                store.remove(f"{product.WORK}/{name}")
    elif (
        found is not None
        and found["settings"] != same
        and not (found.get("replaces") and store.exists(product.SUMMARY))
    ):
        raise UserError(
            f"{store.url} holds an unfinished build with other settings or models: go on with "
            "those, name another folder, or begin anew with --force"
        )
    if found is None and not store.exists(product.SUMMARY):
        store.write(begun, json.dumps({"settings": same}))
    return fresh


def _prepare(engine: Engine, text: str, work: Store, names: list[str]) -> None:
    there = {name.removesuffix(".jsonl") for name in work.names("done")}
    missing = [name for name in names if name not in there]

    def done() -> int:
        return sum(name.endswith(".jsonl") for name in work.names("done")) - len(there)

    engine.map("photos", functools.partial(prepare_chunk, text, work.url), missing, done)


def _decide(
    engine: Engine, store: Store, work: Store, plan: str, table: Table, settings: BuildSettings
) -> Decisions:
    units = write_units(table, work, plan)
    thresholds = {"hash": 1 - 2 * settings.duplicates, "face": settings.same_face}
    names = block_names("hash", len(table)) + block_names("face", len(units.vectors))
    compare = functools.partial(compare_blocks, work.url, plan, thresholds)
    engine.map("pairs", compare, names, lambda: len(work.names(f"{plan}/pairs")))
    pictures, faces = (Pairs(work, plan, kind) for kind in ("hash", "face"))
    return decide(table, units, pictures, faces, settings, product.removed_digests(store))


def _write(
    engine: Engine,
    store: Store,
    work: Store,
    plan: str,
    names: list[str],
    decisions: Decisions,
    settings: BuildSettings,
) -> tuple[dict[str, list[tuple[int, int]]], dict[str, Int[np.ndarray, " n"]]]:
    """Write all shards: (records, bytes) of each and the person of each record, by split."""
    table, records = decisions.table, decisions.written
    order = ("train", *sorted(settings.splits))
    of_person = [order.index(split_of(name, settings.splits)) for name in decisions.people]
    splits = np.array(of_person, np.intc)[decisions.person[records]]
    wanted: dict[str, int] = {}
    people = {}
    for number, split in enumerate(order):
        some = records[splits == number]
        if not len(some):
            continue
        ends = product.plan_shards(table.size[some], settings.shard_megabytes)
        people[split] = product.Numbering(decisions.person[some].tolist()).numbers
        for shard, part in enumerate(np.split(some, ends)):
            name = f"{split}-{shard:05d}-{len(ends) + 1:05d}"
            wanted[name] = len(part)
            lines = (
                {
                    "chunk": names[table.chunk[one]],
                    "row": int(table.row[one]),
                    "identity": decisions.identity(one),
                }
                for one in part
            )
            product.write_lines(work, f"{plan}/shards/{name}.jsonl", lines)
    files = {product.record_file(name) for name in wanted} | {
        product.about_name(*product.numbered(name)) for name in wanted
    }
    for folder in (product.FOLDER, product.ABOUT):  # of a build that was killed, of other photos
        for name in store.names(folder):
            if f"{folder}/{name}" not in files:
                store.remove(f"{folder}/{name}")
    write = functools.partial(product.write_shard, work.url, plan, store.url)
    engine.map("shards", write, list(wanted), lambda: len(work.names(f"{plan}/written")))
    shards: dict[str, list[tuple[int, int]]] = {split: [] for split in people}
    for name, count in wanted.items():
        size = work.json(f"{plan}/written/{name}.json")["bytes"]
        shards[name.split("-")[0]].append((count, size))
    return shards, people


def _tell_rejected(
    store: Store,
    work: Store,
    names: list[str],
    decisions: Decisions | None,
    removed: Container[str],
) -> tuple[int, Counter[str]]:
    """Write ``rejected.jsonl`` in the order of the source: number of photos, counts by reason.

    Without ``decisions`` there is no record. Of people who were ``removed``, by the SHA-256 of
    their names, only the photos' names are told.
    """
    reasons: Counter[str] = Counter()
    photos = 0

    def lines() -> Iterator[dict]:
        nonlocal photos
        number = 0
        for chunk in names:
            for line in work.lines(f"done/{chunk}.jsonl"):
                photos += 1
                told = None
                if "reason" not in line:
                    assert decisions is not None
                    told, line["identity"] = decisions.rejected(number), decisions.identity(number)
                    number += 1
                    if told is None:
                        continue
                elif name_digest(line.get("identity", "")) in removed:
                    told = removed_photo(line["name"])
                if told is not None and told[0] == "removed":
                    line = {"name": line["name"], "reason": told[0], "detail": told[1]}
                elif told is not None:
                    line = _told_late(work, chunk, line, told, reasons[told[0]] < _SHOWN)
                reasons[line["reason"]] += 1
                yield line

    product.write_lines(store, product.REJECTED, lines())
    return photos, reasons


def _told_late(
    work: Store, chunk: str, line: dict, told: tuple[str, str], shown: bool
) -> dict[str, Any]:
    """A line about a record that was rejected when all were known."""
    found = {
        key: line[key] for key in ("name", "width", "height", "face", "quality") if key in line
    }
    found |= {"reason": told[0], "detail": told[1], "identity": line["identity"]}
    if shown:
        from tensorflow_datasets.proto import tf_example_pb2

        with work.reading(f"done/{chunk}.array_record") as path:
            reader = shard_reader(path)
            example = tf_example_pb2.Example.FromString(reader.read([line["row"]])[0])
            reader.close()
        photo = example.features.feature["photo"].bytes_list.value[0]
        with Image.open(io.BytesIO(photo)) as opened:
            found["thumbnail"] = thumbnail(np.asarray(opened))
    return found
