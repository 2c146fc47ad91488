"""`fact-train data`: what its commands take, and what they call."""

import argparse
import dataclasses
import sys
from pathlib import Path

from fact_jax.utils.errors import UserError, listed, printable
from fact_jax.utils.files import require_local
from fact_train.cli.data import add_engine, folder_path, read_engine, whole_number

_FORMATS = ("auto", "people", "flat", "table", "parquet", "tar")


def add_data(commands: argparse._SubParsersAction) -> None:
    """The command ``data`` and its own."""
    data = commands.add_parser(
        "data",
        help="photographs to records to train on: build, verify, split, merge, remove, report",
        description="From photographs to a set of records: a tensorflow_datasets folder.",
    )
    what = data.add_subparsers(dest="action", required=True)
    _add_build(what)
    verify = what.add_parser(
        "verify",
        help="read every record",
        description="Read every record of a set (shards, pictures, people, counts) or of a cache.",
    )
    verify.add_argument("set", type=_folder, metavar="OUT")
    merge = what.add_parser(
        "merge",
        help="several sets to one",
        description="Write the records of several sets of the same sizes as one. People of one "
        "name are one person.",
    )
    merge.add_argument("sets", type=_folder, nargs="+", metavar="SET")
    merge.add_argument("--to", type=_folder, required=True, metavar="DIR", help="a new folder")
    split = what.add_parser(
        "split",
        help="set other people apart",
        description="Write a set anew with other splits, by people.",
    )
    split.add_argument("set", type=_folder, metavar="SET")
    split.add_argument("--to", type=_folder, required=True, metavar="DIR", help="a new folder")
    _add_split(split)
    remove = what.add_parser(
        "remove",
        help="a person withdraws consent",
        description="Take a person out of a set: records, lines and thumbnails, and the same rows "
        "of caches that `fact-train cache` made of it. A line in log.jsonl stays, with the SHA-256 "
        "of the name.",
    )
    remove.add_argument("set", type=_folder, metavar="OUT")
    remove.add_argument("--person", required=True, metavar="ID")
    remove.add_argument(
        "--cache", type=_folder, action="append", default=[], metavar="DIR", help="of the set"
    )
    report = what.add_parser(
        "report",
        help="one page to look at",
        description="Write OUT/report.html, one page that opens offline: photos with points, masks "
        "and crops, histograms, what was rejected and why, copies and mixed-up people.",
    )
    report.add_argument("set", type=_folder, metavar="OUT")
    report.add_argument("--photos", type=whole_number, default=24, metavar="N", help="shown (24)")
    for action in (merge, split, remove):
        action.add_argument("--shard-mb", type=float, default=256.0, metavar="MB", help="(256)")


