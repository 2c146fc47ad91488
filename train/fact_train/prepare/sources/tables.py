"""Tables of photos: JSONL, CSV, a JSON list (as IP-Adapter takes), Parquet with images inside."""

import csv
import functools
import io
import itertools
import json
import posixpath
from collections.abc import Callable, Collection, Iterator
from typing import Any

from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError, listed
from fact_train.prepare.settings import ROLES, BuildSettings, RejectedError
from fact_train.prepare.sources.files import MAX_BYTES, Listings
from fact_train.prepare.store import Store

ENDINGS = (".jsonl", ".json", ".csv")
_MAX_CELL = 16 << 20
METADATA = ("metadata.jsonl", "metadata.csv")
"""Of a Hugging Face image folder."""


def folder_of(store: Store) -> str:
    """The folder that a table's names of images are in."""
    if store.fs.isdir(store.root):
        return store.url
    folder, slash, _ = store.url.rpartition("/")
    return folder or slash or "."


def list_table(store: Store, settings: BuildSettings) -> Iterator[dict]:
    """A row for each row of a table whose images are files. UserError without their folder."""
    if settings.root:
        root = Store(settings.root)
        if not root.fs.isdir(root.root or "/"):
            raise UserError(f"--root {settings.root} is no folder")
    images = Store(settings.root or folder_of(store))
    listings = Listings(images)
    if store.fs.isdir(store.root):
        there = [name for name in METADATA if store.exists(name)]
        if not there:
            raise UserError(f"{store.url} holds no {' or '.join(METADATA)}")
        store = Store(f"{store.url.rstrip('/')}/{there[0]}")
    where, columns = store.url.rsplit("/", 1)[-1], set[str]()
    for number, row in enumerate(_rows(store)):
        name = f"{where}:{number}"
        if isinstance(row, str):
            yield {"path": name, "problem": ("row", f"{name}: {row}")}
            continue
        columns.update(row)
        check_identity(row.keys(), settings, name)
        fields = fields_of(row, settings)
        path = fields.pop("image", None)
        if not isinstance(path, str) or not path:
            wanted = " or ".join(settings.columns_of("image"))
            yield {"path": name, "problem": ("row", f"{name} names no image: {wanted} is needed")}
            continue
        path = _inside(path, images)
        if isinstance(mask := fields.get("mask"), str):
            fields["mask"] = _inside(mask, images)
        outside = [one for one in (path, fields.get("mask")) if leads_out(one)]
        if outside:
            text = f"{name}: {outside[0]} lies outside the folder of the images; give --root"
            yield {"path": name, "problem": ("row", text)}
            continue
        beside = listings.side_files(path)
        named = [path, *(path.rsplit(".", 1)[0] + end for end in beside)]
        if isinstance(fields.get("mask"), str):
            named.append(fields["mask"])
        about = [listings.state(one) for one in named]
        yield {"path": path, "beside": beside, "about": about, "fields": fields}
    check_columns(columns, settings, where)


def check_columns(there: Collection[str], settings: BuildSettings, where: str) -> None:
    """UserError for a column that was named and that a table does not have."""
    for role, column in settings.columns.items():
        if column not in there:
            raise UserError(
                f"--column {role}={column}: {where} has no such column, only "
                f"{listed(sorted(there))}"
            )


def check_identity(there: Collection[str], settings: BuildSettings, where: str) -> None:
    """UserError where people would be lost by another spelling of their column."""
    names, others = settings.columns_of("identity"), {*there} - {*settings.columns.values()}
    alike = sorted(name for name in others if name.strip().casefold() in names)
    if alike and not {*names} & {*there}:
        raise UserError(
            f"{where}: is the column {alike[0]!r} the identity? Then give --column "
            f"'identity={alike[0]}', else another name to the column"
        )


def _inside(path: str, images: Store) -> str:
    """A name in the folder of the images, of an absolute path too; a URL is left as it is."""
    if "://" in path:
        return path
    return posixpath.normpath(path).removeprefix(images.root.rstrip("/") + "/")


def leads_out(path: Any) -> bool:
    """Whether the name of a file is of one that is not under the images' folder."""
    return isinstance(path, str) and (
        path.startswith(("/", "../")) or "://" in path or path == ".."
    )


def _rows(store: Store) -> Iterator[dict | str]:
    """Rows, or what is wrong with one."""
    with store.fs.open(store.root, "rb") as opened:
        if store.root.endswith(".json"):
            try:
                rows = json.load(opened)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{store.url} is not JSON: {one_line(error)}") from None
            if not isinstance(rows, list):
                raise UserError(f"{store.url} is not a list of objects")
            yield from (row if isinstance(row, dict) else "it is no object" for row in rows)
        elif store.root.endswith(".csv"):
            text = io.TextIOWrapper(
                opened, encoding="utf-8-sig", errors="surrogateescape", newline=""
            )
            csv.field_size_limit(_MAX_CELL)
            first = next(text, "")
            # Spaces after commas are no part of the cells where the first line has them too.
            rows = csv.DictReader(
                itertools.chain([first], text), strict=True, skipinitialspace=", " in first
            )
            ended = False
            names = _header(rows, store)
            check_unique_columns(names, store)
            while not ended:  # what is wrong with one row is not with the next
                line = rows.reader.line_num
                try:
                    row = next(rows, None)
                    ended = row is None
                    if row is None:
                        continue
                    if None in row:
                        yield "it has more cells than the first line"
                    elif any(isinstance(cell, str) and not _is_utf8(cell) for cell in row.values()):
                        yield "it is not UTF-8 text"
                    else:
                        yield {key: value for key, value in row.items() if key}
                except csv.Error as error:
                    # Where a cell of several lines does not end, the next row may begin anywhere.
                    ended = "field limit" in str(error) and rows.reader.line_num > line + 1
                    yield f"it is not CSV: {one_line(error)}" + "; the rest is not read" * ended
        else:
            for line in filter(bytes.strip, opened):
                try:
                    row = json.loads(line)
                    yield row if isinstance(row, dict) else "it is no object"
                except (ValueError, RecursionError) as error:
                    yield f"it is not JSON: {one_line(error)}"


