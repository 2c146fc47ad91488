"""The command ``evaluate``: an adapter in the portrait world or on photos, or any pictures."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fact_infer.cli.options import add_guidance_options, read_guidance
from fact_jax.utils.errors import UserError

_DESCRIPTION = """
Measures an adapter of the miniature on made-up people whom nothing was trained on; with --folder an
adapter on photos of people, whose last photo each is kept from the model; with --pictures what any
other model made. Stopped and started again with the same options it goes on. Writes a table
(evaluation.txt), all numbers (evaluation.json, pictures.jsonl) and a page of pictures, from worst
to best (pictures.html).
"""


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Add ``evaluate`` to fact-infer's commands."""
    text = "measure an adapter, or pictures that any model made: likeness, copying, leakage, text"
    evaluate = commands.add_parser("evaluate", help=text, description=_DESCRIPTION)
    evaluate.set_defaults(run=_evaluate)
    what = evaluate.add_argument_group("what is measured")
    what.add_argument("--adapter", type=Path, metavar="FILE", help="needed without --pictures")
    what.add_argument("--base", type=Path, default=Path("miniature/base"), metavar="DIR")
    what.add_argument(
        "--encoder",
        type=Path,
        metavar="DIR",
        help="(encoder/ beside the adapter, else miniature/encoder)",
    )
    what.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="people to draw: DIR/NAME/*.jpg, with .points.json beside each or a detector; or "
        "records of `fact-train records`",
    )
    what.add_argument(
        "--pictures",
        type=Path,
        metavar="JSONL",
        help='pictures that are there: a line {"picture", "person", "references", "target", '
        '"prompt", "base", "seed"} each, paths relative to the file; the last four may be absent',
    )
    what.add_argument(
        "--people", type=int, metavar="N", help="how many (96; of --folder: everybody)"
    )
    what.add_argument("--photos", type=int, default=1, metavar="N", help="seen of each (1)")
    what.add_argument(
        "--prompt", action="append", metavar="TEXT", help="with --folder; may be repeated"
    )
    what.add_argument("--seeds", type=int, default=1, metavar="N", help="pictures of each (1)")
    drawn = evaluate.add_argument_group("how it is drawn")
    drawn.add_argument("--sampler", default="ddim", metavar="NAME")
    drawn.add_argument("--steps", type=int, default=25, metavar="N")
    drawn.add_argument("--guidance", type=float, default=3.0, metavar="G")
    add_guidance_options(drawn)
    drawn.add_argument("--height", type=int, metavar="PX", help="with --folder (the base's own)")
    drawn.add_argument("--width", type=int, metavar="PX", help="with --folder (the base's own)")
    drawn.add_argument("--seed", type=int, default=0, metavar="N", help="the first (0)")
    drawn.add_argument(
        "--base-pictures",
        type=Path,
        metavar="DIR",
        help="in the portrait world: where pictures of the base are kept, for other adapters' too",
    )
    drawn.add_argument("--batch", type=int, default=16, metavar="N", help="at a time (16)")
    looks = evaluate.add_argument_group("who looks at it")
    looks.add_argument(
        "--judge",
        type=Path,
        default=Path("miniature/judge"),
        metavar="DIR",
        help="folder of mini_judge's networks (miniature/judge)",
    )
    looks.add_argument(
        "--recogniser",
        action="append",
        default=[],
        metavar="FILE",
        help="an ArcFace model as ONNX, beside the judge in the portrait world, else alone; "
        "similarities are the mean of several ('judge' adds the miniature's)",
    )
    looks.add_argument("--clip", type=Path, metavar="DIR", help="a local CLIP, for the prompts")
    looks.add_argument(
        "--features",
        metavar="FILE",
        help="a network as ONNX, or 'clip', whose features give KID, FID and diversity",
    )
    looks.add_argument("--detector", metavar="PACK", help="insightface pack (buffalo_l, if there)")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR")


