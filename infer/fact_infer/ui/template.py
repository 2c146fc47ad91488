"""The part of the page where a person is put into a photo of others."""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from fact_infer.ui import people as faces
from fact_infer.ui.controls import Controls
from fact_infer.ui.drawing import Desk, files_of, sentence
from fact_infer.ui.photos import PhotoPanel
from fact_infer.ui.style import PRIVATE, state
from fact_jax.utils.errors import UserError


class TemplateTab:
    """A template, its faces, and the people of ``people`` put into them."""

    def __init__(self, desk: Desk, defaults: dict[str, Any], people: Sequence[gr.State]):
        self.desk, self.people = desk, len(people)
        service = desk.service
        prompt = {"prompt": "a portrait of a person"}
        self.controls = Controls(service.operations["redraw"].fields, defaults | prompt)
        gr.Markdown("Puts the people chosen under **Portrait** into faces of another photo.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5):
                panel = PhotoPanel(
                    service, "The template", "template", "Faces in the template: choose one"
                )
                every = gr.Checkbox(True, label="Redraw every face", info="not the chosen alone")
                self.controls.add("prompt", "seed", "steps", "strength", "face_scale")
                with gr.Accordion("Advanced", open=False):
                    self.controls.add_rest(("person", "face_index", "face", "box"))
            with gr.Column(scale=6):
                said = gr.HTML(state("Choose a template and press Redraw."), elem_id="redraw-state")
                with gr.Row():
                    draw = gr.Button("Redraw", variant="primary", elem_id="redraw")
                    stop = gr.Button("Cancel")
                preview = gr.Image(
                    label="On the way",
                    visible=False,
                    interactive=False,
                    buttons=[],
                    height=280,
                    alt_text="the redrawn face so far",
                )
                slider = gr.ImageSlider(
                    label="Before and after",
                    type="filepath",
                    format="png",
                    interactive=False,
                    elem_id="redrawn",
                )
                out = gr.File(label="Files: the picture and its record", visible=False)
        draw.click(
            self._redraw,
            [panel.shots, every, *people, *self.controls.components],
            [said, preview, slider, out],
            **PRIVATE,
        )
        stop.click(desk.cancel, queue=False, **PRIVATE)

    def _redraw(self, request: gr.Request, *values: Any) -> Iterator[tuple]:
        nothing = gr.update()
        shots, everyone, *rest = values
        people, rest = rest[: self.people], rest[self.people :]
        try:
            if not shots or faces.unmarked(shots):
                raise UserError("choose a template, and mark a face in it, first")
            given = self.controls.given(rest) | faces.request_of(people)
            if "photo" not in given:
                raise UserError("choose a person under Portrait first")
            template = shots[0]
            given["templates"] = template.photo.read_bytes()
            given["template_points"] = {"faces": [{"points": points} for points in template.faces]}
            if not everyone and set(given["person"]) == {0}:
                given["face"] = template.chosen
        except UserError as error:
            yield state(sentence(error), wrong=True), nothing, nothing, nothing
            return
        for look in self.desk.draw("redraw", given, request.session_hash):
            preview = gr.update(value=look.preview, visible=look.preview is not None)
            if look.done:
                both = (str(template.photo), str(look.pictures[0].path))
                files = gr.update(value=files_of(look.pictures), visible=True)
                yield look.html, preview, both, files
            else:
                yield look.html, preview, nothing, nothing
