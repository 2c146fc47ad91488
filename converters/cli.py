"""fact-convert: look into weights, move them between PyTorch and JAX, compare them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fact_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit status: 0 done, 1 weights differ, 2 bad input."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except OSError as err:
        print(f"error: {err.filename or ''}: {err.strerror or err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fact-convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = _command(commands, "inspect", _inspect, "say what a file or folder of weights is")
    inspect.add_argument("source", type=Path, metavar="FILE|DIR")
    inspect.add_argument("--json", action="store_true", help="as JSON, for scripts")

    for name, run, text, out in (
        (
            "to-torch",
            _to_torch,
            "write weights as a file that PyTorch code opens",
            "OUT.safetensors, or OUT.ckpt for the released layout; a folder for a pipeline",
        ),
        ("to-jax", _to_jax, "write weights as a checkpoint folder of JAX arrays", "a new folder"),
    ):
        convert = _command(commands, name, run, text)
        convert.add_argument("source", type=Path, metavar="SRC")
        convert.add_argument("out", type=Path, metavar="OUT", help=out)
        convert.add_argument("--force", action="store_true", help="replace OUT if it exists")
        convert.add_argument(
            "--dim-head",
            type=int,
            metavar="N",
            help="width of a head in the adapter's resampler, if SRC does not say (released: 64)",
        )

        if name == "to-torch":
            convert.add_argument(
                "--dtype",
                choices=("float32", "float16", "bfloat16"),
                help="precision to round the weights to (that of SRC)",
            )

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
        help="of a training checkpoint: the running average, or the parameters themselves (ema)",
    )
    return command


def _open(path: Path, arguments: argparse.Namespace):
    from converters.formats import open_weights

    return open_weights(path, variant=arguments.variant, weights=arguments.weights)


def _inspect(arguments: argparse.Namespace) -> int:
    from converters.formats import summary

    about = summary(_open(arguments.source, arguments))
    if arguments.json:
        import json

        print(json.dumps(about, indent=2))
        return 0
    for name, value in about.items():
        if name == "parts":
            for part, facts in value.items():
                print(f"{part + ':':14s}{_sentence(facts)}")
        elif isinstance(value, dict):
            print(f"{name}:")
            for key, entry in value.items():
                print(f"  {key + ':':20s}{_sentence(entry)}")
        else:
            print(f"{name + ':':14s}{value}")
    return 0


def _sentence(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_sentence(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _to_torch(arguments: argparse.Namespace) -> int:
    import dataclasses

    from tqdm import tqdm

    from converters.formats import save_torch
    from converters.weights import in_precision

    weights = _open(arguments.source, arguments)
    if weights.format == "diffusers":
        return _copy_pipeline(arguments)
    _refuse_existing(arguments)
    if arguments.dtype:
        rounded = {k: in_precision(state, arguments.dtype) for k, state in weights.states.items()}
        weights = dataclasses.replace(weights, states=rounded)
    total = sum(array.nbytes for _, array in weights.tensors())
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        save_torch(weights, arguments.out, arguments.dim_head, bar.update)
    print(f"{arguments.out}: {weights.kind}")
    return 0


def _copy_pipeline(arguments: argparse.Namespace) -> int:
    from converters.pipeline import load_pipeline, save_pipeline

    _refuse_existing(arguments)
    pipeline = load_pipeline(arguments.source, variant=arguments.variant)
    save_pipeline(pipeline, arguments.out, force=arguments.force, dtype=arguments.dtype)
    print(f"{arguments.out}: pipeline")
    return 0


def _to_jax(arguments: argparse.Namespace) -> int:
    from converters.formats import save_jax

    _refuse_existing(arguments)
    weights = _open(arguments.source, arguments)
    save_jax(weights, arguments.out, arguments.dim_head, force=arguments.force)
    print(f"{arguments.out}: {weights.kind}")
    return 0


def _refuse_existing(arguments: argparse.Namespace) -> None:
    if arguments.out.exists() and not arguments.force:
        raise UserError(f"{arguments.out}: exists already; --force replaces it")


def _verify(arguments: argparse.Namespace) -> int:
    from converters.formats import compare

    differences = compare(
        _open(arguments.a, arguments), _open(arguments.b, arguments), arguments.tolerance
    )
    for line in differences:
        print(line)
    print("different" if differences else "the same numbers")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
