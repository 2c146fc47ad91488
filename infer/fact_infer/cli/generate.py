"""The command ``generate``."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fact_infer.cli.models import (
    drawing_files,
    load_pipeline,
    load_safety_checker,
    note,
    open_parts,
    warn_of_cut_prompts,
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
    from fact_infer.output_images import Source
    from fact_infer.parts import FaceModels
    from fact_infer.request import GenerationRequest

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
    face = command.add_argument_group("face")
    add_photo_options(face, several=True)
    add_guidance_options(face)
    add_people_options(face)
    add_input_options(command.add_argument_group("pictures to start from"))
    _add_picture_options(command.add_argument_group("picture"))


def _add_picture_options(group: argparse._ActionsContainer) -> None:
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
    group.add_argument("--sheet", action="store_true", help="write all of them on one sheet too")
    add_files(group, "portraits")


def _generate(arguments: argparse.Namespace) -> None:
    request = _request(arguments)

    from tqdm import tqdm

    from fact_infer.input_images import read_inputs
    from fact_infer.output_images import check_folder, parameters, save_picture
    from fact_infer.photos import prepare_crops
    from fact_infer.pipeline import generate_batches

    check_folder(arguments.out)
    parts = open_parts(arguments)
    base, face, crops = parts.base, parts.face, None
    base.check(request)
    read_inputs(request, base, 1, note)
    warn_of_cut_prompts(base, [*request.prompts, request.negative])
    parts.check_photos(len(request.photos))
    if face is not None:
        crops, notes = prepare_crops(request.photos, face.encoder_config.img_size)
        for line in notes:
            note(line)
    # Where a mask keeps pixels of a picture, a model has drawn a part only.
    source: Source = "trainedAlgorithmicMedia"
    if request.image_mask is not None:
        source = "compositeWithTrainedAlgorithmicMedia"
    suffix, ranking = f".{arguments.format}", None
    if arguments.best is not None and face is not None and crops is not None:
        ranking = _ranking(request, face, crops)
    check_safety = load_safety_checker(base, arguments.safety_checker)
    pipeline = load_pipeline(arguments, parts)
    todo, group, written = iter(request.pictures()), [], []
    with _progress(request, arguments.batch) as bar:
        for pictures in generate_batches(pipeline, request, crops, batch=arguments.batch, bar=bar):
            for image in check_safety(pictures):
                prompt, seed = next(todo)
                values = parameters(request, prompt, seed, base, **drawing_files(arguments))
                if ranking is not None:
                    values["similarity"] = ranking.similarity(image)
                group.append((image, values))
                if ranking is not None and len(group) < arguments.count:
                    continue
                for image, values in _best(group, arguments.best):
                    path = save_picture(image, arguments.out, values, suffix=suffix, source=source)
                    tqdm.write(str(path))
                    written.append((image, values))
                group.clear()
    if arguments.sheet:
        print(_save_sheet(written, arguments, source))


def _ranking(
    request: "GenerationRequest", face: "FaceModels", crops: "np.ndarray"
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


def _best(group: list, count: int | None) -> list:
    """The ``count`` most similar of one prompt's pictures, the best first; None: as drawn."""
    if count is None:
        return list(group)
    from fact_infer.evaluation.ranking import best_first

    order = best_first([values["similarity"] for _, values in group])
    return [group[i] for i in order[:count]]


def _save_sheet(written: list, arguments: argparse.Namespace, source: "Source") -> Path:
    """A row for each prompt; returns the path."""
    import numpy as np

    from fact_infer.output_images import picture_path, save_image
    from fact_jax.utils.contact_sheet import contact_sheet

    labels = []
    for _, values in written:
        likeness = values.get("similarity")
        labels.append(f"seed {values['seed']}" + ("" if likeness is None else f"  {likeness:.2f}"))
    images = np.stack([image for image, _ in written])
    columns = arguments.best or arguments.count
    sheet = contact_sheet(images, columns, gap=6, border=6, captions=labels)
    path = picture_path(arguments.out, "sheet", f".{arguments.format}")
    return save_image(sheet, path, {"prompts": "\n".join(arguments.prompt)}, source)


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
def _progress(request: "GenerationRequest", batch: int) -> Iterator["tqdm | None"]:
    """Progress bar over all calls of the UNet; None where stderr is no terminal."""
    from tqdm import tqdm

    from fact_infer.img2img import first_step
    from fact_jax.diffusion.samplers import num_model_calls

    batches = -(-len(request.pictures()) // max(batch, 1))
    start = first_step(request.strength, request.steps) if request.image else 0
    total = batches * num_model_calls(request.sampler, request.steps, start)
    with tqdm(total=total, desc="drawing", unit="step", disable=None) as bar:
        yield None if bar.disable else bar
