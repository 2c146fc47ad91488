"""A built set later: merged, split anew, without a person, verified."""

import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fact_convert.io.output_paths import check_folder
from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError, listed
from fact_jax.utils.files import folder_lock, recover, replace_folder, require_elsewhere
from fact_train.data.cached_dataset import cache_folder, check_records, drop_rows
from fact_train.data.dataset_files import shard_name, shard_reader, shard_writer
from fact_train.data.records import (
    check_sizes,
    fingerprint_files,
)
from fact_train.prepare.decide import MADE_UP, name_digest, split_of
from fact_train.prepare.product.dataset import (
    FOLDER,
    LOG,
    OURS,
    REJECTED,
    SUMMARY,
    SUSPECTS,
    Numbering,
    about_name,
    finish,
    removed_digests,
    write_lines,
    write_summary,
)
from fact_train.prepare.store import Store, json_line

Choose = Callable[[str, dict], str | None]
"""(split, line about a record) -> the split that it goes to, or None: it goes."""


def open_product(folder: Path) -> dict[str, Any]:
    """The summary of a built set of this machine; UserError if there is none."""
    if not (folder / SUMMARY).is_file():
        raise UserError(f"{folder} holds no whole set of `fact-train data build`: no {SUMMARY}")
    try:
        summary = json.loads((folder / SUMMARY).read_text("utf-8"))
        if not {"in", "records", "rejected", "splits", "size", "crop"} <= summary.keys():
            raise ValueError("it is of another kind")
        for key in ("splits", "reasons", "suspects", "models", "settings"):
            if not isinstance(summary.get(key, {}), dict):
                raise ValueError(f"its {key} are no object")
    except (ValueError, OSError, AttributeError) as error:
        raise UserError(f"{folder / SUMMARY} cannot be read: {one_line(error)}") from None
    wanted = (REJECTED, SUSPECTS, f"{FOLDER}/features.json")
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is not whole: it has no {listed(missing)}")
    check_sizes(folder / FOLDER)
    return summary


def read_records(folder: Path, summary: dict) -> Iterator[tuple[str, int, bytes, dict]]:
    """(split, shard, record, line about it) of a set, in order."""
    for split, about in summary["splits"].items():
        for shard in range(about["shards"]):
            path = folder / FOLDER / shard_name(shard, about["shards"], split)
            lines = list(Store(str(folder)).lines(about_name(split, shard)))
            try:
                reader = shard_reader(path)
                count = reader.num_records()
                if count != len(lines):
                    raise ValueError(f"{count} records, {len(lines)} lines about them")
                for start in range(0, count, 64):
                    numbers = range(start, min(start + 64, count))
                    some = reader.read(list(numbers))
                    for number, record in zip(numbers, some, strict=True):
                        yield split, shard, record, lines[number]
                reader.close()
            except (ValueError, RuntimeError, IndexError, OSError) as error:
                raise UserError(f"{path} is damaged: {one_line(error)}") from None


def read_lines(folder: Path, summary: dict) -> Iterator[dict]:
    """The lines about the records of a set, in order."""
    for split, about in summary["splits"].items():
        for shard in range(about["shards"]):
            yield from Store(str(folder)).lines(about_name(split, shard))


def rewrite(sources: Sequence[Path], out: Path, choose: Choose, *, megabytes: float) -> dict:
    """Write the records of some sets that ``choose`` keeps into ``out``, which is a new folder.

    Raises UserError where they differ in size, or none is kept.
    """
    summaries = [open_product(folder) for folder in sources]
    for folder in sources:
        if folder.resolve() in out.resolve().parents:
            raise UserError(f"{out.parent} lies in the set {folder}: name a folder beside it")
    for folder, summary in zip(sources, summaries, strict=True):
        for key in ("size", "crop"):
            if summary[key] != summaries[0][key]:
                raise UserError(
                    f"{folder} holds a {key} of {summary[key]}, {sources[0]} {summaries[0][key]}: "
                    "build them with the same sizes"
                )
    writers: dict[str, Any] = {}
    shards: dict[str, list[list[int]]] = {}
    people: dict[str, Numbering] = {}
    store = Store(str(out))
    (out / FOLDER).mkdir(parents=True)
    for folder, summary in zip(sources, summaries, strict=True):
        for split, _, record, line in read_records(folder, summary):
            wanted = choose(split, line)
            if wanted is None:
                continue
            some = shards.setdefault(wanted, [])
            if not some or some[-1][1] + len(record) > megabytes * 2**20:
                _close(writers.pop(wanted, None))
                writers[wanted] = _open(out, wanted, len(some))
                some.append([0, 0])
            writers[wanted][0].write(record)
            writers[wanted][1].write(json_line(line))
            some[-1][0] += 1
            some[-1][1] += len(record)
            people.setdefault(wanted, Numbering()).append(line["identity"])
    for writer in writers.values():
        _close(writer)
    if not people:
        raise UserError(f"{out}: no record is left")
    order = sorted(shards, key=lambda split: (split != "train", split))
    sizes: dict[str, list[tuple[int, int]]] = {}
    for split in order:
        sizes[split] = []
        for shard, (count, _) in enumerate(shards[split]):
            path = out / FOLDER / shard_name(shard, len(shards[split]), split)
            os.rename(out / FOLDER / f"{split}-{shard}", path)
            sizes[split].append((count, path.stat().st_size))
    about = _together(summaries)
    numbers = {split: people[split].numbers for split in order}
    about["in"] = sum(map(len, numbers.values())) + about["rejected"]
    finish(
        store,
        sizes,
        numbers,
        (summaries[0]["size"], summaries[0]["crop"]),
        about,
    )
    return about


