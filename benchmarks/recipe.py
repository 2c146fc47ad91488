"""Which settings open the adapter? Short trainings on the miniature over a grid of settings.

The shape is that of ``sd15_fact``: FAIR on the face alone, no face weight, shuffling ramped in.
What varies is the start (gates at zero, as released, or the two output projections; both are the
base bit for bit), the learning rate, its warm-up, the course of FAIR's weight (0, 0.01 from the
first step, or 0.01 ramped in over the middle half) and with ``--base`` the width of the UNet (that
of its first level). All is looked at on people of the ``encoder`` split, which neither the adapter
nor the judges were trained on: by the judges, in pictures, and by the error on their photos, which
tells settings apart after far fewer steps.

    python -m benchmarks.recipe --out runs/recipe
    python -m benchmarks.widen miniature/base 2 runs/wide/base
    python -m benchmarks.recipe --out runs/recipe --base runs/wide/base --seeds 0

A row of ``OUT/rows.jsonl`` is one run; runs that are there are not done again. ``OUT/table.md``
has a line for each, ``OUT/curves.svg`` draws the errors over the rate.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fact_convert import attach_adapter, load_adapter, load_encoder, load_pipeline, tokenize
from fact_infer.evaluation import world
from fact_infer.evaluation.evaluate import measure
from fact_infer.evaluation.figures import CHART_STYLE, Series, svg_curves
from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.request import GenerationParams
from fact_jax.curriculum import Stage
from fact_jax.diffusion.noise_schedules import add_noise, training_target
from fact_jax.face import resize_area
from fact_jax.fact import Guidance
from fact_jax.losses import denoising_error
from fact_jax.models.unet import UNet
from fact_jax.utils.batches import map_batches, padded_batches
from fact_jax.utils.files import atomic_write
from fact_train.config import EMAConfig, LogConfig, TrainConfig
from fact_train.configs.mini import config as mini
from fact_train.data.pixels import encode_latents, encode_tokens, map_module
from fact_train.data.portraits import align_portraits, draw_portraits
from fact_train.run.loop import run

MINIATURE = Path("miniature")
SHUFFLE = ((0.0, 0.0), (0.0, 0.9), (0.9, 0.9))
FAIR = {
    "none": ((0.0, 0.0),) * 3,
    "at once": ((0.01, 0.01),) * 3,
    "ramped": ((0.0, 0.0), (0.0, 0.01), (0.01, 0.01)),
}
SETTINGS = ("width", "steps", "batch", "start", "fair", "warm-up", "rate", "seed")
SCORES = (
    *("error right", "error wrong", "error saved", "similarity", "over wrong"),
    *("skin error", "inside", "outside", "loss/fair"),
)
GATES = ("gate/attn", "gate/dense")
COLOURS = ("#2f6fdb", "#d9480f", "#2b8a3e", "#862e9c", "#495057", "#c92a2a")


def variant(setting: Mapping, arguments: argparse.Namespace) -> TrainConfig:
    """``sd15_fact``'s shape at the miniature's size, with one setting."""
    steps = setting["steps"]
    quarter = steps // 4
    lengths = (quarter, 2 * quarter, steps - 3 * quarter)
    stages = tuple(
        Stage(steps=length, shuffle=shuffle, fair_weight=weight)
        for length, shuffle, weight in zip(lengths, SHUFFLE, FAIR[setting["fair"]], strict=True)
    )
    return dataclasses.replace(
        mini,
        steps=steps,
        batch_size=setting["batch"],
        seed=setting["seed"],
        optimizer=dataclasses.replace(
            mini.optimizer, learning_rate=setting["rate"], warmup_steps=setting["warm-up"]
        ),
        ema=EMAConfig(decay=0.99),
        log=LogConfig(every=max(1, steps // 10), samples_every=None),
        checkpoint=dataclasses.replace(mini.checkpoint, every=steps),
        options=dataclasses.replace(
            mini.options,
            base=str(arguments.base),
            portrait_cache=str(arguments.out / "photos"),
            start=setting["start"],
            stages=stages,
            region="face",
            face_weight=0.0,
            people=500,
        ),
    )


TIMESTEPS = (200, 400, 600, 800)
ERRORS_OF = 256  # people


class DenoisingErrors:
    """Errors in the head of people's photos, given their captions and another photo of theirs.

    Everybody's photo is noised at each of ``TIMESTEPS``, with the same noise in every call.
    """

    def __init__(self, base: Path):
        self._pipeline = pipeline = load_pipeline(base)
        encoder = load_encoder(MINIATURE / "encoder")
        cells = pipeline.unet.config.sample_size
        size = cells * pipeline.vae.config.downscale
        photos = draw_portraits("encoder", ERRORS_OF, 2, size=size)
        crops = align_portraits(photos, encoder.config.img_size)
        ids, _ = tokenize(pipeline.tokenizer, photos.captions[1::2])
        self._tokens = encode_tokens(encoder, crops[::2])
        latents = encode_latents(pipeline.vae, photos.images[1::2])
        text = map_module(pipeline.text_encoder, lambda encoder, ids: encoder(ids), ids)
        masks = resize_area(photos.portrait.head_mask[1::2], (cells, cells))
        t = np.repeat(np.asarray(TIMESTEPS, np.int32), ERRORS_OF)
        noise = np.random.default_rng(0).normal(size=(len(t), *latents.shape[1:]))
        people = [
            np.tile(rows, (len(TIMESTEPS),) + (1,) * (rows.ndim - 1))
            for rows in (latents, text, np.asarray(masks))
        ]
        self._rows = (t, noise.astype(np.float32), *people)
        self._run = jax.jit(self._errors, static_argnums=0)
        self._base = self._mean(pipeline.unet, None)

    def __call__(self, adapter: Path) -> dict[str, float]:
        """With the right and a wrong person's photo, and their difference; the base's is 1."""
        trained = load_adapter(adapter)
        unet = attach_adapter(self._pipeline.unet, trained)
        face = map_module(trained.resampler, lambda model, tokens: model(tokens), self._tokens)
        given = {"right": face, "wrong": np.roll(face, 1, axis=0)}
        ratios = {name: self._mean(unet, rows) / self._base for name, rows in given.items()}
        ratios["saved"] = ratios["wrong"] - ratios["right"]
        return {f"error {name}": round(ratio, 5) for name, ratio in ratios.items()}

    def _mean(self, unet: UNet, face: Float[np.ndarray, "n m d"] | None) -> float:
        graph, state = nnx.split(unet)
        face = None if face is None else np.tile(face, (len(TIMESTEPS), 1, 1))

        def errors(rows: np.ndarray) -> Array:
            batch = [array[rows] for array in self._rows]
            return self._run(graph, state, *batch, None if face is None else face[rows])

        return float(map_batches(errors, np.arange(len(self._rows[0])), 64).mean())

    def _errors(self, graph, state, t, noise, latents, text, masks, face) -> Float[Array, " b"]:
        unet, schedule = nnx.merge(graph, state), self._pipeline.schedule
        output = unet(add_noise(schedule, latents, noise, t), t, text, face=face)
        target = training_target(schedule, latents, noise, t)
        return jax.vmap(denoising_error)(output[:, None], target[:, None], masks[:, None])


PARAMS = GenerationParams(sampler="ddim", steps=15, guidance=Guidance(text=3.0, face_scale=1.0))


def draw(pipeline: FlaxPipeline, people: world.People, crops: np.ndarray | None) -> np.ndarray:
    """A picture of everybody's caption, with or without their faces, from the same noise."""
    prompts = people.scenes.captions
    parts = [
        pipeline.generate(
            [prompts[i] for i in rows],
            [int(i) for i in rows],
            None if crops is None else crops[rows],
            PARAMS,
        )
        for rows, _ in padded_batches(len(prompts), 32)
    ]
    return np.concatenate(parts)[: len(prompts)]


