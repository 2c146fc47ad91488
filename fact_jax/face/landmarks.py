"""Five-point landmarks: from a sidecar file, or from a detector."""

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from fact_jax.face.images import file_error, one_line
from fact_jax.face.mask import crop_square
from fact_jax.utils.errors import UserError

# Points marked by eye on ``skimage.data.astronaut()``, the photo of examples and reports.
ASTRONAUT_POINTS = Path(__file__).with_name("data") / "astronaut.points.json"

DEFAULT_PACK = "buffalo_l"
_PACKS = Path("~/.insightface/models")
_MAX_SIDECAR_BYTES = 1 << 20
_ORDER = "left eye, right eye, nose tip, left and right mouth corner, as the viewer sees them"
_POINT_NAMES = ("left eye", "right eye", "nose tip", "left mouth corner", "right mouth corner")


class Face(NamedTuple):
    """Five points (x, y) in pixels of the upright photo, box (left, top, right, bottom), score."""

    points: Float[np.ndarray, "5 2"]
    box: Float[np.ndarray, "4"]
    score: float = 1.0


def find_face(
    photo_path: str | os.PathLike,
    image: UInt8[np.ndarray, "h w 3"],
    *,
    points_file: str | os.PathLike | None = None,
    pack: str | os.PathLike | None = None,
    index: int | None = None,
) -> tuple[Face, str]:
    """The face of a photo, and a note for the user ("" when there is nothing to say).

    Of several faces the largest is taken and the note says so; ``index`` chooses another, counted
    from 0 at the left. See :func:`find_faces`.
    """
    faces, where, found = _look(Path(photo_path), image, points_file, pack)
    face, note = _choose(faces, index, where)
    return face, "; ".join(filter(None, [found, note]))


def find_faces(
    photo_path: str | os.PathLike,
    image: UInt8[np.ndarray, "h w 3"],
    *,
    points_file: str | os.PathLike | None = None,
    pack: str | os.PathLike | None = None,
) -> tuple[list[Face], str]:
    """All faces of a photo from left to right, and a note for the user ("" without one).

    Looks in this order: ``points_file``; ``NAME.points.json`` beside the photo, and ``NAME.json``
    if that is about points; the detector of ``pack`` (a folder or a pack's name; ``buffalo_l``
    where it is installed).
    Raises UserError when there is no face or nothing to find it with.
    """
    faces, _, note = _look(Path(photo_path), image, points_file, pack)
    return faces, note


def find_face_in(
    image: UInt8[np.ndarray, "h w 3"],
    *,
    pack: str | os.PathLike | None = None,
    index: int | None = None,
) -> tuple[Face, str]:
    """:func:`find_face` of a picture that is in no file, by the detector."""
    folder = local_pack(pack)
    if folder is None:
        raise UserError(
            f"no face points for a picture: give its five points ({_ORDER}), or install a "
            f"detector: pip install 'fact-jax[faces]' and unpack the insightface pack "
            f"{DEFAULT_PACK} into {_PACKS / DEFAULT_PACK}"
        )
    faces = detect_faces(image, folder)
    if not faces:
        raise UserError(f"no face found in a picture: give its five points ({_ORDER})")
    face, note = _choose(faces, index, Path("the picture"))
    return face, "; ".join(filter(None, [_licence_note(folder), note]))


def can_find_faces(photo_path: str | os.PathLike, pack: str | os.PathLike | None = None) -> bool:
    """Whether ``find_faces`` has points beside the photo, or a detector, to look with."""
    return _sidecar_of(Path(photo_path)) is not None or local_pack(pack) is not None


def _look(
    photo_path: Path,
    image: UInt8[np.ndarray, "h w 3"],
    points_file: str | os.PathLike | None,
    pack: str | os.PathLike | None,
) -> tuple[list[Face], Path, str]:
    """Faces, at least one, the file that they were found in, and a note."""
    where, note = photo_path, ""
    sidecar = Path(points_file) if points_file is not None else _sidecar_of(photo_path)
    if sidecar is not None:
        faces, where = read_sidecar(sidecar), sidecar
        check_inside(faces, image.shape[1], image.shape[0], sidecar)
    else:
        folder = _pack_folder(pack, photo_path)
        faces, note = detect_faces(image, folder), _licence_note(folder)
    if not faces:
        raise UserError(
            f"no face found in {where}: use a photo that shows one, or write its five points to "
            f'{photo_path.with_suffix(".points.json")} as {{"points": [[x, y], ...]}} ({_ORDER})'
        )
    return _from_left(faces), where, note


