"""`fact-train records` and `fact-train cache`: what they take, and what they call."""

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from fact_jax.utils.errors import UserError

if TYPE_CHECKING:
    from fact_train.prepare.engine import Engine

_SPLITS = ("base", "encoder", "adapter", "judge", "test")


def add_records(commands: argparse._SubParsersAction) -> None:
    """The command ``records``."""
    records = commands.add_parser(
        "records",
        help="write made-up people as records to train on",
        description="Write photos, masks, crops, points and captions as a tensorflow_datasets "
        "folder of array_record shards. For your own photos: fact-train data build.",
    )
    sources = records.add_subparsers(dest="source", required=True)
    portraits = sources.add_parser(
        "portraits",
        help="made-up people",
        description="Write portraits of made-up people.",
    )
    portraits.add_argument("--people", type=whole_number, required=True, metavar="N")
    portraits.add_argument(
        "--photos", type=whole_number, default=4, metavar="M", help="of each (4)"
    )
    portraits.add_argument(
        "--split", choices=_SPLITS, default="adapter", help="which people (adapter)"
    )
    portraits.add_argument(
        "--out", type=folder_path, required=True, metavar="DIR", help="a new folder"
    )
    portraits.add_argument("--size", type=whole_number, default=64, help="side of the photos (64)")
    portraits.add_argument("--crop", type=whole_number, default=48, help="side of the crops (48)")
    portraits.add_argument("--force", action="store_true", help="replace DIR if it is there")


def add_cache(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """The command ``cache``, but for the experiment that it takes."""
    cache = commands.add_parser(
        "cache",
        help="encode an experiment's records once, instead of in every step",
        description="Encode the records of an experiment (options.records): latents, text and face "
        "tokens. Started again it goes on; train with options.cache=DIR.",
    )
    cache.add_argument(
        "--out", type=folder_path, required=True, metavar="DIR", help="the cache's folder"
    )
    cache.add_argument(
        "--shard",
        type=_share,
        default=(0, 1),
        metavar="i/n",
        help="this process's share of the shards, i from 0 to n - 1, where several write at once",
    )
    add_engine(cache)
    return cache


def add_engine(parser: argparse._ActionsContainer) -> None:
    """Where pieces of work are done."""
    parser.add_argument(
        "--workers", type=whole_number, default=1, metavar="N", help="processes here (1), by Beam"
    )
    parser.add_argument(
        "--beam", metavar="OPTIONS", help="Beam's own, as --beam='--runner=DataflowRunner ...'"
    )


def run_records(arguments: argparse.Namespace) -> int:
    """``fact-train records``."""
    from fact_train.data.portraits import portrait_examples
    from fact_train.data.record_writer import write_records

    sizes = {"size": arguments.size, "crop_size": arguments.crop}
    examples = portrait_examples(arguments.split, arguments.people, arguments.photos, **sizes)
    photos, people = write_records(examples, arguments.out, force=arguments.force, **sizes)
    print(f"{arguments.out}: {photos} photos of {people} people")
    return 0


def run_cache(arguments: argparse.Namespace) -> int:
    """``fact-train cache``."""
    from fact_train.config import load_config
    from fact_train.overrides import override

    out, config = arguments.out, override(load_config(arguments.config)[1], arguments.override)
    records = getattr(config.options, "records", None)
    if records is None:
        raise UserError(
            f"the experiment {arguments.config} has no records to encode: set options.records to a "
            "folder that `fact-train data build` or `fact-train records` wrote"
        )

    from fact_jax.ops.precision import matmul_precision
    from fact_train.prepare.encode import encode_all

    parts = (str(config.options.base), str(config.options.encoder), str(records), str(out))
    writer = encode_all(parts, arguments.shard, read_engine(arguments))
    with matmul_precision("float32"):
        complete = writer.complete(print)
    if complete:
        print(f"{out}: all {len(writer.paths)} shards are there; train with options.cache={out}")
    return 0


def read_engine(arguments: argparse.Namespace) -> "Engine":
    """What ``--workers`` and ``--beam`` name; UserError for options that no shell would split."""
    from fact_train.prepare.engine import Engine

    try:
        options = tuple(shlex.split(arguments.beam or ""))
    except ValueError as error:
        raise UserError(f"--beam {arguments.beam}: {error}") from None
    return Engine(arguments.workers, options, progress=True)


def folder_path(text: str) -> Path:
    """A folder's path."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: name a folder")
    return Path(text)


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _share(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form i/n with i from 0 to n - 1")
    return int(found[1]), int(found[2])
