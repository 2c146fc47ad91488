"""How far pictures are marked, for the whole process."""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from typing import Literal

from fact_jax.utils.errors import UserError

Level = Literal["off", "iptc", "c2pa", "all"]
LEVELS: tuple[Level, ...] = ("off", "iptc", "c2pa", "all")
MAX_PROVIDER = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is written into pictures that a model drew; the rest of this package does it.

    ``level``: ``off`` nothing, ``iptc`` the Digital Source Type, ``c2pa`` a signed manifest too,
    ``all`` a watermark as well. ``certificate`` and ``key`` are PEM files of a signer, None: one of
    this machine's own. ``provider`` is who answers for the pictures, for the label of GB 45438-2025
    and the manifest.
    """

    level: Level = "iptc"
    certificate: str | os.PathLike | None = None
    key: str | os.PathLike | None = None
    provider: str | None = None

    @property
    def iptc(self) -> bool:
        return self.level != "off"

    @property
    def c2pa(self) -> bool:
        return self.level in ("c2pa", "all")

    @property
    def watermark(self) -> bool:
        return self.level == "all"


_current = Provenance()


def current() -> Provenance:
    """What pictures are marked with."""
    return _current


def use(settings: Provenance) -> None:
    """Mark the pictures to come in this way."""
    global _current
    _current = settings


@contextlib.contextmanager
def marked(settings: Provenance) -> Iterator[None]:
    """While this is entered, mark pictures in this way."""
    before = current()
    use(settings)
    try:
        yield
    finally:
        use(before)


def check(settings: Provenance) -> list[str]:
    """Lines that the user should see; UserError unless pictures can be marked so, before any is.

    A signer is opened, and this machine's own made where it is wanted and there is none.
    """
    if settings.level not in LEVELS:
        raise UserError(f"provenance must be one of {', '.join(LEVELS)}, got {settings.level!r}")
    named = settings.certificate, settings.key
    if (named[0] is None) != (named[1] is None):
        raise UserError("a certificate and its key come together: give both, or neither")
    if named[0] is not None and not settings.c2pa:
        raise UserError(
            f"provenance {settings.level!r} signs nothing: give no certificate, or c2pa"
        )
    provider = settings.provider
    if provider is not None and settings.level == "off":
        raise UserError("provenance 'off' writes no provider: give none, or iptc")
    if provider is not None and not (0 < len(provider) <= MAX_PROVIDER and provider.isprintable()):
        raise UserError(f"the provider is a name of at most {MAX_PROVIDER} characters on one line")
    notes: list[str] = []
    if settings.c2pa:
        _require("c2pa", "c2pa-python", "cryptography")
        from fact_infer.provenance.content_credentials import open_signer, try_signer

        signer = open_signer(settings.certificate, settings.key)
        try_signer(signer)
        notes += signer.notes
    if settings.watermark:
        from fact_infer.provenance.watermark import require_watermark

        require_watermark()
    return notes


def _require(module: str, *packages: str) -> None:
    if importlib.util.find_spec(module) is None or not importlib.util.find_spec("cryptography"):
        raise UserError(
            f"signing pictures needs {' and '.join(packages)}: "
            "pip install 'fact-jax[provenance]', or give --provenance iptc"
        )
