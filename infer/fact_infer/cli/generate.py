"""The command ``generate``."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fact_infer.cli.models import (
    Say,
    drawing_files,
    load_pipeline,
    load_safety_checker,
    note,
    open_parts,
    warn,
)
from fact_infer.cli.options import (
    add_files,
    add_guidance_options,
    add_input_options,
    add_models,
    add_people_options,
    add_photo_options,
    add_sampling,
    add_size,
    check_control,
    read_guidance,
    read_photos,
)
from fact_jax.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

    from fact_infer.evaluation.ranking import IdentityRanking
    from fact_infer.parts import FaceModels, Parts
    from fact_infer.request import GenerationRequest
    from fact_infer.service.work import GenerateWork, Work

_REQUEST = (
    *("image", "image_mask", "strength", "control", "control_scale"),
    *("negative", "sampler", "steps", "height", "width"),
)
"""Options that are fields of a request under the same name."""


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
    add_models(command.add_argument_group("models"))
    add_request_options(command)
    add_files(command.add_argument_group("files"), "portraits")


def add_request_options(command: argparse.ArgumentParser) -> None:
    """Options of one request, whoever loads the models."""
    face = command.add_argument_group("face")
    add_photo_options(face, several=True)
    add_guidance_options(face)
    add_people_options(face)
    add_input_options(command.add_argument_group("pictures to start from"))
    group = command.add_argument_group("picture")
    group.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="may be repeated"
    )
    add_sampling(group)
    group.add_argument(
        "--count", type=int, default=1, metavar="N", help="seeds for each prompt (default 1)"
    )
    add_size(group)
    group.add_argument(
        "--best",
        type=int,
        metavar="N",
        help="of each prompt's --count pictures keep the N whose faces are most like the photos, "
        "by the encoder's own judgement; without a detector where the face lies in the first photo",
    )
    group.add_argument("--sheet", action="store_true", help="all of them on one sheet too")


def _generate(arguments: argparse.Namespace) -> None:
    request = _request(arguments)

    from tqdm import tqdm

    from fact_infer.output_images import check_folder

    check_folder(arguments.out)
    parts = open_parts(arguments)
    work = _plan(arguments, request, parts, note, warn)
    check_safety = load_safety_checker(parts.base, arguments.safety_checker)
    work = dataclasses.replace(work, check_safety=check_safety)
    pipeline = load_pipeline(arguments, parts)
    with _progress(work.steps) as bar:
        for picture in work.draw(pipeline, bar):
            tqdm.write(str(picture.save(arguments.out, f".{arguments.format}")))


def plan_generate(arguments: argparse.Namespace, parts: "Parts", note: Say, warn: Say) -> "Work":
    """What the arguments ask for, checked, with its files read; UserError if it cannot be."""
    return _plan(arguments, _request(arguments), parts, note, warn)


def _plan(
    arguments: argparse.Namespace,
    request: "GenerationRequest",
    parts: "Parts",
    note: Say,
    warn: Say,
) -> "GenerateWork":
    from fact_infer.input_images import read_inputs
    from fact_infer.photos import prepare_crops
    from fact_infer.service.work import GenerateWork

    base, face, crops, ranking = parts.base, parts.face, None, None
    base.check(request)
    read_inputs(request, base, 1, note)
    for line in base.cut_prompts([*request.prompts, request.negative]):
        warn(line)
    parts.check_photos(len(request.photos))
    if face is not None:
        crops, notes = prepare_crops(request.photos, face.encoder_config.img_size)
        for line in notes:
            note(line)
        if arguments.best is not None:
            ranking = _ranking(request, face, crops, note)
    return GenerateWork(
        batch=arguments.batch,
        request=request,
        crops=crops,
        record=drawing_files(arguments),
        ranking=ranking,
        best=arguments.best,
        sheet=arguments.sheet,
    )


def _ranking(
    request: "GenerationRequest", face: "FaceModels", crops: "np.ndarray", note: Say
) -> "IdentityRanking":
    """The ranking of a prompt's pictures; notes that there is no detector of faces."""
    from fact_infer.evaluation.ranking import IdentityRanking
    from fact_infer.photos import prepare_face
    from fact_jax.face.landmarks import local_pack

    photo, points = request.photos[0], None
    if local_pack(photo.pack) is None:
        found = prepare_face(photo, face.encoder_config.img_size)
        points = found.points / found.image.shape[1::-1]
        note(f"no detector: likeness is judged where the face lies in {photo.path}")
    return IdentityRanking(face, crops, photo.pack, points)


def _request(arguments: argparse.Namespace) -> "GenerationRequest":
    from fact_infer.request import MAX_PICTURES, GenerationRequest

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
    return GenerationRequest(
        prompts=arguments.prompt,
        seeds=range(arguments.seed, arguments.seed + arguments.count),
        photos=sorted(read_photos(arguments), key=lambda photo: photo.person),
        regions=arguments.region,
        guidance=read_guidance(arguments),
        **{name: getattr(arguments, name) for name in _REQUEST},
    )


@contextlib.contextmanager
def _progress(steps: int) -> Iterator["tqdm | None"]:
    """Progress bar over all calls of the UNet; None where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(total=steps, desc="drawing", unit="step", disable=None) as bar:
        yield None if bar.disable else bar
