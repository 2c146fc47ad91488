"""The people of a picture: their photos, the faces found in them, and where they are drawn."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from fact_infer.service.jobs import Job
from fact_infer.service.operations import Service, png
from fact_jax.face import draw_face, read_image
from fact_jax.utils.errors import UserError

NAMES = ("left eye", "right eye", "nose tip", "left mouth corner", "right mouth corner")
"""Of the five points, as the viewer sees them."""
_SIDECARS = (".points.json", ".json", ".mask.png", ".parsing.png")


@dataclasses.dataclass
class Shot:
    """A photo on the page: its file, the faces found in it, and which of them is meant.

    ``seen`` shows each face in the photo; ``marks`` are the points clicked so far where nobody
    found a face.
    """

    photo: Path
    name: str
    points: Path | None = None
    mask: Path | None = None
    parsing: Path | None = None
    faces: list[list[list[float]]] = dataclasses.field(default_factory=list)
    crops: list[np.ndarray] = dataclasses.field(default_factory=list)
    seen: list[np.ndarray] = dataclasses.field(default_factory=list)
    chosen: int = 0
    marks: list[list[float]] = dataclasses.field(default_factory=list)
    note: str = ""


def read_shots(service: Service, files: Sequence[str | Path]) -> list[Shot]:
    """Photos with what came for them (``NAME.points.json``, ``.mask.png``, ``.parsing.png``).

    UserError for files that belong to no photo.
    """
    paths = [Path(file) for file in files]
    sidecars = {path.name: path for path in paths if path.name.endswith(_SIDECARS)}
    shots, used = [], set()
    for path in paths:
        if path.name in sidecars:
            continue
        shot = Shot(path, path.name)
        for ending in _SIDECARS:
            beside = f"{path.stem}{ending}"
            if beside in sidecars:
                used.add(beside)
                if ending == ".mask.png":
                    shot.mask = sidecars[beside]
                elif ending == ".parsing.png":
                    shot.parsing = sidecars[beside]
                elif shot.points is None:
                    shot.points = sidecars[beside]
        look(service, shot)
        shots.append(shot)
    if stray := sorted(sidecars.keys() - used):
        raise UserError(f"{stray[0]} belongs to no photo: name it like the photo that it is for")
    return shots


def look(service: Service, shot: Shot) -> None:
    """Find the faces of a photo; where there is nothing to find them with its ``note`` says so."""
    job = Job("faces", service.engine.root, 0.0)
    given: dict[str, Any] = {"photo": shot.photo.read_bytes()}
    if len(shot.marks) == len(NAMES):
        given["points"] = json.dumps({"points": shot.marks}).encode()
    elif shot.points is not None:
        given["points"] = shot.points.read_bytes()
    if shot.mask is not None:
        given["mask"] = shot.mask.read_bytes()
    if shot.parsing is not None:
        given["parsing"] = shot.parsing.read_bytes()
    try:
        if "points" not in given and not service.can_find_faces:
            service.check_photo(job, given["photo"])
            read_image(shot.photo)  # as :func:`marking` shows it
            shot.note = f"{shot.name}: mark the face by five clicks"
            return
        _, found = service.find_faces(job, given)
    except UserError as error:
        text = job.plain(str(error)).replace(str(shot.photo), "photo")
        raise UserError(f"{shot.name}: {text}") from None
    finally:
        job.end("cancelled")
    shot.note = ""
    shot.faces = [face.points.astype(float).tolist() for face, _ in found]
    shot.crops = [prepared.crop for _, prepared in found]
    shot.seen = [draw_face(face.image, face.points, face.mask) for _, face in found]
    areas = [float(np.prod(face.box[2:] - face.box[:2])) for face, _ in found]
    shot.chosen = int(np.argmax(areas))


def unmarked(shots: Sequence[Shot]) -> Shot | None:
    """The first photo whose face nobody has found yet."""
    return next((shot for shot in shots if not shot.faces), None)


def faces_of(shots: Sequence[Shot]) -> list[tuple[int, int]]:
    """Photo and face of everything in the gallery of found faces."""
    return [(i, j) for i, shot in enumerate(shots) for j in range(len(shot.faces))]


def gallery_of(shots: Sequence[Shot]) -> list[tuple[np.ndarray, str]]:
    """Every face that was found, with a caption that says which are taken."""
    pictures = []
    for i, j in faces_of(shots):
        shot = shots[i]
        several = f", face {j}" if len(shot.faces) > 1 else ""
        taken = "taken" if j == shot.chosen else "not taken"
        pictures.append((shot.seen[j], f"{shot.name}{several}: {taken}"))
        if j == shot.chosen:
            pictures[-1] = (_beside(shot.seen[j], shot.crops[j]), pictures[-1][1])
    return pictures


def _beside(photo: np.ndarray, crop: np.ndarray) -> np.ndarray:
    """A photo and what the encoder sees of it, of one height."""
    height = max(len(photo), 256)
    both = []
    for pixels in (photo, crop):
        image = Image.fromarray(pixels)
        size = round(image.width * height / image.height), height
        both.append(np.asarray(image.resize(size, Image.Resampling.LANCZOS)))
    return np.concatenate(both, axis=1)


def request_of(people: Sequence[Sequence[Shot]]) -> dict[str, Any]:
    """The fields of a request for these people; UserError where a face is not marked."""
    beside = ("mask", "parsing")
    names = ("photo", "points", *beside, "person")
    given: dict[str, list[Any]] = {name: [] for name in names}
    known = [shots for shots in people if shots]
    for number, shots in enumerate(known):
        if (missing := unmarked(shots)) is not None:
            raise UserError(f"{missing.name} has no face yet: mark its five points")
        for shot in shots:
            given["photo"].append(shot.photo.read_bytes())
            points = {"points": shot.faces[shot.chosen]}
            given["points"].append(json.dumps(points).encode())
            given["person"].append(number)
            for name in beside:
                if (file := getattr(shot, name)) is not None:
                    given[name].append(file.read_bytes())
    for name in beside:
        if len(given[name]) < len(given["photo"]):
            given[name] = []
    return {name: values for name, values in given.items() if values}


def regions_of(paintings: Sequence[dict[str, Any] | None], people: int) -> list[bytes]:
    """Where each person is drawn: as painted or, where nothing is, several of them side by side.

    UserError where only some are painted.
    """
    masks = [mask for painting in paintings if (mask := painted_mask(painting)) is not None]
    if masks and len(masks) < people:
        raise UserError("paint where each person is drawn, or paint nothing: side by side then")
    if masks or people < 2:
        return [png(mask) for mask in masks]
    edges = np.linspace(0, 240, people + 1).astype(int)
    bands = np.zeros((people, 240, 240), np.uint8)
    for band, left, right in zip(bands, edges, edges[1:], strict=False):
        band[:, left:right] = 255
    return [png(band) for band in bands]


def painted_mask(painting: dict[str, Any] | None) -> np.ndarray | None:
    """The mask that was painted over a picture; None where nothing was."""
    layers = [] if painting is None else painting.get("layers") or []
    covers = [np.asarray(layer)[..., 3] for layer in layers if np.asarray(layer).ndim == 3]
    if not covers:
        return None
    mask = np.max(covers, axis=0)
    return mask if mask.any() else None


def marking(shot: Shot | None) -> tuple[Any, Any]:
    """What the marking picture and its sentence show for a photo without points."""
    if shot is None:
        return gr.update(visible=False), gr.update(visible=False)
    upright = read_image(shot.photo)
    following = NAMES[len(shot.marks)] if len(shot.marks) < len(NAMES) else "nothing more"
    text = f"**{shot.name}**: click the **{following}** ({len(shot.marks)} of {len(NAMES)} done)"
    return gr.update(value=upright, visible=True), gr.update(value=text, visible=True)