def _add_build(what: argparse._SubParsersAction) -> None:
    build = what.add_parser(
        "build",
        help="write photos as records",
        description="Write the photos of SOURCE as records into OUT, with rejected.jsonl (why a "
        "photo is none), suspects.jsonl, a card, and summary.json, which comes last. Stopped or "
        "killed, the same command goes on. The exit status is 1 if one face is in two splits.",
        epilog="SOURCE: a folder with a subfolder for each person (people); a folder of photos "
        "(flat); a table of images that are files: .jsonl, .csv, a Hugging Face folder with "
        "metadata.jsonl, a .json list as IP-Adapter takes (table); Parquet with the images inside; "
        "WebDataset .tar shards as of img2dataset. Beside a photo NAME.jpg, or in its tar: "
        "NAME.points.json or NAME.json (five points), NAME.mask.png (the head, grey), NAME.txt "
        "(caption), NAME.quality.txt, NAME.embedding.npy. Columns of those roles, and identity, "
        "licence, source and consent, do the same. What neither says, a model says that is named.",
    )
    build.add_argument(
        "source", metavar="SOURCE", help="folder or file, or URL of one (gs://, s3://)"
    )
    build.add_argument("folder", metavar="OUT", help="new folder, or URL of one")
    build.add_argument("--format", choices=_FORMATS, default="auto", help="of SOURCE (auto)")
    build.add_argument("--root", metavar="DIR", help="of a table's images (the table's folder)")
    build.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help="a column by its role: image, identity, caption, points, mask, quality, embedding, "
        "licence, source, consent",
    )
    build.add_argument("--size", type=whole_number, default=512, help="side of the photos (512)")
    build.add_argument("--crop", type=whole_number, default=112, help="side of the crops (112)")
    build.add_argument(
        "--buckets",
        type=whole_number,
        metavar="STEP",
        help="keep about the photos' aspect ratio: sides in multiples of STEP (64 for SD 1.5), "
        "area of --size squared (default: squares)",
    )
    models = build.add_argument_group("models, from local files; none is ever downloaded")
    for role, text in (
        ("detector", "SCRFD, RetinaFace or YuNet (.onnx, or an insightface pack's folder)"),
        ("parser", "BiSeNet with CelebAMask-HQ's 19 labels (.onnx)"),
        ("quality", "eDifFIQA or CR-FIQA (.onnx)"),
        ("embedder", "a recognition network in ArcFace's layout (.onnx)"),
        ("captioner", "a BLIP folder"),
    ):
        models.add_argument(f"--{role}", metavar="PATH", help=text)
    models.add_argument("--provider", choices=("cpu", "cuda"), default="cpu", help="of them (cpu)")
    models.add_argument("--batch", type=whole_number, default=16, help="photos at once (16)")
    choice = build.add_argument_group("which photos")
    choice.add_argument(
        "--gate",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="at least: face (24 px), sharpness, score, quality; at most: clipped, second, yaw, "
        "pitch, roll (degrees)",
    )
    choice.add_argument(
        "--duplicates",
        type=float,
        default=0.22,
        metavar="SHARE",
        help="of the bits of two copies' hashes that may differ (0.22)",
    )
    choice.add_argument(
        "--same-face", type=float, default=0.5, metavar="COS", help="of one person, at least (0.5)"
    )
    choice.add_argument(
        "--other-face",
        type=float,
        default=0.2,
        metavar="COS",
        help="a person's photo below it to the others is told of (0.2)",
    )
    choice.add_argument(
        "--min-photos", type=whole_number, default=1, metavar="N", help="a person (1)"
    )
    _add_split(choice)
    run = build.add_argument_group("how")
    add_engine(run)
    run.add_argument("--chunk", type=whole_number, default=64, help="photos a piece of work (64)")
    run.add_argument("--shard-mb", type=float, default=256.0, metavar="MB", help="a shard (256)")
    run.add_argument(
        "--force",
        action="store_true",
        help="replace what a build wrote in OUT, once all is ready to be written",
    )
    run.add_argument("--keep-work", action="store_true", help="keep OUT/work")


def _add_split(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help="people set apart, as validation=0.02; the rest is train",
    )


def run_data(arguments: argparse.Namespace) -> int:
    """``fact-train data``."""
    if arguments.action == "build":
        return _build(arguments)
    for given in vars(arguments).values():
        for folder in given if isinstance(given, list) else [given]:
            if isinstance(folder, Path):
                require_local(folder)
    if arguments.action == "report":
        from fact_train.prepare.product.report import write_report

        print(write_report(arguments.set, arguments.photos))
        return 0
    from fact_train.prepare.product import curate

    if arguments.action == "verify" and (arguments.set / "face_cache").is_dir():
        from fact_train.data.cached_dataset import verify_cache

        print(f"{arguments.set}: whole; a cache of {verify_cache(arguments.set)} records")
        return 0
    if arguments.action == "verify":
        from fact_train.prepare.product.verify import verify

        counts = verify(arguments.set)
        print(f"{arguments.set}: whole; {', '.join(f'{n} {name}' for name, n in counts.items())}")
        return 0
    megabytes = arguments.shard_mb
    if not 0 < megabytes < 1e6:
        raise UserError(f"--shard-mb {megabytes:g}: give megabytes above 0")
    if arguments.action == "remove":
        count, same = curate.remove(
            arguments.set, arguments.person, arguments.cache, megabytes=megabytes
        )
        print(f"{arguments.set}: {count} records removed")
        _warn_of_empty(["train"], curate.open_product(arguments.set))
        if same:
            print(
                printable(
                    f"note: the same pictures stay under other names: {listed(same)}: remove these "
                    "people too, or build again without the photos"
                )
            )
        return 0
    splits: dict[str, float] = {}
    if arguments.action == "merge":
        about = curate.merge(arguments.sets, arguments.to, megabytes=megabytes)
        if names := curate.made_up_twice(arguments.sets):
            print(
                printable(
                    f"warning: {len(names)} names, as {names[0]}, are of people without a label in "
                    "several of the sets: they are one person now, build the photos as one set"
                ),
                file=sys.stderr,
            )
        if count := curate.held_twice(arguments.sets):
            line = f"warning: {count} photos are in several of the sets (by SHA-256): all are kept"
            print(line, file=sys.stderr)
    else:
        splits = _splits(arguments)
        about = curate.split(arguments.set, arguments.to, splits, megabytes=megabytes)
    print(f"{arguments.to}: {about['in'] - about['rejected']} records")
    _warn_of_empty(["train", *splits], curate.open_product(arguments.to))
    return _alarm(about)


