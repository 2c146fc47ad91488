"""Options that several commands of ``fact-convert`` share."""

import argparse
import contextlib
from pathlib import Path

_DTYPES = ("float32", "float16", "bfloat16")


def add_kinds(command: argparse.ArgumentParser) -> None:
    """Which weights are read where SRC holds several kinds of them."""
    command.add_argument("--variant", metavar="NAME", help="weight files of a variant, as fp16")
    command.add_argument(
        "--weights",
        choices=("ema", "params"),
        default="ema",
        help="of what holds both: the running average, or the parameters themselves (ema)",
    )


def add_merging(command: argparse.ArgumentParser) -> None:
    """How LoRAs are merged."""
    command.add_argument(
        "--scale",
        type=float,
        action="append",
        metavar="S",
        help="strength (1.0); of several LoRAs one for all, or repeated, one for each in turn",
    )
    command.add_argument("--remove", action="store_true", help="take out what S of them had added")


def add_out(command: argparse.ArgumentParser) -> None:
    """OUT and how it is written."""
    command.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="a file .safetensors or .ckpt (of an adapter the released layout, of a base the "
        "original one), .onnx of a face encoder, or a folder as diffusers has",
    )
    command.add_argument(
        "--format",
        choices=("diffusers", "original", "onnx", "file"),
        help="what OUT shall be, if not what its ending says; file: tensors as they are called",
    )
    add_dtype(command)
    command.add_argument(
        "--config",
        type=Path,
        metavar="DIR",
        help="for a folder: where configurations, tokenizer and scheduler are, if not in SRC",
    )
    command.add_argument(
        "--save-variant",
        metavar="NAME",
        help="for a folder: what its files are named after, as fp16",
    )
    command.add_argument(
        "--shard", type=_size, metavar="SIZE", help="for a folder: how large a file may be, as 2GB"
    )
    command.add_argument(
        "--legacy",
        action="store_true",
        help="for a folder: pickled .bin files, as before safetensors",
    )
    add_caution(command)


def add_dtype(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=_DTYPES, help="precision to round to (that of SRC)")


def _size(text: str) -> int:
    number = text.upper().removesuffix("B")
    unit = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    with contextlib.suppress(ValueError):
        size = float(number.rstrip("KMG")) * unit
        if 1 <= size < 2**63:
            return int(size)
    raise argparse.ArgumentTypeError(f"{text!a} is no size, as 2GB is")


def add_caution(command: argparse.ArgumentParser) -> None:
    """What may be replaced, and whether anything is written."""
    command.add_argument(
        "--force",
        action="store_true",
        help="replace OUT if it exists; a folder only if fact-convert wrote all that is in it",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be written"
    )


def add_adapter(command: argparse.ArgumentParser) -> None:
    """What an adapter needs beside its file."""
    add_head(command)
    command.add_argument(
        "--base",
        type=Path,
        metavar="BASE",
        help="of an adapter with copies of its base's norm2: leave out those that BASE has too",
    )


def add_head(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dim-head",
        type=int,
        metavar="N",
        help="width of a head in the adapter's resampler, if SRC does not say (released: 64)",
    )