def _evaluate(arguments: argparse.Namespace) -> None:
    from fact_infer.output_images import check_folder
    from fact_infer.request import check_seed

    for name in ("batch", "seeds", "photos"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.people is not None and arguments.people < 2:
        raise UserError(f"--people must be at least 2, got {arguments.people}")
    check_seed(arguments.seed)
    check_folder(arguments.out)
    if arguments.pictures is not None:
        drawn = ("adapter", "folder", "prompt", "base_pictures")
        other = [n.replace("_", "-") for n in drawn if getattr(arguments, n) is not None]
        if other:
            raise UserError(f"--pictures are there already: leave out --{' and --'.join(other)}")
        return _pictures(arguments)
    if arguments.base_pictures is not None and arguments.folder is not None:
        raise UserError("--base-pictures is for the portrait world: leave it away with --folder")
    if arguments.adapter is None:
        raise UserError("give --adapter FILE, or --pictures JSONL of any other model")
    if arguments.folder is not None:
        return _folder(arguments)
    if arguments.clip or arguments.features or arguments.prompt:
        raise UserError(
            "--clip, --features and --prompt are for --folder and --pictures: in the portrait "
            "world captions and features are measured by the miniature's own parser"
        )
    return _world(arguments)


def _params(arguments: argparse.Namespace) -> Any:
    from fact_infer.request import GenerationParams

    return GenerationParams(
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance=read_guidance(arguments),
        height=arguments.height,
        width=arguments.width,
    )


def _encoder(arguments: argparse.Namespace) -> Path | None:
    from fact_infer.parts import has_encoder

    if arguments.encoder is None and not has_encoder(arguments.adapter):
        return Path("miniature/encoder")
    return arguments.encoder


def _open(arguments: argparse.Namespace, settings: dict) -> Path:
    from fact_infer.evaluation.results import open_folder

    out = open_folder(arguments.out, settings)
    if out != arguments.out:
        print(f"note: {arguments.out} is taken, this goes to {out}", file=sys.stderr)
    return out


def _world(arguments: argparse.Namespace) -> None:
    import numpy as np

    from fact_infer.evaluation import evaluate, world
    from fact_infer.evaluation.any_model.networks import OnnxNetwork
    from fact_infer.evaluation.leakage import Leakage
    from fact_infer.evaluation.measures import estimates
    from fact_infer.evaluation.page import write_page
    from fact_infer.evaluation.results import Cost, PictureStore, fingerprint, save
    from fact_infer.jax.pipeline import FlaxPipeline
    from fact_infer.jax_config import enable_compilation_cache
    from fact_jax.utils.miniature import require_miniature

    enable_compilation_cache()
    cost, params, encoder = Cost(), _params(arguments), _encoder(arguments)
    paths = {"--base": arguments.base, "--encoder": encoder, "--judge": arguments.judge}
    require_miniature({option: path for option, path in paths.items() if path is not None})
    more = [OnnxNetwork(path) for path in arguments.recogniser if path != "judge"]
    networks = world.MetricNetworks(arguments.judge, more)
    pipeline = FlaxPipeline.load(arguments.base, arguments.adapter, encoder)
    pipeline.base.check(params)
    assert pipeline.face is not None  # --adapter is required
    crop_size = pipeline.face.encoder_config.img_size
    count = 96 if arguments.people is None else arguments.people
    size = world.world_size(pipeline, params)
    people = world.render_people(count, arguments.photos, crop_size, size=size)
    about = world.describe(pipeline, people, params, arguments.seed, arguments.seeds)
    about["judge"] = {str(arguments.judge): fingerprint(arguments.judge)}
    about["judge"] |= {str(one.path): fingerprint(one.path) for one in more}
    out = _open(arguments, {**about, "batch": arguments.batch})
    total = count * arguments.seeds
    print(f"drawing {2 * total} pictures", file=sys.stderr)
    store = base_store = PictureStore(out / "pictures")
    if arguments.base_pictures is not None:
        base_store = world.base_pictures(arguments.base_pictures, about, arguments.batch)
    with cost.drawing(*{store, base_store}):
        pictures = world.generate_pictures(
            pipeline,
            people,
            params,
            seed=arguments.seed,
            batch=arguments.batch,
            seeds=arguments.seeds,
            store=store,
            base_store=base_store,
        )
    samples, seen = evaluate.measured_samples(networks, people, pictures)
    who = evaluate.whose(people, total)
    prompts = [people.scenes.captions[i] for i in who]
    seeds = [arguments.seed + row for row in range(total)]
    head = evaluate.changed_region(seen, size)
    leak = Leakage(pipeline, min(arguments.batch, total))
    samples |= leak(prompts, seeds, people.crops[who], pictures, head)
    measures = estimates(samples, who)
    title = world.summary_line(about)
    page = write_page(
        "Evaluation in the portrait world",
        title,
        measures,
        evaluate.cases(people, pictures, samples),
        sorted_by="similarity to the reference photo",
        notes=evaluate.NOTES,
    )
    arrays = {
        "ids": people.scenes.ids,
        "captions": np.asarray(people.scenes.captions),
        "reference": people.first_references,
        **{name: images[:count] for name, images in pictures.items()},
    }
    rows = [
        {
            "picture": f"pictures/{world.picture_key('fact', people, row)}.png",
            "person": int(people.scenes.ids[who[row]]),
            "prompt": prompts[row],
            "seed": seeds[row],
        }
        for row in range(total)
    ]
    text = save(
        out,
        title,
        about,
        measures,
        samples,
        rows,
        notes=evaluate.NOTES,
        page=page,
        arrays=arrays,
        cost=cost,
    )
    print(text, end="")
    print(f"{cost.line()}; {out / 'pictures.html'}", file=sys.stderr)


def _folder(arguments: argparse.Namespace) -> None:
    from fact_infer.evaluation.any_model.run import evaluate_folder

    if not arguments.prompt:
        raise UserError("--folder needs prompts: --prompt TEXT, once or more")
    print(evaluate_folder(arguments, _params(arguments), _encoder(arguments), _open), end="")


def _pictures(arguments: argparse.Namespace) -> None:
    from fact_infer.evaluation.any_model.run import evaluate_manifest

    print(evaluate_manifest(arguments, _open), end="")
