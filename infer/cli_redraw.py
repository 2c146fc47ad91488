"""``fact-infer redraw``: its options, and what it calls."""

import argparse
import sys
from pathlib import Path

from fact_jax.errors import UserError
from infer.cli_generate import add_files, add_models, add_photo_options, add_sampling, load_drawer


def add_redraw(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "redraw",
        help="put people into the faces of template photos",
        description="Redraw faces of template photos as other people, by masked image-to-image. "
        "Outside a face's soft mask every pixel stays the template's own. Each --photo is one "
        "person; without --face and --box a single person takes the place of every face, and "
        "several take the faces from the left.",
    )
    command.set_defaults(run=_redraw)
    command.add_argument("templates", nargs="+", type=Path, metavar="TEMPLATE")
    add_models(command.add_argument_group("models"))
    group = command.add_argument_group("people")
    add_photo_options(group, several=True)
    group.add_argument(
        "--face",
        type=int,
        action="append",
        metavar="N",
        help="the template's face for the photo, from 0 at the left; once for each photo",
    )
    group.add_argument(
        "--box",
        action="append",
        metavar="L,T,R,B",
        help="a box around that face instead, in pixels; once for each photo",
    )
    group.add_argument("--face-scale", type=float, default=1.0, metavar="X", help="0 to 2 (1)")
    group = command.add_argument_group("picture")
    group.add_argument("--prompt", default="a portrait of a person", metavar="TEXT")
    add_sampling(group)
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
    if not (arguments.adapter and arguments.encoder and arguments.photo):
        raise UserError("--adapter, --encoder and at least one --photo are needed")
    chosen = [name for name in ("face", "box") if getattr(arguments, name)]
    if len(chosen) > 1 or any(
        len(getattr(arguments, name)) != len(arguments.photo) for name in chosen
    ):
        raise UserError("give --face or --box once for each --photo, in their order, or neither")

    from tqdm import tqdm

    from fact_jax.fact import Guidance
    from infer.base import read_base, read_face_files
    from infer.cli_generate import read_photos
    from infer.hub import find_face_files
    from infer.images import check_folder, free_name, save_image
    from infer.photos import prepare_crops
    from infer.request import Settings
    from infer.templates import Job, Redrawing, find_template, redraw_templates

    settings = Settings(
        negative=arguments.negative,
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance=Guidance(text=arguments.guidance, face_scale=arguments.face_scale),
    )
    how = Redrawing(
        strength=arguments.strength,
        fill=arguments.fill,
        grow=arguments.grow,
        soften=arguments.soften,
    )
    check_folder(arguments.out)
    base = read_base(arguments.base)
    files = read_face_files(*find_face_files(arguments.adapter, arguments.encoder))
    size = files.encoder_config.img_size
    people = [prepare_crops([photo], size) for photo in read_photos(arguments)]
    found = [find_template(path, pack=arguments.detector) for path in arguments.templates]
    for note in [*(n for _, notes in people for n in notes), *(note for _, note in found)]:
        if note:
            print(f"note: {note}", file=sys.stderr)
    jobs = [
        Job(
            template=template,
            places=_places(template, [crops for crops, _ in people], arguments),
            prompt=arguments.prompt,
            seed=arguments.seed,
        )
        for template, _ in found
    ]
    drawer = load_drawer(arguments.backend, arguments.precision, base, files)
    total = sum(len(job.places) for job in jobs)
    with tqdm(total=len(jobs), desc=f"redrawing {total} faces", disable=None) as bar:
        pictures = redraw_templates(drawer, jobs, settings, how, batch=arguments.batch)
        for path, picture in zip(arguments.templates, pictures, strict=True):
            out = free_name(arguments.out, f"{path.stem}-redrawn", f".{arguments.format}")
            text = {"parameters": _describe(arguments, path)}
            save_image(picture, out, text, "compositeWithTrainedAlgorithmicMedia")
            bar.update()
            tqdm.write(str(out))


def _places(template, people: list, arguments: argparse.Namespace) -> tuple:
    """Which person takes the place of which face of a template."""
    from infer.templates import Place

    if arguments.face:
        indices = arguments.face
        for index in indices:
            template.choose(index=index)
    elif arguments.box:
        indices = [template.choose(box=_box(text))[0] for text in arguments.box]
    elif len(people) == 1:
        indices = range(len(template.faces))
        people = people * len(template.faces)
    else:
        indices = range(len(people))
        template.choose(index=len(people) - 1)
    if len(set(indices)) < len(indices):
        raise UserError(f"{template.name}: two photos are meant for the same face")
    return tuple(Place(index=i, crops=crops) for i, crops in zip(indices, people, strict=True))


def _box(text: str) -> list[float]:
    try:
        left, top, right, bottom = map(float, text.split(","))
    except ValueError:
        raise UserError(f"--box {text}: expected left,top,right,bottom in pixels") from None
    return [left, top, right, bottom]


def _describe(arguments: argparse.Namespace, template: Path) -> str:
    names = ("seed", "sampler", "steps", "guidance", "strength", "fill", "grow", "soften")
    values = {name: getattr(arguments, name) for name in names}
    values |= {"face scale": arguments.face_scale, "template": template.name}
    values |= {"photos": " + ".join(path.name for path in arguments.photo)}
    return f"{arguments.prompt}\n" + ", ".join(f"{k}: {v}" for k, v in values.items())
