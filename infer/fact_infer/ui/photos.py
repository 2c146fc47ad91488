"""The part of the page where photos are brought, and their faces found and chosen."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from fact_infer.service.operations import Service
from fact_infer.ui import people as faces
from fact_infer.ui.drawing import sentence
from fact_infer.ui.people import Shot
from fact_infer.ui.style import PRIVATE, state
from fact_jax.utils.errors import UserError


class PhotoPanel:
    """Photos and the faces in them, held in ``shots``. ``made_up`` are offered for the choosing.

    Where nothing finds a face, a person marks it by five clicks, or types the points.
    """

    def __init__(
        self, service: Service, label: str, name: str, found: str, made_up: Sequence[Path] = ()
    ):
        self.service, self.made_up = service, made_up
        self.shots = gr.State([])
        if made_up:
            gr.Markdown(
                "People who do not exist: choose one, or bring photos.", elem_classes="hint"
            )
            offered = gr.Gallery(
                [(path, f"made-up person {i + 1}") for i, path in enumerate(made_up)],
                label="People who do not exist",
                show_label=False,
                columns=len(made_up),
                rows=1,
                height="auto",
                object_fit="contain",
                elem_classes=["plain", "shown", "made-up"],
                allow_preview=False,
                interactive=False,
                elem_id="made-up",
                format="png",
                buttons=[],
            )
        files = gr.File(
            label=label,
            file_count="multiple",
            file_types=["image", ".json"],
            height=150,
            elem_id=name,
        )
        said = gr.HTML(visible=False, elem_id=f"{name}-said")
        with gr.Group(visible=False) as marking:
            following = gr.Markdown()
            mark = gr.Image(
                interactive=False,
                buttons=[],
                height=320,
                label="Click the points",
                alt_text="the photo whose face is marked",
                elem_id=f"{name}-mark",
            )
            typed = gr.Textbox(
                label="Or type the five points and press Enter",
                info="x y of left eye, right eye, nose tip, left and right mouth corner, in pixels",
                elem_id=f"{name}-points",
            )
        seen = gr.Gallery(
            label=found,
            columns=1,
            height="auto",
            object_fit="contain",
            elem_classes=["shown", "faces"],
            visible=False,
            allow_preview=False,
            interactive=False,
            elem_id=f"{name}-faces",
            format="png",
            buttons=[],
        )
        shown = [self.shots, said, seen, marking, mark, following]
        files.change(self._look, [files], shown, **PRIVATE)
        mark.select(self._click, [self.shots], shown, **PRIVATE)
        typed.submit(self._type, [self.shots, typed], shown, **PRIVATE)
        seen.select(self._choose, [self.shots], shown, **PRIVATE)
        if made_up:
            offered.select(self._made_up, [], shown, **PRIVATE)

    def _look(self, files: list[str] | None) -> tuple:
        try:
            return self._seen(faces.read_shots(self.service, files or []))
        except UserError as error:
            return self._seen([], sentence(error))

    def _made_up(self, event: gr.SelectData) -> tuple:
        photo = self.made_up[int(event.index)]
        files = [photo, *(photo.with_suffix(end) for end in (".points.json", ".mask.png"))]
        return self._look([str(file) for file in files])

    def _choose(self, shots: list[Shot], event: gr.SelectData) -> tuple:
        number, face = faces.faces_of(shots)[int(event.index)]
        shots[number].chosen = face
        return self._seen(shots)

    def _click(self, shots: list[Shot], event: gr.SelectData) -> tuple:
        shot = faces.unmarked(shots)
        if shot is not None:
            shot.marks.append([float(event.index[0]), float(event.index[1])])
        return self._marked(shots, shot)

    def _type(self, shots: list[Shot], text: str) -> tuple:
        shot = faces.unmarked(shots)
        try:
            numbers = [float(word) for word in text.replace(",", " ").split()]
        except ValueError:
            numbers = []
        if len(numbers) != 2 * len(faces.NAMES):
            return self._seen(shots, "Ten numbers are wanted: x and y of five points.")
        if shot is not None:
            shot.marks = [numbers[i : i + 2] for i in range(0, len(numbers), 2)]
        return self._marked(shots, shot)

    def _marked(self, shots: list[Shot], shot: Shot | None) -> tuple:
        if shot is None or len(shot.marks) < len(faces.NAMES):
            return self._seen(shots)
        try:
            faces.look(self.service, shot)
        except UserError as error:
            shot.marks = []
            return self._seen(shots, sentence(error))
        return self._seen(shots)

    def _seen(self, shots: list[Shot], wrong: str = "") -> tuple:
        """State of a person, and what shows it."""
        missing = faces.unmarked(shots)
        picture, text = faces.marking(missing)
        gallery = faces.gallery_of(shots)
        return (
            shots,
            gr.update(value=state(wrong, wrong=True) if wrong else "", visible=bool(wrong)),
            gr.update(value=gallery, visible=bool(gallery)),
            gr.update(visible=missing is not None),
            picture,
            text,
        )
