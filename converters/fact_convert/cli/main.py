"""fact-convert: look into weights, move them between PyTorch and JAX, compare them."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fact_convert.cli.options import (
    add_adapter,
    add_caution,
    add_dtype,
    add_head,
    add_kinds,
    add_merging,
    add_out,
)
from fact_jax.utils.command_line import ArgumentParser, add_version
from fact_jax.utils.errors import UserError, listed, printable, run_program

if TYPE_CHECKING:  # imported where they are used, so that --help is quick
    from fact_convert.cli.opening import Weights

_SHOWN = 10


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit status: 0 done, 1 weights differ, 2 bad input."""

    def run() -> int:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)

    return run_program(run)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="fact-convert", description=__doc__)
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    text = "say what a file or folder of weights is"
    inspect = _command(commands, "inspect", _inspect, text, source="FILE|DIR")
    inspect.add_argument(
        "--sha256", action="store_true", help="sums of every part and of every weight file, too"
    )

    torch = _command(commands, "to-torch", _to_torch, "write weights as PyTorch code opens them")
    add_out(torch)
    add_adapter(torch)

    jax = _command(commands, "to-jax", _to_jax, "write weights as a checkpoint of JAX arrays")
    jax.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    add_dtype(jax)
    add_head(jax)
    add_caution(jax)

    text = "add LoRAs to a base, or take them out"
    merge = _command(commands, "merge-lora", _merge_lora, text, source="BASE")
    merge.add_argument(
        "lora", type=Path, nargs="+", metavar="LORA", help="of kohya, LyCORIS, diffusers or peft"
    )
    add_out(merge)
    add_merging(merge)

    text = "write a LoRA in another layout"
    convert = _command(commands, "convert-lora", _convert_lora, text, kinds=False)
    convert.add_argument(
        "out", type=Path, metavar="OUT", help="a file .safetensors; in peft's layout a folder"
    )
    convert.add_argument("--format", choices=("kohya", "diffusers", "peft"), required=True)
    add_caution(convert)

    text = "write the adapter alone, out of whatever holds one"
    extract = _command(commands, "extract", _extract, text)
    add_out(extract)
    add_adapter(extract)

    text = "compare the numbers of two files or folders of any format"
    verify = _command(commands, "verify", _verify, text, source="A")
    verify.add_argument("other", type=Path, metavar="B")
    verify.add_argument(
        "--tolerance", type=float, default=0.0, metavar="T", help="largest difference allowed (0)"
    )
    return parser


def _command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    *,
    source: str = "SRC",
    kinds: bool = True,
) -> argparse.ArgumentParser:
    """A command that reads ``source``; with ``kinds``, one of several kinds of weights in it."""
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run)
    command.add_argument("source", type=Path, metavar=source)
    if kinds:
        add_kinds(command)
    command.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return command


def _open(path: Path, arguments: argparse.Namespace) -> "Weights":
    from fact_convert.cli.opening import open_weights

    return open_weights(path, variant=arguments.variant, weights=arguments.weights)


def _inspect(arguments: argparse.Namespace) -> int:
    from fact_convert.cli.inspection import summary

    about = summary(_open(arguments.source, arguments), sums=arguments.sha256)
    if arguments.json:
        print(json.dumps(about, indent=2))
        return 0
    for name, value in about.items():
        if not isinstance(value, dict):
            _say(f"{name + ':':14s}{_sentence(value)}")
            continue
        if name != "parts":
            _say(f"{name}:")
        for key, entry in value.items():
            start = f"{key + ':':14s}" if name == "parts" else f"  {key + ':':20s} "
            _say(start + _sentence(entry))
    return 0


def _say(text: str, file=None) -> None:
    """Print a line with control characters escaped, since it may quote a file."""
    print(printable(text), file=file)


