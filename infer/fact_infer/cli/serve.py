"""The commands ``serve`` and ``ui``: the models stay loaded, and requests come over HTTP."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fact_infer.cli import generate, redraw
from fact_infer.cli.models import load_pipeline, load_safety_checker, open_parts
from fact_infer.cli.options import add_models, add_photo_options
from fact_jax.utils.command_line import ArgumentParser
from fact_jax.utils.errors import UserError
from fact_jax.utils.miniature import require_miniature

if TYPE_CHECKING:
    from fastapi import FastAPI

    from fact_infer.service.operations import Operation, Service

_MINIATURE = {
    "--base": "miniature/base",
    "--adapter": "miniature/adapter/adapter.safetensors",
    "--encoder": "miniature/encoder",
}
_PEOPLE = 6
_TOKEN = "FACT_INFER_TOKEN"
_LIMITS = (
    ("queue", int, 8, "N", "requests that are not finished; one more gets status 429"),
    ("merge", int, 1, "N", "draw up to N requests in one batch where no bit changes by it"),
    ("max-body", float, 32, "MB", "of a request"),
    ("max-steps", int, 200, "N", "of a request"),
    ("max-pictures", int, 16, "N", "pictures, or faces of templates, of a request"),
    ("max-pixels", float, 8, "MP", "of all pictures of a request together, in millions"),
    ("max-seconds", float, 600, "S", "that a request may be drawn"),
    ("body-seconds", float, 20, "S", "in which a request must have arrived"),
    ("keep", float, 600, "S", "that results stay"),
)
# What the operator says.
_OPERATOR = ("detector", "batch")


def add_serve(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "serve",
        help="an HTTP API that keeps the models loaded",
        description="Answer POST /v1/generate, /v1/redraw and /v1/faces, whose fields are the "
        "options of the commands of that name; /docs says everything. Without --base the shipped "
        "miniature is served. SIGTERM finishes what is drawn and refuses the rest.",
    )
    command.set_defaults(run=_run)
    _add_options(command, 8000)


def _add_options(command: argparse.ArgumentParser, port: int) -> None:
    models = command.add_argument_group("models")
    add_models(models)
    for action in models._group_actions:
        if action.dest == "base":
            action.required = False
            action.help = f"{action.help} (default: {_MINIATURE['--base']} with its adapter)"
    models.add_argument(
        "--detector", metavar="PACK", help="insightface model pack, a folder or a name"
    )
    models.add_argument(
        "--batch", type=int, default=4, metavar="N", help="pictures at a time (default 4)"
    )
    group = command.add_argument_group("server")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="address to listen at (default 127.0.0.1, this machine alone; 0.0.0.0: all)",
    )
    group.add_argument("--port", type=int, default=port, metavar="N", help=f"default {port}")
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"who asks must send the token in it (or in the variable {_TOKEN})",
    )
    for name, kind, default, unit, text in _LIMITS:
        group.add_argument(
            f"--{name}", type=kind, default=default, metavar=unit, help=f"{text} ({default})"
        )


def add_ui(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "ui",
        help="a page in the browser where portraits are made",
        description="Open a page for making portraits, with the API of `serve` behind it. Without "
        "--base it uses the shipped miniature and offers people who do not exist.",
    )
    command.set_defaults(run=lambda arguments: _run(arguments, page=True))
    _add_options(command, 7860)


def _run(arguments: argparse.Namespace, *, page: bool = False) -> int | None:
    shipped = arguments.base is None
    limits, token = _limits(arguments), _token(arguments)
    _default_models(arguments)
    try:
        from fact_infer.service.engine import Engine, Limits
        from fact_infer.service.http.api import build_app
        from fact_infer.service.http.guard import is_loopback, warning_of
        from fact_infer.service.http.server import listen, run
        from fact_infer.service.operations import Service
    except ModuleNotFoundError as error:
        extra = "ui" if page else "serve"
        raise UserError(f"{error}: pip install 'fact-jax[{extra}]'") from None
    parts = open_parts(arguments)
    check_safety = load_safety_checker(parts.base, arguments.safety_checker)
    sock = listen(arguments.host, arguments.port)
    if (line := warning_of(arguments.host, token)) is not None:
        print(f"warning: {line}", file=sys.stderr)
    engine = Engine(lambda: load_pipeline(arguments, parts), Limits(**limits))
    service = Service(engine, parts, operations(parts.face is not None), arguments, check_safety)
    app = build_app(service, token=token, loopback=is_loopback(arguments.host))
    if page:
        app = _with_page(app, service, token, shipped)

    def ready(address: str) -> None:
        what = "a page" if page else "an API"
        print(f"{address}: {what} for {parts.base.name}; what can be asked: {address}/docs")
        sys.stdout.flush()

    return run(app, engine, sock, ready)


def _with_page(app: "FastAPI", service: "Service", token: str | None, shipped: bool) -> "FastAPI":
    """The application with the page, which offers made-up people where the miniature is shipped."""
    try:
        from fact_infer.ui.page import mount
    except ModuleNotFoundError as error:
        raise UserError(f"{error}: pip install 'fact-jax[ui]'") from None
    from fact_infer.evaluation.portrait_files import write_portraits

    people = write_portraits("test", _PEOPLE, 1, service.engine.root / "people") if shipped else []
    return mount(app, service, token, people)


def operations(with_face: bool) -> list["Operation"]:
    """What can be asked for, by the options of the commands."""
    from fact_infer.service.fields import fields_of
    from fact_infer.service.operations import Operation

    drawing, over, photo = (ArgumentParser(add_help=False) for _ in range(3))
    generate.add_request_options(drawing)
    over.add_argument("templates", nargs="+", type=Path, help="the photos whose faces are redrawn")
    over.add_argument(
        "--template-points",
        type=Path,
        action="append",
        default=[],
        help="the points of a template's faces as JSON, once for each template",
    )
    redraw.add_request_options(over)
    photo.add_argument("photo", type=Path, help="a photo with one face or several")
    add_photo_options(photo, several=False)
    fields, photo_fields = (fields_of(each, _OPERATOR) for each in (drawing, photo))
    photo_fields = [field for field in photo_fields if field.name != "face_index"]
    plan = generate.plan_generate
    found = [
        Operation("generate", "draw pictures of prompts", fields, plan),
        Operation("faces", "find the faces of a photo", photo_fields, redraw.plan_redraw),
    ]
    if with_face:
        over_fields = fields_of(over, _OPERATOR)
        text = "put people into the faces of templates"
        found.append(Operation("redraw", text, over_fields, redraw.plan_redraw))
    return found


def _default_models(arguments: argparse.Namespace) -> None:
    if arguments.base is None:
        if arguments.adapter or arguments.encoder or arguments.controlnet or arguments.lora:
            raise UserError("--adapter, --encoder, --controlnet and --lora are for a base: --base")
        require_miniature(_MINIATURE)
        for option, path in _MINIATURE.items():
            setattr(arguments, option[2:], path)


def _limits(arguments: argparse.Namespace) -> dict[str, Any]:
    for name, *_ in (*_LIMITS, ("batch",)):
        value = getattr(arguments, name.replace("-", "_"))
        if not 0 < value < float("inf"):
            raise UserError(f"--{name} must be above 0, got {value:g}")
    return {
        "queue": arguments.queue,
        "merge": arguments.merge,
        "body": int(arguments.max_body * (1 << 20)),
        "steps": arguments.max_steps,
        "pictures": arguments.max_pictures,
        "pixels": int(arguments.max_pixels * 1e6),
        "seconds": arguments.max_seconds,
        "body_seconds": arguments.body_seconds,
        "keep": arguments.keep,
    }


def _token(arguments: argparse.Namespace) -> str | None:
    if arguments.token_file is None:
        return os.environ.get(_TOKEN) or None
    try:
        token = arguments.token_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"--token-file {arguments.token_file}: {reason}") from None
    if not token:
        raise UserError(f"--token-file {arguments.token_file} is empty")
    return token
