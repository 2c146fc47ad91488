"""``fact-infer redraw``: its options, and what it calls."""

import argparse
import sys
from pathlib import Path

from fact_jax.errors import UserError
from infer.cli_controls import (
    add_base_options,
    add_control_scale,
    add_person_option,
    add_steering_options,
    check_control,
    read_guidance,
)
from infer.cli_generate import (
    add_files,
    add_models,
    add_photo_options,
    add_sampling,
    load_drawer,
    read_photos,
)


def add_redraw(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "redraw",
        help="put people into the faces of template photos",
        description="Redraw faces of template photos as other people, by masked image-to-image. "
        "Outside a face's soft mask every pixel stays the template's own. Each --photo is one "
        "person, unless --person says otherwise; without --face and --box a single person takes "
        "the place of every face, and several take the faces from the left.",
    )
    command.set_defaults(run=_redraw)
    command.add_argument("templates", nargs="+", type=Path, metavar="TEMPLATE")
    models = command.add_argument_group("models")
    add_models(models)
    add_base_options(models)
    group = command.add_argument_group("people")
    add_photo_options(group, several=True)
    add_person_option(group, "whose photo it is, if there are several of a person")
    _add_places(group)
    add_steering_options(command.add_argument_group("face"))
    _add_picture_options(command.add_argument_group("picture"))


def _add_places(group: argparse._ActionsContainer) -> None:
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
        help="a box around that face instead, in pixels; once for each person",
    )
    group.add_argument(
        "--area",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="grey mask of the template, white where the person's face is redrawn (default: the "
        "face as its points tell); once for each person",
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
    add_files(group, "redrawn")


def _redraw(arguments: argparse.Namespace) -> None:
    people = _people(arguments)

    from tqdm import tqdm

    from infer.base import read_base, read_face_files
    from infer.hub import find_face_files
    from infer.images import check_folder, free_name, save_image
    from infer.photos import prepare_crops
    from infer.request import Settings
    from infer.templates import Redrawing, redraw_templates

    settings = Settings(
        negative=arguments.negative,
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance=read_guidance(arguments),
    )
    names = ("strength", "control_scale", "fill", "grow", "soften")
    how = Redrawing(**{name: getattr(arguments, name) for name in names})
    check_folder(arguments.out)
    base = read_base(arguments.base)
    base.check(settings)
    face = read_face_files(*find_face_files(arguments.adapter, arguments.encoder))
    prepared = [prepare_crops(photos, face.encoder_config.img_size) for photos in people]
    notes = [note for _, found in prepared for note in found]
    jobs = _jobs(arguments, [crops for crops, _ in prepared], notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    more = {"loras": arguments.lora, "controlnet": arguments.controlnet}
    drawer = load_drawer(arguments.backend, arguments.precision, base, face, **more)
    total = sum(len(job.places) for job in jobs)
    with tqdm(total=len(jobs), desc=f"redrawing {total} faces", disable=None) as bar:
        pictures = redraw_templates(drawer, jobs, settings, how, batch=arguments.batch)
        for path, picture in zip(arguments.templates, pictures, strict=True):
            out = free_name(arguments.out, f"{path.stem}-redrawn", f".{arguments.format}")
            text = {"parameters": _describe(arguments, settings, path)}
            save_image(picture, out, text, "compositeWithTrainedAlgorithmicMedia")
            bar.update()
            tqdm.write(str(out))


def _people(arguments: argparse.Namespace) -> list[list]:
    """The photos of each person; UserError where options do not go together."""
    if not (arguments.adapter and arguments.encoder and arguments.photo):
        raise UserError("--adapter, --encoder and at least one --photo are needed")
    check_control(arguments)
    if arguments.control and len(arguments.control) != len(arguments.templates):
        raise UserError("give --control once for each template, in their order")
    photos = read_photos(arguments)
    whose = arguments.person or range(len(photos))
    people = {person: [] for person in sorted(set(whose))}
    for person, photo in zip(whose, photos, strict=True):
        people[person].append(photo)
    if list(people) != list(range(len(people))) or len({*map(len, people.values())}) > 1:
        raise UserError("photos must be of person 0, then 1 and so on, equally many of each")
    chosen = [name for name in ("face", "box") if getattr(arguments, name)]
    if len(chosen) > 1 or any(len(getattr(arguments, name)) != len(people) for name in chosen):
        raise UserError("give --face or --box once for each person, in their order, or neither")
    if arguments.area and len(arguments.area) != len(people):
        raise UserError("give --area once for each person, in their order, or not at all")
    return list(people.values())


def _jobs(arguments: argparse.Namespace, people: list, notes: list[str]) -> list:
    """What is to be done with each template; lines for the user are added to ``notes``."""
    from fact_jax.face import read_image
    from infer.templates import Job, find_template

    jobs = []
    controls = arguments.control or [None] * len(arguments.templates)
    for path, control in zip(arguments.templates, controls, strict=True):
        template, note = find_template(path, pack=arguments.detector)
        notes += [note] if note else []
        jobs.append(
            Job(
                template=template,
                places=_places(template, people, arguments),
                prompt=arguments.prompt,
                seed=arguments.seed,
                control=None if control is None else read_image(control),
            )
        )
    return jobs


def _places(template, people: list, arguments: argparse.Namespace) -> tuple:
    """Which person takes the place of which face of a template."""
    from fact_jax.face.mask import read_mask
    from infer.templates import Place

    areas = [read_mask(file) for file in arguments.area] or [None] * len(people)
    if arguments.face:
        indices = arguments.face
        for index in indices:
            template.choose(index=index)
    elif arguments.box:
        indices = [template.choose(box=_box(text))[0] for text in arguments.box]
    elif len(people) == 1 and not arguments.area:
        indices = range(len(template.faces))
        people, areas = people * len(indices), areas * len(indices)
    else:
        indices = range(len(people))
        template.choose(index=len(people) - 1)
    if len(set(indices)) < len(indices):
        raise UserError(f"{template.name}: two people are meant for the same face")
    return tuple(
        Place(index=i, crops=crops, mask=area)
        for i, crops, area in zip(indices, people, areas, strict=True)
    )


def _box(text: str) -> list[float]:
    try:
        left, top, right, bottom = map(float, text.split(","))
    except ValueError:
        raise UserError(f"--box {text}: expected left,top,right,bottom in pixels") from None
    return [left, top, right, bottom]


def _describe(arguments: argparse.Namespace, settings, template: Path) -> str:
    from infer.images import steering

    names = ("seed", "sampler", "steps", "guidance", "strength", "fill", "grow", "soften")
    values = {name: getattr(arguments, name) for name in names}
    values |= {f"face {name}": value for name, value in steering(settings.guidance).items()}
    values |= {"template": template.name, "base": arguments.base, "adapter": arguments.adapter}
    values |= {"photos": " + ".join(path.name for path in arguments.photo)}
    if arguments.lora:
        values["loras"] = " + ".join(f"{file}={factor:g}" for file, factor in arguments.lora)
    if arguments.controlnet:
        values |= {"controlnet": arguments.controlnet, "control scale": arguments.control_scale}
    lines = [arguments.prompt]
    if arguments.negative:
        lines.append(f"Negative prompt: {arguments.negative}")
    return "\n".join([*lines, ", ".join(f"{k}: {v}" for k, v in values.items())])