def _build(arguments: argparse.Namespace) -> int:
    for name, value in (("SOURCE", arguments.source), ("OUT", arguments.folder)):
        if not value.strip():
            raise UserError(f"{name} is empty: name a folder or URL")
    from fact_train.prepare.build import build
    from fact_train.prepare.settings import BuildSettings, Gates

    given = {
        name: getattr(arguments, name)
        for name in (
            *("source", "format", "root", "size", "crop", "buckets", "detector", "parser"),
            *("quality", "embedder", "captioner", "provider", "batch", "chunk", "duplicates"),
            *("same_face", "other_face", "min_photos"),
        )
    }
    gates = {name: _number(text, "--gate") for name, text in _pairs(arguments.gate, "--gate")}
    known = [field.name for field in dataclasses.fields(Gates)]
    for name in gates:
        if name not in known:
            raise UserError(f"--gate {name}: known are {', '.join(known)}")
    splits = _splits(arguments)
    try:
        settings = BuildSettings(
            **given,
            columns=dict(_pairs(arguments.column, "--column")),
            gates=Gates(**gates),
            splits=splits,
            shard_megabytes=arguments.shard_mb,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    built = build(
        settings,
        arguments.folder,
        read_engine(arguments),
        force=arguments.force,
        keep_work=arguments.keep_work,
    )
    summary = built.summary
    told = "" if built.fresh else " (it was there already)"
    print(
        f"{arguments.folder}: {summary['in']} photos in, {summary['records']} records of "
        f"{summary['people']} people, {summary['rejected']} rejected{told}"
    )
    for title, found in (("rejected", summary["reasons"]), ("ignored files", summary["ignored"])):
        if found:
            parts = ", ".join(f"{count} {name}" for name, count in found.items())
            print(printable(f"{title}: {parts}"))
    _warn_of_empty(["train", *splits], summary)
    for kind, count in summary["suspects"].items():
        print(f"to look at: {count} of the kind '{kind}', in suspects.jsonl")
    return _alarm(summary)


def _warn_of_empty(splits: list[str], summary: dict) -> None:
    if empty := [name for name in splits if name not in summary["splits"]]:
        line = f"warning: nobody is in {' and '.join(empty)}: give other shares, or more people"
        print(line, file=sys.stderr)


def _alarm(summary: dict) -> int:
    if summary["alarms"]:
        line = f"warning: {summary['alarms']} times one face may be in two splits: suspects.jsonl"
        print(line, file=sys.stderr)
        return 1
    return 0


def _splits(arguments: argparse.Namespace) -> dict[str, float]:
    from fact_train.prepare.settings import check_splits

    splits = {name: _number(text, "--split") for name, text in _pairs(arguments.split, "--split")}
    try:
        check_splits(splits)
    except ValueError as error:
        raise UserError(str(error)) from None
    return splits


def _pairs(texts: list[str], option: str) -> list[tuple[str, str]]:
    for text in texts:
        if "=" not in text.strip("="):
            raise UserError(f"{option} {text}: give NAME=VALUE")
    names = [text.partition("=")[0] for text in texts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{option} {twice[0]} is given twice")
    return [(text.partition("=")[0], text.partition("=")[2]) for text in texts]


def _folder(text: str) -> Path:
    """A folder of this machine: a path, or its ``file://`` URL."""
    return folder_path(text.removeprefix("file://"))


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option}: {text} is no number") from None
