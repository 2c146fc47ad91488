"""fact-convert: look into weights, move them between PyTorch and JAX, compare them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fact_jax.errors import UserError, listed, printable, run_program

_DTYPES = ("float32", "float16", "bfloat16")
_SHOWN = 10


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit status: 0 done, 1 weights differ, 2 bad input."""
    arguments = _parser().parse_args(argv)
    return run_program(lambda: arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fact-convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = _command(commands, "inspect", _inspect, "say what a file or folder of weights is")
    inspect.add_argument("source", type=Path, metavar="FILE|DIR")
    inspect.add_argument("--json", action="store_true", help="as JSON, for scripts")

    torch = _command(commands, "to-torch", _to_torch, "write weights as PyTorch code opens them")
    torch.add_argument("source", type=Path, metavar="SRC")
    _add_out(torch)
    _add_adapter(torch)

    jax = _command(commands, "to-jax", _to_jax, "write weights as a checkpoint of JAX arrays")
    jax.add_argument("source", type=Path, metavar="SRC")
    jax.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    _add_head(jax)
    _add_caution(jax)

    merge = _command(commands, "merge-lora", _merge_lora, "add LoRAs to a base, or take them out")
    merge.add_argument("source", type=Path, metavar="BASE")
    merge.add_argument(
        "lora", type=Path, nargs="+", metavar="LORA", help="of kohya, LyCORIS, diffusers or peft"
    )
    _add_out(merge)
    merge.add_argument(
        "--scale",
        type=float,
        action="append",
        metavar="S",
        help="strength (1.0); of several LoRAs one for all, or repeated, one for each in turn",
    )
    merge.add_argument("--remove", action="store_true", help="take out what S of them had added")

    text = "write a LoRA in another layout"
    convert = commands.add_parser("convert-lora", help=text, description=f"{text.capitalize()}.")
    convert.set_defaults(run=_convert_lora)
    convert.add_argument("source", type=Path, metavar="SRC")
    convert.add_argument(
        "out", type=Path, metavar="OUT", help="a file .safetensors; in peft's layout a folder"
    )
    convert.add_argument("--format", choices=("kohya", "diffusers", "peft"), required=True)
    _add_caution(convert)

    extract = _command(
        commands, "extract", _extract, "write the adapter alone, out of whatever holds one"
    )
    extract.add_argument("source", type=Path, metavar="SRC")
    _add_out(extract)
    _add_adapter(extract)

    verify = _command(
        commands, "verify", _verify, "compare the numbers of two files or folders of any format"
    )
    verify.add_argument("a", type=Path, metavar="A")
    verify.add_argument("b", type=Path, metavar="B")
    verify.add_argument(
        "--tolerance", type=float, default=0.0, metavar="T", help="largest difference allowed (0)"
    )
    return parser


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run)
    command.add_argument("--variant", metavar="NAME", help="weight files of a variant, as fp16")
    command.add_argument(
        "--weights",
        choices=("ema", "params"),
        default="ema",
        help="of what holds both: the running average, or the parameters themselves (ema)",
    )
    return command


def _add_out(command: argparse.ArgumentParser) -> None:
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
    command.add_argument("--dtype", choices=_DTYPES, help="precision to round to (that of SRC)")
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
    _add_caution(command)


def _size(text: str) -> int:
    """Bytes; argparse says what is wrong with a text that is no size."""
    number = text.upper().removesuffix("B")
    unit = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    size = int(float(number.rstrip("KMG")) * unit)
    if size < 1:
        raise ValueError
    return size


def _add_caution(command: argparse.ArgumentParser) -> None:
    command.add_argument("--force", action="store_true", help="replace OUT if it exists")
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be written"
    )


def _add_adapter(command: argparse.ArgumentParser) -> None:
    _add_head(command)
    command.add_argument(
        "--base",
        type=Path,
        metavar="BASE",
        help="of an adapter with copies of its base's norm2: leave out those that BASE has too",
    )


def _add_head(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dim-head",
        type=int,
        metavar="N",
        help="width of a head in the adapter's resampler, if SRC does not say (released: 64)",
    )


def _open(path: Path, arguments: argparse.Namespace):
    from converters.formats import open_weights

    return open_weights(path, variant=arguments.variant, weights=arguments.weights)


def _inspect(arguments: argparse.Namespace) -> int:
    from converters.about import summary

    about = summary(_open(arguments.source, arguments))
    if arguments.json:
        import json

        print(json.dumps(about, indent=2))
        return 0
    for name, value in about.items():
        if name == "parts":
            for part, facts in value.items():
                _say(f"{part + ':':14s}{_sentence(facts)}")
        elif isinstance(value, dict):
            _say(f"{name}:")
            for key, entry in value.items():
                _say(f"  {key + ':':20s} {_sentence(entry)}")
        else:
            _say(f"{name + ':':14s}{_sentence(value)}")
    return 0


