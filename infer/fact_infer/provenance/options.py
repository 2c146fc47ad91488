"""The options of a program that writes pictures."""

import argparse
import sys
from pathlib import Path

_LEVELS = ("off", "iptc", "c2pa", "all")


def add_provenance(parser: argparse.ArgumentParser) -> None:
    """Options of what a picture's file says of where it comes from."""
    group = parser.add_argument_group("provenance")
    group.add_argument(
        "--provenance",
        choices=_LEVELS,
        default="iptc",
        help="how files say that a model drew them: iptc (default) the Digital Source Type, c2pa a "
        "signed manifest too, all an invisible watermark as well, off nothing",
    )
    group.add_argument(
        "--c2pa-certificate", type=Path, metavar="PEM", help="chain of the signer, its own first"
    )
    group.add_argument("--c2pa-key", type=Path, metavar="PEM", help="the signer's key")
    group.add_argument("--provider", metavar="NAME", help="who answers for the pictures")


def use_provenance(arguments: argparse.Namespace) -> None:
    """Mark pictures as the options say; UserError unless that can be done."""
    level = getattr(arguments, "provenance", None)
    if level is None:
        return
    from fact_infer.provenance import settings

    wanted = settings.Provenance(
        level=level,
        certificate=arguments.c2pa_certificate,
        key=arguments.c2pa_key,
        provider=arguments.provider,
    )
    for note in settings.check(wanted):
        print(f"note: {note}", file=sys.stderr)
    settings.use(wanted)
