"""Loading for ``generate`` and ``redraw``: parts, the pipeline of a backend, the safety checker."""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from fact_jax.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from fact_infer.parts import BaseModel, Parts
    from fact_infer.pipeline import Pipeline


Say = Callable[[str], None]
"""Takes a line for the user."""


def note(line: str) -> None:
    """Print a note on stderr."""
    print(f"note: {line}", file=sys.stderr)


def warn(line: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {line}", file=sys.stderr)


def open_parts(arguments: argparse.Namespace) -> "Parts":
    """What is named on the command line, opened and checked against each other."""
    from fact_infer.parts import load_parts

    if arguments.encoder and not arguments.adapter:
        raise UserError("--encoder is for an adapter: give --adapter too, or neither")
    return load_parts(
        arguments.base,
        arguments.adapter,
        arguments.encoder,
        loras=arguments.lora,
        controlnet=arguments.controlnet,
    )


def drawing_files(arguments: argparse.Namespace) -> dict[str, str | None]:
    """The models of a picture, for its metadata."""
    names = ("adapter", "encoder", "controlnet", "backend", "precision")
    loras = " + ".join(f"{file}={factor:g}" for file, factor in arguments.lora)
    checked = "on" if arguments.safety_checker else None
    files = {name: getattr(arguments, name) for name in names}
    return files | {"loras": loras or None, "safety checker": checked}


def load_pipeline(arguments: argparse.Namespace, parts: "Parts") -> "Pipeline":
    """The pipeline of the backend; UserError where PyTorch is asked for and not there."""
    if arguments.backend == "flax":
        from fact_infer.jax.pipeline import FlaxPipeline
        from fact_infer.jax_config import enable_compilation_cache

        enable_compilation_cache()
        return FlaxPipeline.from_parts(parts, arguments.precision)
    try:
        import transformers

        # Its start tells a user of diffusers nothing that they could act on.
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
        from fact_infer.torch.pipeline import TorchPipeline
    except ImportError as error:
        raise UserError(
            f"--backend torch needs PyTorch and diffusers ({error}): pip install 'fact-jax[torch]'"
        ) from None
    return TorchPipeline.from_parts(parts, arguments.precision)


def load_safety_checker(base: "BaseModel", wanted: bool) -> Callable[["np.ndarray"], "np.ndarray"]:
    """The filter of finished pictures; notes that a base's own safety checker is left out."""
    if not wanted:
        if base.has_safety_checker:
            note(f"the safety checker of {base.name} is left out (--safety-checker keeps it)")
        return lambda pictures: pictures
    try:
        from fact_infer.torch.safety_checker import SafetyChecker
    except ImportError as error:
        raise UserError(
            f"--safety-checker needs PyTorch and diffusers ({error}): pip install 'fact-jax[torch]'"
        ) from None
    checker = SafetyChecker(base)

    def check(pictures: "np.ndarray") -> "np.ndarray":
        pictures, marked = checker(pictures)
        if marked.any():
            print(
                f"warning: the safety checker marked {marked.sum()} of {len(pictures)} pictures: "
                "they are black",
                file=sys.stderr,
            )
        return pictures

    return check
