"""How should the adapter leave the base model? Six short trainings on the miniature.

Both starts are the base bit for bit; the gates stand at zero, as released, or the two output
projections do. FAIR pulls with lambda 0, with 0.01 from the first step, or with 0.01 ramped in over
the middle half. Everything else is the shipped recipe, shortened; the judges look at people of the
``encoder`` split, which neither the adapter nor the judges were trained on.

    python -m benchmarks.starts --steps 600 --out runs/starts
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

from fact_infer.evaluation import world
from fact_infer.evaluation.evaluate import measure
from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.request import GenerationParams
from fact_jax.curriculum import Stage
from fact_jax.fact import Guidance
from fact_jax.utils.files import atomic_write
from fact_train.config import EMAConfig, LogConfig, TrainConfig
from fact_train.configs.mini import config as mini
from fact_train.run.loop import run

MINIATURE = Path("miniature")
STARTS = ("zero_gates", "zero_projections")
PULLS = ("none", "at once", "ramped")
LAMBDA = 0.01


def variant(start: str, pull: str, steps: int, batch: int) -> TrainConfig:
    """The shipped recipe for so many steps, with one start and one course of lambda."""
    quarter = steps // 4
    shuffle = ((0.0, 0.0), (0.0, 0.9), (0.9, 0.9))
    weight = {
        "none": ((0.0, 0.0),) * 3,
        "at once": ((LAMBDA, LAMBDA),) * 3,
        "ramped": ((0.0, 0.0), (0.0, LAMBDA), (LAMBDA, LAMBDA)),
    }[pull]
    lengths = (quarter, 2 * quarter, steps - 3 * quarter)
    stages = tuple(
        Stage(steps=length, shuffle=s, fair_weight=w)
        for length, s, w in zip(lengths, shuffle, weight, strict=True)
    )
    options = dataclasses.replace(mini.options, start=start, stages=stages, people=1000)
    return dataclasses.replace(
        mini,
        steps=steps,
        batch_size=batch,
        ema=EMAConfig(decay=0.99),
        log=LogConfig(every=steps // 10),
        checkpoint=dataclasses.replace(mini.checkpoint, every=steps),
        options=options,
    )


def judge(folder: Path, people: world.People, networks: world.MetricNetworks) -> dict[str, float]:
    """What a trained adapter does to the pictures, and where its gates and FAIR ended."""
    pipeline = FlaxPipeline.load(
        MINIATURE / "base", folder / "export" / "adapter.safetensors", MINIATURE / "encoder"
    )
    params = GenerationParams(sampler="ddim", steps=15, guidance=Guidance(text=3.0, face_scale=1.0))
    pictures = world.generate_pictures(pipeline, people, params, seed=0, batch=32)
    measures = measure(networks, people, pictures)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    found = {
        "similarity": measures["reference/fact"].mean,
        "over wrong": measures["over_wrong/fact"].mean,
        "hair error": measures["hair/fact"].mean,
        "skin error": measures["skin/fact"].mean,
        "inside": measures["head/inside/fact"].mean,
        "outside": measures["head/outside/fact"].mean,
    }
    for name in ("loss/mse", "loss/fair", "gate/attn", "gate/dense"):
        found[name] = last[name]
    return {name: round(float(value), 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/starts"))
    arguments = parser.parse_args()
    people = world.render_people(arguments.people, 1, 48, "encoder")
    networks = world.MetricNetworks(MINIATURE / "judge")
    rows = []
    for start, pull in itertools.product(STARTS, PULLS):
        folder = arguments.out / f"{start}-{pull.replace(' ', '-')}"
        run(variant(start, pull, arguments.steps, arguments.batch), folder)
        rows.append({"start": start, "lambda": pull, **judge(folder, people, networks)})
        print(json.dumps(rows[-1]), flush=True)
        with atomic_write(arguments.out / "starts.json") as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
