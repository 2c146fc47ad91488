"""``fact-infer generate``: its options, and what it calls."""

import argparse
import contextlib
import sys
from pathlib import Path

from fact_infer.cli.guidance_options import (
    add_base_options,
    add_input_options,
    add_people_options,
    add_steering_options,
    check_control,
    read_guidance,
)
from fact_jax.utils.errors import UserError

# What SAMPLERS holds, which would be slow to import for a --help.
_SAMPLERS = "ddim, pndm, euler, euler_ancestral, dpmpp_2m, dpmpp_2m_karras, lcm"
_PRECISIONS = ("float32", "bfloat16", "float16")


def add_generate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "generate",
        help="draw pictures of prompts, with the face of photos",
        description="Draw every prompt with every seed and write PNG files that hold their "
        "parameters. Without --adapter and --photo the base model draws alone. From the same "
        "request both backends start with the same noise and give the same picture, except with "
        "the samplers euler_ancestral and lcm: those draw noise on the way, each backend its own.",
    )
    command.set_defaults(run=_generate)
    models = command.add_argument_group("models")
    add_models(models)
    add_base_options(models)
    face = command.add_argument_group("face")
    add_photo_options(face, several=True)
    add_steering_options(face)
    add_people_options(face)
    add_input_options(command.add_argument_group("pictures to start from"))
    _add_picture_options(command.add_argument_group("picture"))


def add_models(models: argparse._ActionsContainer) -> None:
    """What draws: the files, the backend, the precision."""
    models.add_argument(
        "--base", required=True, metavar="DIR", help="diffusers folder of a Stable Diffusion 1.5"
    )
    models.add_argument(
        "--adapter",
        metavar="FILE",
        help="FACT adapter, .safetensors or .ckpt, or the folder of one with its own encoder/",
    )
    models.add_argument(
        "--encoder",
        metavar="DIR",
        help="TransFace: folder, or released .pt (default: encoder/ beside the adapter)",
    )
    models.add_argument(
        "--backend", choices=("flax", "torch"), default="flax", help="who computes (default flax)"
    )
    models.add_argument(
        "--precision",
        choices=_PRECISIONS,
        default="float32",
        help="numbers in which UNet, text encoder and, in PyTorch, the autoencoder compute "
        "(default float32)",
    )
    models.add_argument(
        "--safety-checker",
        action="store_true",
        help="run the base's own over the pictures: what it marks comes out black (needs PyTorch)",
    )


def _add_picture_options(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="may be repeated"
    )
    add_sampling(group)
    group.add_argument(
        "--count", type=int, default=1, metavar="N", help="seeds for each prompt (default 1)"
    )
    group.add_argument("--height", type=int, metavar="PX", help="default: the base's own")
    group.add_argument("--width", type=int, metavar="PX", help="default: the base's own")
    group.add_argument(
        "--best",
        type=int,
        metavar="N",
        help="of each prompt's --count pictures keep the N whose faces are most like the photos, "
        "by the encoder's own judgement; without a detector where the face lies in the first photo",
    )
    group.add_argument("--sheet", action="store_true", help="write all of them on one sheet too")
    add_files(group, "portraits")


