"""The command ``redraw``."""

import argparse
import dataclasses
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    add_control_scale,
    add_files,
    add_guidance_options,
    add_models,
    add_person_option,
    add_photo_options,
    add_sampling,
    check_control,
    read_guidance,
    read_photos,
)
from fact_jax.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from fact_infer.parts import Parts
    from fact_infer.request import GenerationParams, Photo
    from fact_infer.service.work import RedrawWork, Work
    from fact_infer.templates import FaceTarget, InpaintRequest, Template

_HOW = ("strength", "control_scale", "fill", "grow", "soften")
_WHERE = ("face", "box", "area")


def add_redraw(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "redraw",
        help="put people into the faces of template photos",
        description="Redraw faces of template photos as other people, by masked image-to-image. "
        "Outside a face's soft mask every pixel stays the template's own. The photos are of one "
        "person, unless --person says otherwise. --face, --box or --area says where a person is "
        "put, once for each; without them a single person takes the place of every face, and "
        "several take the faces from the left.",
    )
    command.set_defaults(run=_redraw)
    command.add_argument("templates", nargs="+", type=Path, metavar="TEMPLATE")
    add_models(command.add_argument_group("models"))
    add_request_options(command)
    add_files(command.add_argument_group("files"), "redrawn")


def add_request_options(command: argparse.ArgumentParser) -> None:
    """Options of one request, whoever loads the models and names the templates."""
    group = command.add_argument_group("people")
    add_photo_options(group, several=True)
    add_person_option(group, "whose photo it is, if they are of several people")
    _add_targets(group)
    add_guidance_options(command.add_argument_group("face"))
    _add_picture_options(command.add_argument_group("picture"))


def _add_targets(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--face",
        type=int,
        action="append",
        metavar="N",
        help="the template's face for the person, from 0 at the left; once for each person",
    )
    group.add_argument(
        "--box",
        action="append",
        metavar="L,T,R,B",
        help="a box around that face instead, in pixels; once for each person. Where there are "
        "neither points beside the template nor a detector, the ellipse in it is redrawn",
    )
    group.add_argument(
        "--area",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a grey mask instead, as large as the template and white where the person's face is "
        "drawn; once for each person",
    )


def _add_picture_options(group: argparse._ActionsContainer) -> None:
    group.add_argument("--prompt", default="a portrait of a person", metavar="TEXT")
    add_sampling(group)
    group.add_argument(
        "--control",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="what the ControlNet looks at (a pose, edges), as large as the template; once for "
        "each template",
    )
    add_control_scale(group)
    for name, default, text in (
        ("strength", 0.6, "share of the steps that are drawn anew"),
        ("fill", 0.7, "share of the redrawn square's side that the face takes"),
        ("grow", 0.1, "how far the mask is widened, in shares of the face"),
        ("soften", 0.15, "over how much it then fades out"),
    ):
        group.add_argument(
            f"--{name}", type=float, default=default, metavar="X", help=f"{text} ({default})"
        )


def _redraw(arguments: argparse.Namespace) -> None:
    people = _people(arguments)

    from tqdm import tqdm

    from fact_infer.output_images import check_folder

    check_folder(arguments.out)
    parts = open_parts(arguments)
    work = _plan(arguments, people, parts, note, warn)
    check_safety = load_safety_checker(parts.base, arguments.safety_checker)
    work = dataclasses.replace(work, check_safety=check_safety)
    pipeline = load_pipeline(arguments, parts)
    total = sum(len(request.targets) for request in work.requests)
    with tqdm(total=len(work.requests), desc=f"redrawing {total} faces", disable=None) as bar:
        for picture in work.draw(pipeline):
            path = picture.save(arguments.out, f".{arguments.format}")
            bar.update()
            tqdm.write(str(path))


def plan_redraw(arguments: argparse.Namespace, parts: "Parts", note: Say, warn: Say) -> "Work":
    """What the arguments ask for, checked, with its files read; UserError if it cannot be."""
    return _plan(arguments, _people(arguments), parts, note, warn)


def _plan(
    arguments: argparse.Namespace,
    people: list[list["Photo"]],
    parts: "Parts",
    note: Say,
    warn: Say,
) -> "RedrawWork":
    from fact_infer.photos import prepare_crops
    from fact_infer.request import GenerationParams
    from fact_infer.service.work import RedrawWork
    from fact_infer.templates import InpaintParams, check_requests

    params = GenerationParams(
        negative=arguments.negative,
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance=read_guidance(arguments),
    )
    how = InpaintParams(**{name: getattr(arguments, name) for name in _HOW})
    base, face = parts.base, parts.face
    assert face is not None  # _people wants --adapter
    base.check(params)
    for line in base.cut_prompts([arguments.prompt, arguments.negative]):
        warn(line)
    prepared = [prepare_crops(photos, face.encoder_config.img_size) for photos in people]
    notes = [line for _, found in prepared for line in found]
    requests = _requests(arguments, [crops for crops, _ in prepared], notes)
    for line in notes:
        note(line)
    check_requests(base, requests, params, how, arguments.batch)
    return RedrawWork(
        batch=arguments.batch,
        requests=requests,
        params=params,
        how=how,
        names=[f"{path.stem}-redrawn" for path in arguments.templates],
        records=[_values(arguments, params, request) for request in requests],
    )


