"""The part of the page where people are put into photos of others."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from fact_infer.ui import people as faces
from fact_infer.ui.controls import Controls
from fact_infer.ui.drawing import Desk, files_of, sentence
from fact_infer.ui.people import Shot
from fact_infer.ui.photos import PhotoPanel
from fact_infer.ui.style import PRIVATE, state
from fact_jax.utils.errors import UserError

_FILES = {
    "area": "Grey masks instead of faces: one for each person, as large as the template",
    "control": "What the ControlNet looks at: one for each template, as large as it",
}


class TemplateTab:
    """Templates, their faces, and the people of ``people`` put into them."""

    def __init__(self, desk: Desk, defaults: dict[str, Any], people: Sequence[gr.State]):
        self.desk, self.people = desk, len(people)
        service = desk.service
        prompt = {"prompt": "a portrait of a person"}
        self.controls = Controls(service.operations["redraw"].fields, defaults | prompt)
        self.file_names = ["area", *(["control"] if service.operator.controlnet else [])]
        gr.Markdown("Puts the people chosen under **Portrait** into faces of other photos.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5):
                panel = PhotoPanel(
                    service, "Templates", "template", "Faces in the templates: choose one of each"
                )
                every = gr.Checkbox(True, label="Redraw every face", info="not the chosen alone")
                self.controls.add("prompt", "seed", "steps", "strength", "face_scale")
                with gr.Accordion("Advanced", open=False):
                    self.controls.add_rest(("person", "face_index", "face"))
                    files = [
                        gr.File(label=_FILES[name], file_count="multiple", height=110)
                        for name in self.file_names
                    ]
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
                gallery = gr.Gallery(
                    label="All of them: choose one to compare",
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    elem_classes="shown",
                    visible=False,
                    allow_preview=False,
                    interactive=False,
                    format="png",
                    elem_id="redrawn-all",
                    buttons=[],
                )
                out = gr.File(label="Files: pictures and their records", visible=False)
        pairs = gr.State([])
        draw.click(
            self._redraw,
            [panel.shots, every, *people, *files, *self.controls.components],
            [said, preview, slider, gallery, pairs, out],
            **PRIVATE,
        )
        stop.click(desk.cancel, queue=False, **PRIVATE)
        gallery.select(_chosen, [pairs], [slider], **PRIVATE)

    def _redraw(self, request: gr.Request, *values: Any) -> Iterator[tuple]:
        shots, everyone, *rest = values
        nothing = [gr.update()] * 4
        try:
            given = self._given(shots, everyone, rest)
        except UserError as error:
            yield state(sentence(error), wrong=True), gr.update(), *nothing
            return
        for look in self.desk.draw("redraw", given, request.session_hash):
            preview = gr.update(value=look.preview, visible=look.preview is not None)
            if not look.done:
                yield look.html, preview, *nothing
                continue
            pairs = [
                (str(shot.photo), str(picture.path))
                for shot, picture in zip(shots, look.pictures, strict=True)
            ]
            drawn = [(after, shot.name) for (_, after), shot in zip(pairs, shots, strict=True)]
            several = gr.update(value=drawn, visible=len(drawn) > 1)
            files = gr.update(value=files_of(look), visible=True)
            yield look.html, preview, pairs[0], several, pairs, files

    def _given(self, shots: list[Shot], everyone: bool, rest: list[Any]) -> dict[str, Any]:
        """The request of what the page holds; UserError where something is missing."""
        people, rest = rest[: self.people], rest[self.people :]
        files, rest = rest[: len(self.file_names)], rest[len(self.file_names) :]
        given = self.controls.given(rest) | faces.request_of(people)
        for name, paths in zip(self.file_names, files, strict=True):
            if paths:
                given[name] = [Path(path).read_bytes() for path in paths]
        placed = given.get("area") or given.get("box")
        unmarked = faces.unmarked(shots)
        if not shots or (unmarked and not placed):
            raise UserError("choose a template, and mark a face in it, first")
        if "photo" not in given:
            raise UserError("choose a person under Portrait first")
        given["templates"] = [shot.photo.read_bytes() for shot in shots]
        if unmarked is None:
            given["template_points"] = [
                {"faces": [{"points": points} for points in shot.faces]} for shot in shots
            ]
        if not (everyone or placed) and set(given["person"]) == {0}:
            chosen = {shot.chosen for shot in shots}
            if len(chosen) > 1:
                raise UserError(
                    "choose the face of the same number in every template, or redraw every face"
                )
            given["face"] = chosen.pop()
        return given


def _chosen(pairs: list[tuple[str, str]], event: gr.SelectData) -> tuple[str, str]:
    return pairs[int(event.index)]