def _sentence(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_sentence(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        more = f" and {len(value) - _SHOWN:,} more (--json)" if len(value) > _SHOWN else ""
        return " ".join(map(str, value[:_SHOWN])) + more
    counted = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if counted else str(value)


def _to_torch(arguments: argparse.Namespace) -> int:
    _check_torch_out(arguments, [arguments.source, arguments.base])
    return _write_adapter(arguments, _open(arguments.source, arguments))


def _merge_lora(arguments: argparse.Namespace) -> int:
    import dataclasses

    from fact_convert.lora import merge_loras, read_lora

    scales, count = arguments.scale or [1.0], len(arguments.lora)
    if len(scales) not in (1, count):
        raise UserError(f"{len(scales)} --scale for {count} LoRAs: give one, or one for each")
    scales = scales * count if len(scales) == 1 else scales
    _check_torch_out(arguments, [arguments.source, *arguments.lora])
    weights = _open(arguments.source, arguments)
    loras = [(read_lora(path), scale) for path, scale in zip(arguments.lora, scales, strict=True)]
    states = merge_loras(weights.states, loras, arguments.dtype, remove=arguments.remove)
    done = "taken out" if arguments.remove else "added"
    notes = [
        f"{lora.path}: {lora.algorithm}, {len(lora.layers)} layers {done} at {scale:g}"
        for lora, scale in loras
    ]
    weights = dataclasses.replace(weights, states=states, also=tuple(arguments.lora))
    return _write(arguments, weights, notes)


def _convert_lora(arguments: argparse.Namespace) -> int:
    from fact_convert.lora import read_lora, save_lora

    folder = arguments.format == "peft" and arguments.out.suffix != ".safetensors"
    _check_out(arguments, [arguments.source], folder=folder)
    lora = read_lora(arguments.source)
    how = {"force": arguments.force, "dry_run": arguments.dry_run}
    save_lora(lora, arguments.out, arguments.format, **how)
    kind = f"{lora.algorithm} of {len(lora.layers)} layers"
    return _done(arguments, kind, arguments.format, [])


def _extract(arguments: argparse.Namespace) -> int:
    from fact_convert.cli.adapters import extract_adapter

    _check_torch_out(arguments, [arguments.source, arguments.base])
    return _write_adapter(arguments, extract_adapter(_open(arguments.source, arguments)))


def _write_adapter(arguments: argparse.Namespace, weights: "Weights") -> int:
    """:func:`_write`, without the copies of ``--base``, if these are an adapter's weights."""
    from fact_convert.cli.adapters import drop_norm_copies

    base = None if arguments.base is None else _open(arguments.base, arguments)
    weights, notes = drop_norm_copies(weights, base)
    return _write(arguments, weights, notes, dim_head=arguments.dim_head)


def _write(
    arguments: argparse.Namespace,
    weights: "Weights",
    notes: Sequence[str],
    dim_head: int | None = None,
) -> int:
    """Write weights to OUT with a progress bar, then print notes."""
    from fact_convert.cli.opening import added_tokens
    from fact_convert.cli.saving import cast_weights, save
    from fact_convert.io.weight_files import file_format
    from fact_convert.models.diffusers_folder import WeightFileOptions, left_out

    tokens = [token.content for token in added_tokens(weights)]
    if tokens and file_format(arguments.out) == "pickle":
        where = "a pickle has no place for the names of"
        notes = [*notes, f"{where} {len(tokens)} added tokens: {listed(tokens)}"]
    weights = cast_weights(weights, arguments.dtype)
    with _bar(arguments, weights) as watched:
        layout = save(
            watched,
            arguments.out,
            layout=arguments.format,
            beside=arguments.config,
            files=WeightFileOptions(
                variant=arguments.save_variant, shard=arguments.shard, legacy=arguments.legacy
            ),
            dim_head=dim_head,
            force=arguments.force,
            dry_run=arguments.dry_run,
        )
    copied = layout == "diffusers"
    left = left_out(weights.left_out, weights.path) if copied else weights.left_out
    return _done(arguments, weights.kind, layout, [*weights.notes, *notes], left)


def _to_jax(arguments: argparse.Namespace) -> int:
    from fact_convert.cli.saving import cast_weights, save_jax

    _check_out(arguments, [arguments.source], folder=True)
    weights = cast_weights(_open(arguments.source, arguments), arguments.dtype)
    how = {"force": arguments.force, "dry_run": arguments.dry_run}
    with _bar(arguments, weights) as watched:
        save_jax(watched, arguments.out, arguments.dim_head, **how)
    return _done(arguments, weights.kind, "checkpoint", weights.notes, weights.left_out)


@contextlib.contextmanager
def _bar(arguments: argparse.Namespace, weights: "Weights") -> Iterator["Weights"]:
    """The weights under a progress bar, which shows how much of them has been read."""
    from tqdm import tqdm

    from fact_convert.cli.saving import watch_weights
    from fact_convert.io.output_paths import check_free_space

    total = sum(array.nbytes for array in weights.tensors().values())
    check_free_space(arguments.out, total)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:

        def read(size: int) -> None:
            with bar.get_lock():  # tensors are read in several threads
                bar.update(size)

        yield watch_weights(weights, read)


def _done(
    arguments: argparse.Namespace,
    kind: str,
    layout: str,
    notes: Sequence[str],
    left_out: Mapping[str, Sequence[str]] | None = None,
) -> int:
    left_out = left_out or {}
    if arguments.json:
        about = {
            "out": str(arguments.out),
            "kind": kind,
            "layout": layout,
            "written": not arguments.dry_run,
            "notes": list(notes),
            "left out": left_out,
        }
        print(json.dumps(about, indent=2))
        return 0
    for reason, keys in left_out.items():
        _say(f"left out {len(keys)} keys ({listed(keys)}): {reason}", file=sys.stderr)
    for note in notes:
        _say(note, file=sys.stderr)
    would = "would be " if arguments.dry_run else ""
    _say(f"{arguments.out}: {would}{kind} ({layout})")
    return 0


def _check_torch_out(arguments: argparse.Namespace, inputs: Sequence[Path | None]) -> None:
    from fact_convert.cli.saving import is_folder

    folder = is_folder(arguments.out, arguments.format)
    _check_out(arguments, [*inputs, arguments.config], folder=folder)


def _check_out(
    arguments: argparse.Namespace, inputs: Iterable[Path | None], *, folder: bool
) -> None:
    """Check OUT before anything is read."""
    from fact_convert.io.output_paths import check_output, claim_output

    if not arguments.dry_run:
        claim_output(arguments.out, force=arguments.force)
    check_output(arguments.out, inputs, folder=folder, force=arguments.force)


def _verify(arguments: argparse.Namespace) -> int:
    from fact_convert.cli.inspection import compare, differing_settings

    one, other = _open(arguments.source, arguments), _open(arguments.other, arguments)
    differences = compare(one, other, arguments.tolerance)
    settings = dict(differing_settings(one, other))
    if arguments.json:
        about = {"same": not differences, "differences": differences, "settings": settings}
        print(json.dumps(about, indent=2))
        return 1 if differences else 0
    for line in differences:
        _say(line)
    result = "different" if differences else "the same numbers"
    apart = [f"{name} {listed(said)}" for name, said in settings.items()]
    _say(f"{result}, but {other.path} has other settings: {'; '.join(apart)}" if apart else result)
    return 1 if differences else 0
