"""The page where a person makes portraits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI

from fact_infer.service.operations import Service
from fact_infer.service.records import fields_of_record, read_record
from fact_infer.ui import people as faces
from fact_infer.ui.controls import Controls
from fact_infer.ui.drawing import Desk, Look, captioned, files_of, sentence
from fact_infer.ui.photos import PhotoPanel
from fact_infer.ui.style import CSS, PRIVATE, THEME, state
from fact_infer.ui.template import TemplateTab
from fact_infer.ui.uploads import UploadsOnly
from fact_jax.utils.errors import UserError

PEOPLE = 3
"""That can be in one picture."""
_SHOWN = ("prompt", "count", "seed", "steps", "face_scale")
_KEPT = 48
"""Pictures in a page's gallery."""
_PROMPT = "a portrait of a smiling person wearing a red shirt on a blue plain background"
_IDLE = "Choose a person, write what the picture shows, and press Draw."


class Page:
    """The page's components and what they do. ``made_up`` are photos of people who do not exist."""

    def __init__(self, service: Service, defaults: dict[str, Any], made_up: list[Path]):
        self.service, self.made_up, self.desk = service, made_up, Desk(service)
        self.defaults = defaults
        # OWNER/REPOSITORY, or the end of a path, whose rest is the operator's.
        name = "/".join(Path(service.parts.base.name).parts[-2:])
        with UploadsOnly(
            title="Portraits", analytics_enabled=False, delete_cache=(600, 3600)
        ) as self.blocks:
            gr.Markdown(
                f"# Portraits\nA person from one photo, in the pictures that *{name}* draws. "
                "Photos stay on this machine.",
                elem_id="title",
            )
            self.shots: list[gr.State] = []
            self.paintings: list[gr.ImageEditor] = []
            with gr.Tab("Portrait"):
                self._portrait()
            if "redraw" in service.operations:
                with gr.Tab("Template"):
                    TemplateTab(self.desk, defaults, self.shots)
                with gr.Tab("Compare"):
                    self._compare()
            with gr.Tab("Read back"):
                self._read_back()
            self.blocks.unload(self.desk.cancel)

    # ---------------------------------------------------------------- portrait

    def _portrait(self) -> None:
        operation = self.service.operations["generate"]
        self.controls = Controls(operation.fields, self.defaults)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4):
                if self.service.parts.face is not None:
                    gr.Markdown("## Who")
                    self._person(0)
                    with gr.Accordion("More people in the picture", open=False):
                        self._more_people()
                self.inputs = self._inputs()
                with gr.Accordion("Advanced", open=False):
                    self._few_steps()
                    self.schedule = gr.Textbox(
                        label="Face scale by step",
                        info="several strengths, as 0.2,1,0.6: from the first step to the last",
                    )
                    advanced = Controls(operation.fields, self.defaults)
                    advanced.add_rest(("person", "face_index", *_SHOWN))
            with gr.Column(scale=6):
                gr.Markdown("## What")
                self.controls.add("prompt")
                with gr.Row():
                    self.controls.add("face_scale", "steps")
                with gr.Row():
                    self.controls.add("count", "seed")
                self.controls.made |= advanced.made
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Cancel", elem_id="cancel")
                self.state = gr.HTML(state(_IDLE), elem_id="state")
                self.preview = gr.Image(
                    label="On the way",
                    visible=False,
                    interactive=False,
                    buttons=[],
                    height=280,
                    alt_text="the picture so far",
                    elem_id="preview",
                )
                self.gallery = gr.Gallery(
                    label="Pictures, the newest first",
                    columns=3,
                    object_fit="contain",
                    height="auto",
                    elem_id="pictures",
                    elem_classes="shown",
                    interactive=False,
                    format="png",
                )
                self.files = gr.File(label="Files: pictures and their records", visible=False)
        self.history = gr.State([])
        draw.click(
            self._draw,
            [self.history, *self._asked()],
            [self.state, self.preview, self.gallery, self.files, self.history],
            **PRIVATE,
        )
        stop.click(self.desk.cancel, queue=False, **PRIVATE)
        if self.service.operator.lora:
            few = {"sampler": "lcm", "steps": 6, "guidance": 1.0}
            self.few.click(
                lambda: self.controls.updates(few), [], self.controls.components, **PRIVATE
            )

    def _person(self, number: int) -> None:
        label = "Photos of the person" if number == 0 else f"Photos of person {number + 1}"
        panel = PhotoPanel(
            self.service,
            label,
            f"photos-{number}",
            "What is seen: choose a face",
            self.made_up if number == 0 else (),
        )
        self.shots.append(panel.shots)

    def _more_people(self) -> None:
        gr.Markdown(
            "Each is drawn where you paint; unpainted, they stand side by side. All need equally "
            "many photos.",
            elem_classes="hint",
        )
        for number in range(1, PEOPLE):
            with gr.Accordion(f"Person {number + 1}", open=False):
                self._person(number)
        self._places()

    def _places(self) -> None:
        with gr.Accordion("Where each is drawn", open=False):
            for number in range(PEOPLE):
                gr.Markdown(f"Person {number + 1}: paint the place", elem_classes="hint")
                painting = gr.ImageEditor(
                    value=np.full((240, 240, 3), 225, np.uint8),
                    label=f"Person {number + 1}: paint the place",
                    show_label=False,
                    type="numpy",
                    sources=(),
                    transforms=(),
                    brush=gr.Brush(default_size=40, colors=["#4338ca"], color_mode="fixed"),
                    layers=False,
                    canvas_size=(240, 240),
                    elem_id=f"place-{number}",
                    fixed_canvas=True,
                )
                self.paintings.append(painting)

    def _few_steps(self) -> None:
        if not self.service.operator.lora:
            return
        self.few = gr.Button("Few steps (for an LCM LoRA): lcm, 6 steps, guidance 1")

    def _inputs(self) -> list[gr.Image]:
        with gr.Accordion("Start from a picture", open=False):
            names = {
                "image": "A picture to draw over",
                "image_mask": "White where it is drawn anew",
            }
            if self.service.operator.controlnet:
                names["control"] = "What the ControlNet looks at"
            self.input_names = list(names)
            return [
                gr.Image(type="filepath", image_mode=None, label=label, height=180, format="png")
                for label in names.values()
            ]

    def _asked(self) -> list[Any]:
        """Everything that a request is made of, in the order of ``_given``."""
        return [
            *self.shots, *self.paintings, self.schedule, *self.inputs, *self.controls.components,
        ]  # fmt: skip

    def _given(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """The request of what the page holds; UserError where something is missing."""
        rest = list(values)
        people = [rest.pop(0) for _ in self.shots]
        paintings = [rest.pop(0) for _ in self.paintings]
        schedule = rest.pop(0)
        inputs = [rest.pop(0) for _ in self.inputs]
        given = self.controls.given(rest) | faces.request_of(people)
        if self.service.parts.face is not None and "photo" not in given:
            raise UserError("choose a person or bring a photo first")
        count = sum(1 for shots in people if shots)
        places = [p for p, shots in zip(paintings, people, strict=False) if shots]
        if regions := faces.regions_of(places, count):
            given["region"] = regions
        if schedule and schedule.strip():
            given["face_scale"] = schedule.strip()
        for name, path in zip(self.input_names, inputs, strict=True):
            if path:
                given[name] = Path(path).read_bytes()
        return given

    def _draw(self, request: gr.Request, history: list, *values: Any) -> Iterator[tuple]:
        nothing = gr.update()
        try:
            given = self._given(values)
        except UserError as error:
            yield state(sentence(error), wrong=True), nothing, nothing, nothing, history
            return
        for look in self.desk.draw("generate", given, request.session_hash):
            yield self._shown(look, history)

    def _shown(self, look: Look, history: list) -> tuple:
        """What changes on the page, and its gallery, the newest first."""
        preview = gr.update(value=look.preview, visible=look.preview is not None)
        if not look.done:
            return look.html, preview, gr.update(), gr.update(), history
        history = [*captioned(look), *history][:_KEPT]
        files = gr.update(value=files_of(look), visible=True)
        return look.html, preview, history, files, history

    # ---------------------------------------------------------------- compare

    def _compare(self) -> None:
        gr.Markdown(
            "The first prompt and seed of **Portrait**, drawn without the face and with it: the "
            "same noise, the same words."
        )
        with gr.Row():
            scale = gr.Slider(0.0, 2.0, 1.0, step=0.05, label="Face scale", info="with the face")
            draw = gr.Button("Compare", variant="primary", elem_id="compare")
            stop = gr.Button("Cancel")
        said = gr.HTML(state("Choose a person under Portrait, then compare."))
        slider = gr.ImageSlider(
            label="Without the face, with the face", type="filepath", format="png",
            interactive=False, max_height=520,
        )  # fmt: skip
        draw.click(self._both, [scale, *self._asked()], [said, slider], **PRIVATE)
        stop.click(self.desk.cancel, queue=False, **PRIVATE)

    def _both(self, request: gr.Request, scale: float, *values: Any) -> Iterator[tuple]:
        try:
            given = self._given(values) | {"count": 1}
            given["prompt"] = given.get("prompt", [])[:1]
        except UserError as error:
            yield state(sentence(error), wrong=True), gr.update()
            return
        paths = []
        for face_scale in (0.0, scale):
            given["face_scale"] = face_scale
            for look in self.desk.draw("generate", given, request.session_hash):
                yield look.html, gr.update()
            if not look.done:
                return
            paths.append(str(look.pictures[0].path))
        yield look.html, tuple(paths)

    # -------------------------------------------------------------- read back

    def _read_back(self) -> None:
        gr.Markdown("Any picture that was made here says how: bring one, and take its settings.")
        with gr.Row(equal_height=False):
            with gr.Column():
                file = gr.File(label="A picture (PNG or JPEG)", height=110, elem_id="made-here")
                take = gr.Button("Use these settings", variant="primary", interactive=False)
                said = gr.HTML(
                    state("The photos of a person are named in it, not held."), elem_id="read-state"
                )
            record = gr.JSON(label="Its record", elem_id="record")
        held = gr.State({})
        file.change(self._read, [file], [said, record, held, take], **PRIVATE)
        take.click(
            lambda values: [*self.controls.updates(values), state("Portrait has these settings.")],
            [held],
            [*self.controls.components, said],
            **PRIVATE,
        )

    def _read(self, file: str | None) -> tuple:
        if not file:
            return state("Bring a picture."), None, {}, gr.update(interactive=False)
        try:
            record = read_record(file)
        except UserError as error:
            text = str(error).replace(f"{Path(file).parent}/", "")
            return state(sentence(text), wrong=True), None, {}, gr.update(interactive=False)
        fields, wrong = self.controls.readable(fields_of_record(record))
        text = f"{len(fields)} settings were read."
        return state(text, notes=wrong), record, fields, gr.update(interactive=True)


def mount(app: FastAPI, service: Service, token: str | None, made_up: list[Path]) -> FastAPI:
    """The application with the page at its root, behind the token if there is one."""
    defaults: dict[str, Any] = {}
    if made_up:
        # What the miniature is used with everywhere; real models take the program's defaults.
        defaults = {"sampler": "ddim", "steps": 25, "guidance": 3.0}
        defaults["prompt"] = _PROMPT
    blocks = Page(service, defaults, made_up).blocks
    blocks.queue(default_concurrency_limit=None, api_open=False)
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        auth=None if token is None else ("fact", token),
        allowed_paths=[str(service.engine.root)],
        show_error=False,
        max_file_size=service.engine.limits.body,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=THEME,
        css=CSS,
    )