def _say(text: str, file=None) -> None:
    """One line at the terminal, which nothing that a file says can steer."""
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
    return _write_adapter(arguments, _open(arguments.source, arguments))


def _merge_lora(arguments: argparse.Namespace) -> int:
    import dataclasses

    from converters.lora import merge_all, read_lora

    scales, count = arguments.scale or [1.0], len(arguments.lora)
    if len(scales) not in (1, count):
        raise UserError(f"{len(scales)} --scale for {count} LoRAs: give one, or one for each")
    scales = scales * count if len(scales) == 1 else scales
    weights = _open(arguments.source, arguments)
    loras = [(read_lora(path), scale) for path, scale in zip(arguments.lora, scales, strict=True)]
    states = merge_all(weights.states, loras, arguments.dtype, remove=arguments.remove)
    done = "taken out" if arguments.remove else "added"
    notes = [
        f"{lora.path}: {lora.algorithm}, {len(lora.layers)} layers {done} at {scale:g}"
        for lora, scale in loras
    ]
    return _write(arguments, dataclasses.replace(weights, states=states), notes)


def _convert_lora(arguments: argparse.Namespace) -> int:
    from converters.lora import read_lora, save_lora

    _refuse_existing(arguments)
    lora = read_lora(arguments.source)
    how = {"force": arguments.force, "dry_run": arguments.dry_run}
    save_lora(lora, arguments.out, arguments.format, **how)
    would = "would be " if arguments.dry_run else ""
    layers = f"{len(lora.layers)} layers"
    print(f"{arguments.out}: {would}{lora.algorithm} of {layers} ({arguments.format})")
    return 0


def _extract(arguments: argparse.Namespace) -> int:
    from converters.saving import adapter_in

    return _write_adapter(arguments, adapter_in(_open(arguments.source, arguments)))


def _write_adapter(arguments: argparse.Namespace, weights) -> int:
    """:func:`_write`, without the copies of ``--base``, if these are an adapter's weights."""
    from converters.saving import without_copies

    base = None if arguments.base is None else _open(arguments.base, arguments)
    weights, notes = without_copies(weights, base)
    return _write(arguments, weights, notes, dim_head=arguments.dim_head)


def _write(arguments: argparse.Namespace, weights, notes, dim_head: int | None = None) -> int:
    """Write weights as OUT and the options say, with a bar; what was noticed is said at the end."""
    from converters.folders import Files
    from converters.formats import added_tokens
    from converters.readers import stored_as
    from converters.saving import in_dtype, save

    _refuse_existing(arguments)
    tokens = [token.content for token in added_tokens(weights)]
    if tokens and stored_as(arguments.out) == "pickle":
        where = "a pickle has no place for the names of"
        notes = [*notes, f"{where} {len(tokens)} added tokens: {listed(tokens)}"]
    weights = in_dtype(weights, arguments.dtype)
    with _bar(weights) as bar:
        layout = save(
            weights,
            arguments.out,
            layout=arguments.format,
            beside=arguments.config,
            files=Files(
                variant=arguments.save_variant, shard=arguments.shard, legacy=arguments.legacy
            ),
            dim_head=dim_head,
            force=arguments.force,
            dry_run=arguments.dry_run,
            wrote=bar.update,
        )
    return _done(arguments, weights, layout, notes)


def _to_jax(arguments: argparse.Namespace) -> int:
    from converters.formats import save_jax

    _refuse_existing(arguments)
    weights = _open(arguments.source, arguments)
    with _bar(weights) as bar:
        save_jax(
            weights,
            arguments.out,
            arguments.dim_head,
            force=arguments.force,
            dry_run=arguments.dry_run,
            wrote=bar.update,
        )
    return _done(arguments, weights, "checkpoint", [])


def _bar(weights):
    from tqdm import tqdm

    total = sum(array.nbytes for _, array in weights.tensors())
    return tqdm(total=total, unit="B", unit_scale=True, disable=None)


def _done(arguments: argparse.Namespace, weights, layout: str, notes: Sequence[str]) -> int:
    for reason, keys in weights.left_out.items():
        _say(f"left out {len(keys)} keys ({listed(keys)}): {reason}", file=sys.stderr)
    for note in (*weights.notes, *notes):
        _say(note, file=sys.stderr)
    would = "would be " if arguments.dry_run else ""
    _say(f"{arguments.out}: {would}{weights.kind} ({layout})")
    return 0


def _refuse_existing(arguments: argparse.Namespace) -> None:
    if arguments.out.exists() and not arguments.force:
        raise UserError(f"{arguments.out}: exists already; --force replaces it")


def _verify(arguments: argparse.Namespace) -> int:
    from converters.about import compare

    differences = compare(
        _open(arguments.a, arguments), _open(arguments.b, arguments), arguments.tolerance
    )
    for line in differences:
        _say(line)
    print("different" if differences else "the same numbers")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