def _people(arguments: argparse.Namespace) -> list[list["Photo"]]:
    """The photos of each person; UserError where options do not go together."""
    from fact_infer.request import by_person

    if not (arguments.adapter and arguments.photo):
        raise UserError("--adapter and at least one --photo are needed")
    check_control(arguments)
    if arguments.control and len(arguments.control) != len(arguments.templates):
        raise UserError("give --control once for each template, in their order")
    people = by_person(read_photos(arguments))
    chosen = [getattr(arguments, name) for name in _WHERE if getattr(arguments, name)]
    if len(chosen) > 1 or any(len(targets) != len(people) for targets in chosen):
        raise UserError(
            "give --face, --box or --area once for each person, in their order, or none of them "
            f"(people: {len(people)}; --person with each --photo says whose it is)"
        )
    return people


def _requests(
    arguments: argparse.Namespace, people: list["np.ndarray"], notes: list[str]
) -> list["InpaintRequest"]:
    """An ``InpaintRequest`` for each template; notes for the user are added to ``notes``."""
    from fact_infer.templates import InpaintRequest, find_template, read_template
    from fact_jax.face import can_find_faces, read_image
    from fact_jax.face.mask import read_mask

    areas = [read_mask(file) for file in arguments.area]
    controls = [read_image(file) for file in arguments.control]  # none, or one for each
    requests = []
    for path, control in itertools.zip_longest(arguments.templates, controls):
        if areas:
            template = read_template(path)
        elif arguments.box and not can_find_faces(path, arguments.detector):
            template = read_template(path)
            notes.append(f"{path}: no points and no detector: the ellipse in the box is redrawn")
        else:
            template, found = find_template(path, pack=arguments.detector)
            notes += [found] if found else []
        requests.append(
            InpaintRequest(
                template=template,
                targets=_targets(template, people, areas, arguments),
                prompt=arguments.prompt,
                seed=arguments.seed,
                control=control,
            )
        )
    return requests


def _targets(
    template: "Template",
    people: list["np.ndarray"],
    areas: list["np.ndarray"],
    arguments: argparse.Namespace,
) -> tuple["FaceTarget", ...]:
    """The ``FaceTarget`` of each person in a template."""
    from fact_infer.templates import FaceTarget
    from fact_jax.face.mask import box_mask

    boxes = [_box(text) for text in arguments.box or ()]
    if boxes and not template.faces:
        shape = template.image.shape[:2]
        areas = [box_mask(shape, box) for box in boxes]
        for text, area in zip(arguments.box, areas, strict=True):
            if area.sum() < 1.0:
                raise UserError(
                    f"--box {text} lies outside of {template.name}, "
                    f"which is {shape[1]} x {shape[0]}"
                )
    if areas:
        return tuple(FaceTarget(crops=c, mask=area) for c, area in zip(people, areas, strict=True))
    if arguments.face:
        indices = arguments.face
    elif arguments.box:
        indices = [template.face_in(box) for box in boxes]
    elif len(people) == 1:
        indices = range(len(template.faces))
        people = people * len(indices)
    else:
        indices = range(len(people))
    if len(set(indices)) < len(indices):
        raise UserError(f"{template.name}: two people are meant for the same face")
    return tuple(FaceTarget(crops=c, index=i) for c, i in zip(people, indices, strict=True))


def _box(text: str) -> list[float]:
    try:
        left, top, right, bottom = map(float, text.split(","))
    except ValueError:
        left = top = right = bottom = 0.0
    if not (-math.inf < left < right < math.inf and -math.inf < top < bottom < math.inf):
        raise UserError(f"--box {text}: expected left,top,right,bottom in pixels")
    return [left, top, right, bottom]


def _values(
    arguments: argparse.Namespace, params: "GenerationParams", request: "InpaintRequest"
) -> dict[str, Any]:
    """Everything that a picture was made from, ready for JSON."""
    from fact_infer.output_images import guidance_record

    photos = [path.name for path in arguments.photo]
    values = {
        "prompt": arguments.prompt,
        "negative": arguments.negative,
        "template": request.template.name,
        **{name: getattr(arguments, name) for name in ("seed", "sampler", "steps", "guidance")},
        **{name: getattr(arguments, name) for name in _HOW},
        "face": {"photos": photos, **guidance_record(params.guidance)},
        "person": arguments.person or [0] * len(photos),
        "base": arguments.base,
        **drawing_files(arguments),
    }
    targets = [(name, target) for name in _WHERE for target in getattr(arguments, name) or ()]
    named = {
        "where": [f"{k} {v.name if isinstance(v, Path) else v}" for k, v in targets],
        "control": [path.name for path in arguments.control],
    }
    return values | {name: given for name, given in named.items() if given}
