"""One training of the laboratory in a process of its own, which gives back all that it held.

python -m fact_train.lab.one QUESTION VARIANT SEED STEPS OUT DRAWN

DRAWN is a folder where drawn photos are kept for the next one.
"""

import dataclasses
import sys
from pathlib import Path

from fact_jax.ops.precision import matmul_precision
from fact_jax.utils.command_line import silence_loggers
from fact_jax.utils.errors import run_program
from fact_train.lab.question import load_questions, runs_of
from fact_train.lab.run import DIVERGED
from fact_train.run.loop import DivergedError
from fact_train.run.loop import run as train


def main(argv: list[str]) -> int:
    """The exit status: 0 done, 2 bad input, 3 diverged, 128 + signal when stopped."""
    question, variant, seed, steps, out, drawn = argv
    silence_loggers("absl", "gcsfs", "s3fs", "fsspec")

    def run() -> int:
        runs = runs_of(load_questions([question]), int(seed) + 1, int(steps), ())
        (config,) = (r.config for r in runs if (r.variant, r.seed) == (variant, int(seed)))
        options = dataclasses.replace(config.options, portrait_cache=drawn)
        config = dataclasses.replace(config, options=options)
        try:
            with matmul_precision(config.precision):
                outcome = train(config, Path(out), f"fact-train lab, {variant}, seed {seed}")
        except DivergedError as error:
            print(f"{out}: {error}", file=sys.stderr)
            return DIVERGED
        return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by

    return run_program(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