def read_sidecar(path: str | os.PathLike) -> list[Face]:
    """Faces from JSON: ``{"points": [[x, y], ...]}`` for one, ``{"faces": [...]}`` for several.

    Each of ``faces`` holds ``points`` and may hold ``box``; a face without gets the box of its
    aligned crop. Raises UserError, one line, for anything else than that.
    """
    return parse_faces(_read_json(path), str(path))


def parse_faces(content: Any, where: str) -> list[Face]:
    """Faces from what a JSON file of ``read_sidecar`` holds; ``where`` begins the errors' lines."""
    if isinstance(content, dict) and isinstance(content.get("faces"), list):
        return [
            checked_face(entry, f"{where}, face {i}") for i, entry in enumerate(content["faces"])
        ]
    if isinstance(content, dict) and "points" in content:
        return [checked_face(content, where)]
    raise UserError(
        f'{where} holds no face points: expected {{"points": [[x, y], ...]}} with five points '
        f'({_ORDER}) or {{"faces": [{{"points": ...}}, ...]}}'
    )


def _read_json(path: str | os.PathLike) -> Any:
    try:
        with open(path, "rb") as handle:
            text = handle.read(_MAX_SIDECAR_BYTES + 1)
    except OSError as error:
        raise UserError(file_error(path, error)) from None
    if len(text) > _MAX_SIDECAR_BYTES:
        raise UserError(f"{path} is too large for face points: at most {_MAX_SIDECAR_BYTES} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {one_line(error)}") from None


def detect_faces(image: UInt8[np.ndarray, "h w 3"], pack: str | os.PathLike) -> list[Face]:
    """All faces that the detector of a local insightface model pack sees, from left to right.

    ``pack`` is a folder of .onnx files or the name of one under ~/.insightface/models; nothing is
    ever downloaded. Raises UserError when insightface or the pack is missing.
    """
    folder = find_pack(pack)
    try:
        found = _load_detector(folder).get(np.ascontiguousarray(image[..., ::-1]))  # wants BGR
    except UserError:
        raise
    except Exception as error:  # onnxruntime's errors share no base class
        raise UserError(f"the face detector of {folder} failed: {one_line(error)}") from None
    faces = [
        Face(
            np.asarray(one.kps, np.float32), np.asarray(one.bbox, np.float32), float(one.det_score)
        )
        for one in found
        if one.kps is not None
    ]
    return _from_left(faces)


@functools.lru_cache(maxsize=2)
def _load_detector(folder: Path) -> Any:
    try:
        from insightface.app import FaceAnalysis
    except ImportError as error:
        raise UserError(
            f"finding faces needs insightface and onnxruntime ({one_line(error)}): "
            "pip install 'fact-jax[faces]'"
        ) from None
    try:
        # On the CPU everywhere: a photo takes a fraction of a second and machines agree.
        detector = FaceAnalysis(
            name=str(folder), allowed_modules=["detection"], providers=["CPUExecutionProvider"]
        )
        detector.prepare(ctx_id=-1)
    except Exception as error:  # a bad pack fails with whatever its first bad file causes
        raise UserError(
            f"the model pack {folder} has no face detector that loads: {one_line(error)}"
        ) from None
    return detector


def find_pack(pack: str | os.PathLike) -> Path:
    """The folder of a model pack, given as such or by name; UserError if there is none."""
    for folder in (Path(pack).expanduser(), _PACKS.expanduser() / pack):
        if folder.is_dir():
            if not any(folder.rglob("*.onnx")):
                raise UserError(f"the model pack {folder} holds no .onnx file")
            return folder
    raise UserError(
        f"no model pack {pack}: neither a folder nor a name under {_PACKS}; unpack an insightface "
        "pack there (from github.com/deepinsight/insightface, its weights are for non-commercial "
        "research only)"
    )


def _licence_note(folder: Path) -> str:
    licence = next(folder.rglob("MODEL.LICENSE"), None)
    if licence is not None:
        return f"face detection by the model pack {folder}, under the terms in {licence}"
    return (
        f"face detection by the model pack {folder}, which holds no licence file: insightface's "
        "public packs are for non-commercial research only"
    )