def check_unique_columns(names: list[str], store: Store) -> None:
    """UserError for two columns of one name."""
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise UserError(f"{store.url} has several columns named {listed(twice)}")


def _header(rows: csv.DictReader, store: Store) -> list[str]:
    try:
        return list(rows.fieldnames or ())
    except csv.Error as error:
        raise UserError(f"{store.url}: its first line is not CSV: {one_line(error)}") from None


def _is_utf8(text: str) -> bool:
    """Whether it was UTF-8 that was read with ``surrogateescape``."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def fields_of(row: dict[str, Any], settings: BuildSettings) -> dict[str, Any]:
    """The roles that a row's columns have, without those that are empty."""
    found = {}
    for role in ROLES:
        for column in settings.columns_of(role):
            value = row.get(column)
            blank = isinstance(value, str) and not value.strip()
            if value is not None and not blank and value == value:  # pandas writes NaN for nothing
                found[role] = value
                break
    for role in ("points", "embedding"):  # lists in the cell of a CSV file
        if isinstance(value := found.get(role), str):
            try:
                found[role] = json.loads(value)
            except (ValueError, RecursionError):
                continue  # said where the points are read
    return found


def list_parquet(shards: list[Store], settings: BuildSettings) -> Iterator[dict]:
    """A chunk for each row group; a file that cannot be opened is one item."""
    for store in shards:
        about = [store.fs.info(store.root).get(key) for key in ("size", "mtime", "ETag")]
        chunk: dict[str, Any] = {"file": store.url, "about": about}
        try:
            with store.fs.open(store.root, "rb") as opened:
                table = _parquet(opened)
                check_unique_columns(table.schema_arrow.names, store)
                check_columns(table.schema_arrow.names, settings, store.url)
                check_identity(table.schema_arrow.names, settings, store.url)
                groups = table.metadata
                rows = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        except (OSError, ValueError) as error:
            yield chunk | {"problem": ("damaged shard", f"{store.url}: {one_line(error)}")}
            continue
        start = 0
        for group, count in enumerate(rows):
            if count:
                yield chunk | {"group": group, "start": start, "count": count}
            start += count


def read_parquet(
    chunk: dict, settings: BuildSettings
) -> Iterator[tuple[str, dict, Callable[[], tuple[bytes, dict]]]]:
    """Name, what is said beforehand, and reader of each row of a row group."""
    file = chunk["file"].rsplit("/", 1)[-1]
    if "problem" in chunk:
        yield file, {}, functools.partial(_refuse, *chunk["problem"])
        return
    store, done = Store(chunk["file"]), 0
    try:
        with store.fs.open(store.root, "rb") as opened:
            table = _parquet(opened)
            wanted = {column for role in ROLES for column in settings.columns_of(role)}
            columns = [name for name in table.schema_arrow.names if name in wanted]
            for batch in table.iter_batches(
                settings.batch, row_groups=[chunk["group"]], columns=columns
            ):
                for row in range(batch.num_rows):
                    name, fields = f"{file}:{chunk['start'] + done}", {}
                    done += 1
                    try:
                        fields = fields_of(batch.slice(row, 1).to_pylist()[0], settings)
                    except ValueError as error:  # text that is not UTF-8
                        line = f"{name}: {one_line(error)}"
                        yield name, fields, functools.partial(_refuse, "row", line)
                        continue
                    yield name, fields, functools.partial(_parquet_row, fields, name, settings)
    except (OSError, ValueError, OverflowError) as error:
        text = one_line(error)
        for number in range(done, chunk["count"]):
            name = f"{file}:{chunk['start'] + number}"
            yield name, {}, functools.partial(_refuse, "damaged shard", f"{name}: {text}")


def _parquet(opened: Any) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"Parquet needs pyarrow ({one_line(error)}): pip install 'fact-jax[data]'"
        ) from None
    return pyarrow.parquet.ParquetFile(opened)


def _parquet_row(fields: dict, name: str, settings: BuildSettings) -> tuple[bytes, dict]:
    photo = fields.pop("image", None)
    if isinstance(photo, dict):  # as Hugging Face writes images
        photo = photo.get("bytes")
    if isinstance(fields.get("mask"), dict):
        fields["mask"] = fields["mask"].get("bytes")
    if not isinstance(photo, bytes):
        wanted = " or ".join(settings.columns_of("image"))
        raise RejectedError("row", f"{name} holds no bytes of an image in {wanted}")
    if len(photo) > MAX_BYTES:
        raise RejectedError("too large", f"{name} is too large: at most {MAX_BYTES >> 20} MB")
    return photo, fields


def _refuse(reason: str, detail: str) -> tuple[bytes, dict]:
    raise RejectedError(reason, detail)
