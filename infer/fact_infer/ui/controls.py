"""Controls of the page, made from the fields that the command line and the API have."""

import re
from collections.abc import Collection, Sequence
from typing import Any

import gradio as gr

from fact_infer.service.fields import Field
from fact_jax.diffusion.samplers import SAMPLERS
from fact_jax.utils.errors import UserError

_SLIDERS = {
    "face_scale": (0.0, 2.0, 0.05),
    "guidance": (1.0, 15.0, 0.1),
    "strength": (0.05, 1.0, 0.05),
    "face_start": (0.0, 1.0, 0.05),
    "face_stop": (0.0, 1.0, 0.05),
    "control_scale": (0.0, 2.0, 0.05),
    "fill": (0.1, 1.0, 0.05),
    "grow": (0.0, 1.0, 0.05),
    "soften": (0.0, 1.0, 0.05),
}
_MOST = {"steps": 200, "count": 16}
"""Of whole numbers that are slid."""


class Controls:
    """Components for some fields, in the order in which they were made.

    ``defaults`` take the place of the fields' own.
    """

    def __init__(self, fields: Sequence[Field], defaults: dict[str, Any]):
        self._fields = {field.name: field for field in fields}
        self._defaults = defaults
        self.made: dict[str, gr.components.Component] = {}

    def add(self, *names: str) -> None:
        """Make the components of these fields, where there are such fields."""
        for name in names:
            if name in self._fields:
                self.made[name] = self._component(self._fields[name])

    def add_rest(self, without: Collection[str]) -> None:
        """Make the components of all other fields but those of files."""
        for name, field in self._fields.items():
            if name not in self.made and name not in without and field.kind != "file":
                self.add(name)

    @property
    def components(self) -> list[gr.components.Component]:
        return list(self.made.values())

    def given(self, values: Sequence[Any]) -> dict[str, Any]:
        """The fields of a request, from the components' values; what is empty is left out."""
        found = {}
        for name, value in zip(self.made, values, strict=True):
            if value is None or value == "":
                continue
            field = self._fields[name]
            if field.kind == "text" and field.many:
                value = [line.strip() for line in value.splitlines() if line.strip()]
            if field.kind == "pairs":
                value = [part.strip() for part in value.replace("\n", ",").split(",")]
                value = [part for part in value if part]
            if field.kind == "int" and isinstance(value, float):
                value = int(value)
            found[name] = value
        return found

    def readable(self, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Of a record's fields those that can be set here, and a line for each that is none."""
        found, wrong = {}, []
        for name in values.keys() & self.made.keys():
            try:
                value = self._fields[name].read(values[name])
                if name == "sampler" and value not in SAMPLERS:
                    raise UserError(f"sampler must be one of {', '.join(SAMPLERS)}")
                found[name] = value
            except UserError as error:
                wrong.append(str(error))
        return found, sorted(wrong)

    def updates(self, values: dict[str, Any]) -> list[Any]:
        """For each component what sets it to a request's field, or leaves it."""
        return [
            gr.update(value=self._shown(name, values[name])) if name in values else gr.update()
            for name in self.made
        ]

    def _shown(self, name: str, value: Any) -> Any:
        field = self._fields[name]
        if field.kind == "pairs":
            return ", ".join(f"{pattern}={factor:g}" for pattern, factor in dict(value).items())
        if field.kind == "text":
            return "\n".join(value) if isinstance(value, list) else value
        if field.kind == "numbers" and isinstance(value, list | tuple):
            return float(value[0])
        return str(value) if field.default is None else value

    def _component(self, field: Field) -> gr.components.Component:
        label = field.name.replace("_", " ").capitalize()
        value = self._defaults.get(field.name, field.default)
        lines = " (one on each line)" if field.kind == "text" and field.many else ""
        about: dict[str, Any] = {"info": _sentence(field.help), "value": value}
        about["label"] = f"{label}{lines}"
        if field.name == "prompt":
            return gr.Textbox(lines=3, label=f"Prompt{lines}", value=value, max_length=4000)
        if field.name == "sampler":
            return gr.Dropdown(list(SAMPLERS), **about | {"info": "how the steps are taken"})
        if field.name in _SLIDERS:
            low, high, step = _SLIDERS[field.name]
            return gr.Slider(low, high, step=step, **about)
        if field.name in _MOST:
            return gr.Slider(1, _MOST[field.name], step=1, **about)
        if field.kind == "choice":
            return gr.Radio(list(field.choices), **about)
        if field.kind == "flag":
            return gr.Checkbox(**about)
        if field.default is None:  # Gradio's number would show an empty one as 0
            return gr.Textbox(**about | {"value": ""}, placeholder="none", lines=1 + bool(lines))
        if field.kind in ("int", "float"):
            return gr.Number(precision=0 if field.kind == "int" else None, **about)
        return gr.Textbox(**about | {"value": value or ""})


def _sentence(text: str) -> str:
    """Help without what only makes sense on a command line."""
    text = re.sub(r"; may be repeated|; several: .*", "", text)
    return re.sub(r" ?\(?\b[^();]*default[^();]*(; released code [\d.]+)?\)?", "", text).replace(
        "--", ""
    )