def add_sampling(group: argparse._ActionsContainer) -> None:
    """How anything is drawn."""
    group.add_argument("--negative", default="", metavar="TEXT", help="negative prompt")
    group.add_argument(
        "--sampler", default="pndm", metavar="NAME", help=f"one of {_SAMPLERS} (default pndm)"
    )
    group.add_argument("--steps", type=int, default=50, metavar="N", help="default 50")
    group.add_argument(
        "--guidance",
        type=float,
        default=5.0,
        metavar="X",
        help="of the text; 1 is none (default 5)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="first seed (default 0)")
    group.add_argument(
        "--batch", type=int, default=4, metavar="N", help="pictures at a time (default 4)"
    )


def add_files(group: argparse._ActionsContainer, folder: str) -> None:
    """Where pictures go, and as what."""
    group.add_argument(
        "--format",
        choices=("png", "jpg"),
        default="png",
        help="of the files (default png, which keeps every pixel; jpg rounds)",
    )
    group.add_argument(
        "--out", type=Path, default=Path(folder), metavar="DIR", help=f"default {folder}/"
    )


def add_photo_options(group: argparse._ActionsContainer, *, several: bool) -> None:
    each = {"action": "append", "default": []} if several else {}
    again = "; once for each photo, in their order" if several else ""
    if several:
        group.add_argument(
            "--photo",
            type=Path,
            metavar="FILE",
            help="may be repeated: one person's photos",
            **each,
        )
    group.add_argument(
        "--points",
        type=Path,
        metavar="FILE",
        help=f"five points as JSON (default: PHOTO.points.json, else the detector){again}",
        **each,
    )
    group.add_argument("--mask", type=Path, metavar="FILE", help=f"grey head mask{again}", **each)
    group.add_argument(
        "--parsing",
        type=Path,
        metavar="FILE",
        help=f"labels of a face-parsing model{again}",
        **each,
    )
    group.add_argument(
        "--face-index",
        type=int,
        metavar="N",
        help=f"which of several faces, from 0 at the left (default: the largest){again}",
        **each,
    )
    group.add_argument(
        "--detector", metavar="PACK", help="insightface model pack, a folder or a name"
    )


def _generate(arguments: argparse.Namespace) -> None:
    request = _request(arguments)

    from tqdm import tqdm

    from fact_infer.base_model import check_controlnet, check_faces, read_base, read_face_files
    from fact_infer.input_images import read_inputs
    from fact_infer.output_images import check_folder, parameters, save_picture
    from fact_infer.parts import find_face_files
    from fact_infer.photos import prepare_crops
    from fact_infer.pipeline import generate_batches

    check_folder(arguments.out)
    base = read_base(arguments.base)
    base.check(request)
    read_inputs(request, base, 1, note=lambda line: print(f"note: {line}", file=sys.stderr))
    warn_of_cut_prompts(base, [*request.prompts, request.negative])
    if arguments.controlnet:
        check_controlnet(base, arguments.controlnet)
    face = crops = None
    if arguments.encoder and not arguments.adapter:
        raise UserError("--encoder is for an adapter: give --adapter too, or neither")
    if arguments.adapter:
        face = read_face_files(*find_face_files(arguments.adapter, arguments.encoder))
    check_faces(face, len(request.photos))
    if face is not None:
        crops, notes = prepare_crops(request.photos, face.encoder_config.img_size)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    # Where a mask keeps pixels of a picture, a model has drawn a part only.
    whole, part = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
    how = {"suffix": f".{arguments.format}", "source": part if request.image_mask else whole}
    ranking = None
    if arguments.best is not None:
        ranking = _ranking(request, face, crops)
    more = {"loras": arguments.lora, "controlnet": arguments.controlnet}
    check_safety = load_safety_checker(base, arguments.safety_checker)
    drawer = load_drawer(arguments.backend, arguments.precision, base, face, **more)
    todo, group, written = iter(request.pictures()), [], []
    with _progress(request, arguments.batch) as bar:
        for pictures in generate_batches(drawer, request, crops, batch=arguments.batch, bar=bar):
            for image in check_safety(pictures):
                prompt, seed = next(todo)
                values = parameters(request, prompt, seed, base, **drawing_files(arguments))
                if ranking is not None:
                    values["similarity"] = ranking.similarity(image)
                group.append((image, values))
                if ranking is not None and len(group) < arguments.count:
                    continue
                for image, values in _best(group, arguments.best):
                    tqdm.write(str(save_picture(image, arguments.out, values, **how)))
                    written.append((image, values))
                group.clear()
    if arguments.sheet:
        print(_save_sheet(written, arguments, how["source"]))


def _ranking(request, face, crops):
    """What orders a prompt's pictures, with a line for the user where no detector finds faces."""
    from fact_infer.evaluation.ranking import Ranking
    from fact_infer.photos import prepare
    from fact_jax.face.landmarks import local_pack

    photo, points = request.photos[0], None
    if local_pack(photo.pack) is None:
        found = prepare(photo, face.encoder_config.img_size)
        points = found.points / found.image.shape[1::-1]
        print(
            f"note: no detector: likeness is judged where the face lies in {photo.path}",
            file=sys.stderr,
        )
    return Ranking(face, crops, photo.pack, points)


def warn_of_cut_prompts(base, prompts: list[str]) -> None:
    """Say what the text encoder will not read."""
    for line in base.cut_prompts(prompts):
        print(f"warning: {line}", file=sys.stderr)


def drawing_files(arguments: argparse.Namespace) -> dict[str, str | None]:
    """What draws, for the record."""
    names = ("adapter", "encoder", "controlnet", "backend", "precision")
    loras = " + ".join(f"{file}={factor:g}" for file, factor in arguments.lora)
    checked = "on" if arguments.safety_checker else None
    files = {name: getattr(arguments, name) for name in names}
    return files | {"loras": loras or None, "safety checker": checked}


def _best(group: list, count: int | None) -> list:
    """The ``count`` most similar of one prompt's pictures, the best first; None: as drawn."""
    if count is None:
        return list(group)
    from fact_infer.evaluation.ranking import best_first

    order = best_first([values["similarity"] for _, values in group])
    return [group[i] for i in order[:count]]


def _save_sheet(written: list, arguments: argparse.Namespace, source: str) -> Path:
    """A row for each prompt; returns the path."""
    from fact_infer.evaluation.ranking import labelled_sheet
    from fact_infer.output_images import picture_path, save_image

    labels = []
    for _, values in written:
        likeness = values.get("similarity")
        labels.append(f"seed {values['seed']}" + ("" if likeness is None else f"  {likeness:.2f}"))
    sheet = labelled_sheet(
        [image for image, _ in written], labels, arguments.best or arguments.count
    )
    path = picture_path(arguments.out, "sheet", f".{arguments.format}")
    return save_image(sheet, path, {"prompts": "\n".join(arguments.prompt)}, source)


def _request(arguments: argparse.Namespace):
    from fact_infer.request import MAX_PICTURES, Request

    check_control(arguments)
    if arguments.batch < 1:
        raise UserError(f"--batch must be at least 1, got {arguments.batch}")
    if not 1 <= arguments.count <= MAX_PICTURES:
        raise UserError(f"--count must lie in 1..{MAX_PICTURES:,}, got {arguments.count:,}")
    if arguments.best is not None:
        if not 1 <= arguments.best <= arguments.count:
            raise UserError(f"--best must lie in 1..{arguments.count} (--count)")
        if not (arguments.photo and arguments.adapter):
            raise UserError("--best compares with photos: give --photo and --adapter")
        if any(arguments.person):
            raise UserError("--best compares with the photos of one person, not of several")
    return Request(
        prompts=arguments.prompt,
        seeds=range(arguments.seed, arguments.seed + arguments.count),
        photos=sorted(read_photos(arguments), key=lambda photo: photo.person),
        regions=arguments.region,
        image=arguments.image,
        image_mask=arguments.image_mask,
        strength=arguments.strength,
        control=arguments.control,
        control_scale=arguments.control_scale,
        negative=arguments.negative,
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance=read_guidance(arguments),
        height=arguments.height,
        width=arguments.width,
    )


def read_photos(arguments: argparse.Namespace) -> list:
    """The photos of the command line, each with its points, mask and so on."""
    from fact_infer.request import Photo

    columns = [arguments.photo]
    for name in ("points", "mask", "parsing", "face_index", "person"):
        column = getattr(arguments, name, [])
        if column and len(column) != len(arguments.photo):
            raise UserError(
                f"--{name.replace('_', '-')} was given {len(column)} times for "
                f"{len(arguments.photo)} photos: "
                "give it once for each, in their order, or not at all"
            )
        columns.append(column or [None] * len(arguments.photo))
    return [
        Photo(
            path=path,
            points=points,
            mask=mask,
            parsing=parsing,
            index=index,
            pack=arguments.detector,
            person=person or 0,
        )
        for path, points, mask, parsing, index, person in zip(*columns, strict=True)
    ]


def load_drawer(backend: str, precision: str, base, face, **more):
    """The pipeline of a backend; UserError where PyTorch is asked for and not there.

    ``more`` is what is added to the base, as the pipelines' ``load`` takes it.
    """
    if backend == "flax":
        import jax.numpy as jnp

        from fact_infer.guidance import keep_programs
        from fact_infer.jax.pipeline import FlaxPipeline

        keep_programs()
        return FlaxPipeline.load(base, face=face, dtype=jnp.dtype(precision), **more)
    try:
        import torch
        import transformers

        # Its start tells a user of diffusers nothing that they could act on.
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
    except ImportError as error:
        raise UserError(
            f"--backend torch needs PyTorch and diffusers ({error}): pip install 'fact-jax[torch]'"
        ) from None
    from fact_infer.torch.pipeline import TorchPipeline

    return TorchPipeline.load(base, face=face, dtype=getattr(torch, precision), **more)


def load_safety_checker(base, wanted: bool):
    """What pictures go through before they are written; a line where a base's own is left out."""
    if not wanted:
        if base.has_safety_checker:
            print(
                f"note: the safety checker of {base.name} is left out (--safety-checker keeps it)",
                file=sys.stderr,
            )
        return lambda pictures: pictures
    try:
        from fact_infer.torch.safety_checker import SafetyChecker
    except ImportError as error:
        raise UserError(
            f"--safety-checker needs PyTorch and diffusers ({error}): pip install 'fact-jax[torch]'"
        ) from None
    checker = SafetyChecker(base)

    def check(pictures):
        pictures, marked = checker(pictures)
        if marked.any():
            print(
                f"warning: the safety checker marked {marked.sum()} of {len(pictures)} pictures: "
                "they are black",
                file=sys.stderr,
            )
        return pictures

    return check


@contextlib.contextmanager
def _progress(request, batch: int):
    """A bar over all calls of the UNet; None where nobody watches."""
    from tqdm import tqdm

    from fact_infer.img2img import first_step
    from fact_jax.diffusion.samplers import num_model_calls

    batches = -(-len(request.pictures()) // max(batch, 1))
    start = first_step(request.strength, request.steps) if request.image else 0
    total = batches * num_model_calls(request.sampler, request.steps, start)
    with tqdm(total=total, desc="drawing", unit="step", disable=None) as bar:
        yield None if bar.disable else bar