def local_pack(pack: str | os.PathLike | None = None) -> Path | None:
    """The folder of the pack that is named, else of ``buffalo_l``; None where that is not there."""
    if pack is not None:
        return find_pack(pack)
    default = _PACKS.expanduser() / DEFAULT_PACK
    return find_pack(default) if default.is_dir() else None


def _pack_folder(pack: str | os.PathLike | None, photo_path: Path) -> Path:
    folder = local_pack(pack)
    if folder is not None:
        return folder
    other = photo_path.with_suffix(".json")
    about = f" ({other} is not about face points)" if other.is_file() else ""
    raise UserError(
        f"no face points for {photo_path}{about}: write them to "
        f"{photo_path.with_suffix('.points.json')} "
        f'as {{"points": [[x, y], ...]}} ({_ORDER}), or install a detector: '
        f"pip install 'fact-jax[faces]' and unpack the insightface pack {DEFAULT_PACK} into "
        f"{_PACKS / DEFAULT_PACK}"
    )


def _sidecar_of(photo_path: Path) -> Path | None:
    own, other = (photo_path.with_suffix(suffix) for suffix in (".points.json", ".json"))
    if own.is_file():
        return own
    return other if other.is_file() and _is_about_points(other) else None


def _is_about_points(path: Path) -> bool:
    """A ``NAME.json`` beside a photo may be anybody's: of a photo service, of a camera."""
    try:
        return is_about_points(_read_json(path))
    except UserError:
        return False


def is_about_points(content: Any) -> bool:
    """Whether what a JSON file holds has points, right or wrong ones."""
    if not isinstance(content, dict):
        return False
    faces = content.get("faces")
    entries = [content, *(faces if isinstance(faces, list) else ())]
    return any(isinstance(e, dict) and isinstance(e.get("points"), list) for e in entries)


def _from_left(faces: list[Face]) -> list[Face]:
    return sorted(faces, key=lambda face: float(face.box[0] + face.box[2]))


def _area(face: Face) -> float:
    left, top, right, bottom = face.box
    return float((right - left) * (bottom - top))


def _choose(faces: list[Face], index: int | None, where: Path) -> tuple[Face, str]:
    if index is not None:
        if not 0 <= index < len(faces):
            raise UserError(
                f"no face {index} in {where}: {len(faces)} found, counted from 0 at the left"
            )
        return faces[index], ""
    largest = max(range(len(faces)), key=lambda i: _area(faces[i]))
    if len(faces) == 1:
        return faces[0], ""
    box = ", ".join(f"{value:.0f}" for value in faces[largest].box)
    return faces[largest], (
        f"{len(faces)} faces found in {where}, took the largest "
        f"(face {largest}, counted from 0 at the left; box {box})"
    )


def checked_face(entry: Any, where: str) -> Face:
    """A face from ``points`` and perhaps ``box``; a UserError for others names ``where``."""
    if not isinstance(entry, dict) or "points" not in entry:
        raise UserError(f'{where}: expected an object with "points"')
    points = _numbers(entry["points"], (5, 2), f'{where}: "points"', f"five [x, y] ({_ORDER})")
    across = points[1] - points[0]
    down = points[3:].mean(0) - points[:2].mean(0)
    if across @ across < 1.0:
        raise UserError(f"{where}: the eyes lie less than one pixel apart")
    if across[0] * down[1] - across[1] * down[0] <= 0:
        raise UserError(f"{where}: the points are mirrored or out of order: give {_ORDER}")
    box = crop_square(points)
    if entry.get("box") is not None:
        box = _numbers(entry["box"], (4,), f'{where}: "box"', "[left, top, right, bottom]")
        if box[2] <= box[0] or box[3] <= box[1]:
            raise UserError(f'{where}: "box" is empty: give [left, top, right, bottom]')
    return Face(points.astype(np.float32), box.astype(np.float32))


def _numbers(value: Any, shape: tuple[int, ...], where: str, wanted: str) -> np.ndarray:
    try:
        numbers = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.empty(0)
    if numbers.shape != shape or not np.isfinite(numbers).all():
        raise UserError(f"{where} must be {wanted}, finite numbers in pixels")
    return numbers


def check_inside(faces: list[Face], width: int, height: int, path: str | Path) -> None:
    """UserError unless all points lie within the photo."""
    for face in faces:
        for name, (x, y) in zip(_POINT_NAMES, face.points, strict=True):
            if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
                raise UserError(
                    f"{path}: the {name} ({x:g}, {y:g}) lies outside the photo, "
                    f"which is {width} x {height} upright"
                )