def _open(out: Path, split: str, shard: int) -> tuple[Any, Any]:
    lines = out / about_name(split, shard)
    lines.parent.mkdir(exist_ok=True)
    return shard_writer(out / FOLDER / f"{split}-{shard}"), open(lines, "w", encoding="utf-8")


def _close(writer: tuple[Any, Any] | None) -> None:
    for part in writer or ():
        part.close()


def _together(summaries: Sequence[dict]) -> dict[str, Any]:
    """The summaries' counts added up, models and settings side by side."""
    about: dict[str, Any] = {}
    for key in ("rejected", "removed", "alarms"):
        about[key] = sum(summary.get(key, 0) for summary in summaries)
    for key in ("reasons", "ignored", "suspects"):
        added: Counter[str] = Counter()
        for summary in summaries:
            added.update(summary.get(key, {}))
        about[key] = dict(added.most_common())
    about["models"] = {}
    for summary in summaries:
        for role, model in summary.get("models", {}).items():
            known = list(about["models"].values())
            if model not in known:
                name = role if role not in about["models"] else f"{role} {len(known)}"
                about["models"][name] = model
    one = len(summaries) == 1
    settings = [summary.get("settings", {}) for summary in summaries]
    about["settings"] = settings[0] if one else {"of": settings}
    about["fingerprint"] = "+".join(str(summary.get("fingerprint")) for summary in summaries)
    return about


def merge(sources: Sequence[Path], out: Path, *, megabytes: float) -> dict[str, Any]:
    """One set of several; people of one name are one person. Gives the summary."""
    check_folder(out, force=None)
    if len({folder.resolve() for folder in sources}) < len(sources):
        raise UserError("one set is named twice")
    seen: dict[str, str] = {}
    removed = {one for folder in sources for one in removed_digests(Store(str(folder)))}

    def refuse_removed(person: str) -> None:
        if name_digest(person) in removed and not _made_up(person):
            raise UserError(
                f"{person} was removed from one of these sets and is in another: remove the person "
                "there too (fact-train data remove), then merge"
            )

    def choose(split: str, line: dict) -> str:
        refuse_removed(line["identity"])
        before = seen.setdefault(line["identity"], split)
        if before != split:
            raise UserError(
                f"{line['identity']} is in the splits {before} and {split}: split anew "
                "(fact-train data split), or merge sets that are split alike"
            )
        return split

    for folder in sources:
        open_product(folder)
        for line in Store(str(folder)).lines(REJECTED):
            refuse_removed(str(line.get("identity", "")))
    with replace_folder(out, replace=False) as temporary:
        about = rewrite(sources, temporary, choose, megabytes=megabytes)
        for name in (REJECTED, SUSPECTS, LOG):
            found = (
                Store(str(folder)).lines(name) for folder in sources if (folder / name).is_file()
            )
            write_lines(Store(str(temporary)), name, (line for some in found for line in some))
    return about


def made_up_twice(sources: Sequence[Path]) -> list[str]:
    """Names that ``data build`` gave people without a label, in several sets: of different people.

    A label may be such a name too.
    """
    found: Counter[str] = Counter()
    for folder in sources:
        records = read_lines(folder, open_product(folder))
        names = {line["identity"] for line in records}
        found.update(filter(_made_up, names))
    return sorted(name for name, count in found.items() if count > 1)


def _made_up(name: str) -> bool:
    return MADE_UP.fullmatch(name) is not None or name.startswith("only ")


def held_twice(sources: Sequence[Path]) -> int:
    """How many photos several sets hold, by the SHA-256 of the files that they were built from."""
    found: Counter[str] = Counter()
    for folder in sources:
        found.update({line["sha256"] for line in read_lines(folder, open_product(folder))})
    return sum(count > 1 for count in found.values())


