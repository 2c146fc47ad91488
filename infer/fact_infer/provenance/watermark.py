"""An invisible watermark by TrustMark (arXiv 2311.18297, Adobe's, MIT).

It survives what metadata does not: a screenshot, a smaller copy, another file format. Its networks
are no part of the package, which fetches them at first use: that is left to the user.
"""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fact_jax.utils.errors import UserError

WORD = "FACT-JAX"
"""Eight characters of seven bits, as many as its strongest correction of errors (BCH_5) holds."""
VARIANT = "Q"
_FILES = tuple(f"{name}_{VARIANT}" for name in ("encoder", "decoder"))


def add_watermark(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with :data:`WORD` in it."""
    return np.asarray(_trustmark().encode(Image.fromarray(image), WORD).convert("RGB"))


def has_watermark(image: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Whether a picture carries it."""
    word, present, _ = _trustmark().decode(Image.fromarray(image))
    return bool(present) and word == WORD


def require_watermark() -> None:
    """UserError unless the library and its networks are here."""
    found = importlib.util.find_spec("trustmark")
    if found is None or found.origin is None:
        raise UserError(
            "a watermark needs trustmark: pip install 'fact-jax[watermark]', or give "
            "--provenance c2pa"
        )
    models = Path(os.path.dirname(found.origin)) / "models"
    missing = [name for name in _FILES if not (models / f"{name}.ckpt").is_file()]
    if missing:
        raise UserError(
            f"TrustMark's networks are not in {models} ({', '.join(missing)}): fetch them once "
            f"with python -c \"from trustmark import TrustMark; TrustMark(model_type='{VARIANT}')\""
        )


@functools.cache
def _trustmark() -> Any:
    require_watermark()
    from trustmark import TrustMark

    # On the CPU everywhere: a picture takes a moment, and machines agree on its bits.
    return TrustMark(
        verbose=False,
        device="cpu",
        model_type=VARIANT,
        encoding_type=TrustMark.Encoding.BCH_5,
        loadRemover=False,
    )