def scores(
    folder: Path, people: world.People, networks: world.MetricNetworks, pictures: dict
) -> dict[str, float]:
    """What a trained adapter does to the pictures, and where its gates and FAIR ended."""
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
    for name in ("loss/mse", "loss/fair", *GATES):
        found[name] = last[name]
    return {name: round(float(value), 4) for name, value in found.items()}


def table(rows: Iterable[Mapping]) -> str:
    """A line a run; gates are those of attention and feed-forward."""
    names = (*SETTINGS, *SCORES)
    lines = [f"| {' | '.join(names)} | gates |", "|---" * (len(names) + 1) + "|"]
    for row in sorted(rows, key=lambda row: tuple(row[name] for name in SETTINGS)):
        values = [f"{row[name]:g}" if name == "rate" else str(row[name]) for name in SETTINGS]
        values += [f"{row[name]:.3f}" for name in SCORES]
        lines.append(
            f"| {' | '.join(values)} | {', '.join(f'{row[name]:.3f}' for name in GATES)} |"
        )
    return "\n".join(lines) + "\n"


def curves(rows: Iterable[Mapping]) -> str:
    """A file of SVG: the error that the right face saves, over the rate; a line a setting.

    Lines are named by what differs between rows.
    """
    rows = list(rows)
    named = [name for name in SETTINGS if name != "rate" and len({row[name] for row in rows}) > 1]
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = ", ".join(f"{name} {row[name]}" for name in named)
        groups.setdefault(name, []).append((row["rate"], row["error saved"]))
    series = [
        Series(name, colour, sorted(points))
        for (name, points), colour in zip(groups.items(), itertools.cycle(COLOURS))
        if len(points) > 1
    ]
    chart = svg_curves(
        "error with a wrong face minus error with the right one, by learning rate",
        series,
        reach=0,
        log=True,
    )
    return chart.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1).replace(
        "</title>", f"</title><style>{CHART_STYLE}</style>", 1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--starts", nargs="+", default=["zero_projections", "zero_gates"])
    parser.add_argument("--fair", nargs="+", choices=FAIR, default=["ramped", "at once"])
    parser.add_argument("--warmups", nargs="+", type=int, default=[40])
    parser.add_argument("--rates", nargs="+", type=float, default=[2.5e-4, 5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--base", type=Path, default=MINIATURE / "base")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"))
    arguments = parser.parse_args()
    unet = json.loads((arguments.base / "unet" / "config.json").read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if any(set(SCORES) - set(row) for row in rows):
        parser.error(f"{path} has rows of an older version: move it away")
    people = world.render_people(arguments.people, 1, 48, "encoder")
    networks = world.MetricNetworks(MINIATURE / "judge")
    errors = DenoisingErrors(arguments.base)
    base = None
    done = {tuple(row[name] for name in SETTINGS) for row in rows}
    # The seed outermost: the whole grid is there once before any of it is there twice.
    for seed, rate, start, fair, warmup in itertools.product(
        arguments.seeds, arguments.rates, arguments.starts, arguments.fair, arguments.warmups
    ):
        size = (unet["block_out_channels"][0], arguments.steps, arguments.batch)
        values = (*size, start, fair, warmup, rate, seed)
        if values in done:
            continue
        setting = dict(zip(SETTINGS, values, strict=True))
        folder = arguments.out / "-".join(str(value).replace(" ", "_") for value in values)
        shutil.rmtree(folder, ignore_errors=True)
        if signal := run(variant(setting, arguments), folder).stopped_by:
            sys.exit(128 + signal)
        adapter = folder / "export" / "adapter.safetensors"
        pipeline = FlaxPipeline.load(arguments.base, adapter, MINIATURE / "encoder")
        base = draw(pipeline, people, None) if base is None else base
        pictures = {"base": base, "fact": draw(pipeline, people, people.crops)}
        found = errors(adapter) | scores(folder, people, networks, pictures)
        print(json.dumps(setting | found), flush=True)
        with path.open("a") as file:
            file.write(json.dumps(setting | found) + "\n")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        # Another process may have written rows meanwhile.
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for name, text in (("table.md", table(rows)), ("curves.svg", curves(rows))):
            with atomic_write(arguments.out / name) as temporary:
                temporary.write_text(text)


if __name__ == "__main__":
    main()