def split(source: Path, out: Path, splits: dict[str, float], *, megabytes: float) -> dict[str, Any]:
    """The same records, with other people set apart."""
    check_folder(out, force=None)
    with replace_folder(out, replace=False) as temporary:
        about = rewrite(
            [source],
            temporary,
            lambda _, line: split_of(line["identity"], splits),
            megabytes=megabytes,
        )
        store, old = Store(str(temporary)), Store(str(source))
        write_lines(store, REJECTED, old.lines(REJECTED))
        alarms = 0

        def suspects() -> Iterator[dict]:
            nonlocal alarms
            for line in old.lines(SUSPECTS):
                found = sorted({split_of(name, splits) for name in line["people"]})
                alarms += len(found) > 1
                yield line | {"splits": found, "alarm": len(found) > 1}

        write_lines(store, SUSPECTS, suspects())
        if (source / LOG).is_file():
            shutil.copyfile(source / LOG, temporary / LOG)
        summary = json.loads((temporary / SUMMARY).read_text("utf-8")) | {"alarms": alarms}
        summary["settings"] |= {"splits": splits}
        summary["fingerprint"] += f" split {json.dumps(splits, sort_keys=True)}"
        write_summary(store, summary)
    return about | {"alarms": alarms}


def remove(
    folder: Path, person: str, caches: Sequence[Path], *, megabytes: float
) -> tuple[int, list[str]]:
    """Take a person out of a set and its caches; how many records went, and which are as theirs.

    The second are photos under other names that the build found to be the same pictures: they stay.

    Nothing of them is left: records, lines, thumbnails; the log keeps when it was, how many
    records, and the SHA-256 of the name, so that a second request can be answered.
    """
    folder = folder.resolve()  # else what a link names would stay
    for written in (folder, *map(cache_folder, caches)):  # a killed removal may have left them
        require_elsewhere(written)
        recover(written)
    summary = open_product(folder)
    with folder_lock(folder, keep=False):
        return _remove(folder, summary, person, caches, megabytes)


def _remove(
    folder: Path, summary: dict, person: str, caches: Sequence[Path], megabytes: float
) -> tuple[int, list[str]]:
    for name in OURS:
        recover(folder / name)
    strange = {path.name for path in folder.iterdir()} - {*OURS, ".lock"}
    if strange:
        raise UserError(
            f"{folder} is written anew, and holds {listed(sorted(strange))}, which no build wrote: "
            "move that elsewhere"
        )
    gone: list[int] = []
    names: set[str] = set()
    for number, line in enumerate(read_lines(folder, summary)):
        if line["identity"] == person:
            gone.append(number)
            names.add(line["name"])

    rejected = sum(line.get("identity") == person for line in Store(str(folder)).lines(REJECTED))
    log = (folder / LOG).read_text("utf-8") if (folder / LOG).is_file() else ""
    digest = name_digest(person)
    if not gone and not rejected:
        raise UserError(
            f"{folder} holds nobody of the name {person}"
            + (
                ": removed before; a cache that was not named then is to be written again"
                if digest in log
                else ""
            )
        )
    if len(gone) == summary["records"]:
        raise UserError(f"{person} is everybody in {folder}: remove the folder")
    # Caches hold the records of train, which are the first, in their order.
    trained = summary["splits"].get("train", {}).get("records", 0)
    rows = [number for number in gone if number < trained]
    if caches and rows and len(rows) == trained:
        raise UserError(
            f"{person} is everybody in train, nothing would be left in {listed(map(str, caches))}: "
            "remove that folder, and give no --cache"
        )
    before = fingerprint_files(folder / FOLDER)
    with replace_folder(folder) as temporary:
        rewrite(
            [folder],
            temporary,
            lambda split, line: None if line["identity"] == person else split,
            megabytes=megabytes,
        )
        store, old = Store(str(temporary)), Store(str(folder))
        reasons: Counter[str] = Counter()

        def kept() -> Iterator[dict]:
            for line in old.lines(REJECTED):
                if line.get("identity") != person:
                    reasons[line["reason"]] += 1
                    yield line

        count = write_lines(store, REJECTED, kept())
        suspects, same = [], []
        for line in old.lines(SUSPECTS):
            if person not in line["people"] and not names & {*line["photos"]}:
                suspects.append(line)
            elif line["kind"] == "same picture":
                pairs = zip(line["photos"], line["people"], strict=True)
                same += [f"{name} of {who}" for name, who in pairs if who != person]
        write_lines(store, SUSPECTS, suspects)
        found = json.loads((temporary / SUMMARY).read_text("utf-8"))
        found |= {
            "in": found["records"] + count,
            "rejected": count,
            "reasons": dict(reasons.most_common()),
            "removed": summary.get("removed", 0) + len(gone),
            "suspects": dict(Counter(line["kind"] for line in suspects)),
            "alarms": sum(line["alarm"] for line in suspects),
        }
        write_summary(store, found)
        entry = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "what": "a person was removed",
            "person_sha256": digest,
            "records": len(gone),
            "rejected": rejected,
            "caches": len(caches),
        }
        store.write(LOG, log + json_line(entry))
        # Before the records go, so that a killed removal is made whole by another.
        after = fingerprint_files(temporary / FOLDER)
        for change in (check_records, functools.partial(drop_rows, gone=rows)):
            for cache in caches:  # all are looked at before one is changed
                change(cache, before=before, after=after)
    return len(gone), sorted({*same})
