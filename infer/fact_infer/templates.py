"""Face inpainting: faces of a template photo redrawn as other people.

For each face a square around it is cut out, brought to the base's size, redrawn inside a soft mask
by masked image-to-image, and blended back. Where the mask is 0 the photo's bytes stay untouched.
The photo keeps its size, whatever that is.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy.ndimage import distance_transform_edt
from tqdm import tqdm

from fact_infer.img2img import Img2ImgInput, blend, check_strength, first_step, to_latent_mask
from fact_infer.parts import BaseModel
from fact_infer.pipeline import BATCH, Pipeline
from fact_infer.request import MAX_SCALE, GenerationParams, check_prompt, check_range, check_seed
from fact_jax.face import Face, face_mask, find_faces, read_image, read_profile
from fact_jax.utils.batches import padded_batches
from fact_jax.utils.errors import UserError

Box = Sequence[float] | Float[np.ndarray, "4"]
"""Left, top, right and bottom in pixels."""
Square = tuple[int, int, int]
"""Left, top and side in pixels; it may reach over the photo's edges."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """A photo and all faces in it, from left to right; ``profile`` is its colours' ICC profile."""

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    faces: tuple[Face, ...] = ()
    profile: bytes | None = None

    def check_face(self, index: int) -> None:
        """UserError if there is no face of this number."""
        if not 0 <= index < len(self.faces):
            raise UserError(
                f"no face {index} in {self.name}: {len(self.faces)} found, counted from 0 at the "
                "left"
            )

    def face_in(self, box: Box) -> int:
        """The number of the face that a box is around."""
        shares = [_overlap(face.box, box) for face in self.faces]
        if max(shares, default=0.0) <= 0.0:
            found = "; ".join(", ".join(f"{v:.0f}" for v in face.box) for face in self.faces)
            raise UserError(
                f"no face of {self.name} lies in the box {', '.join(f'{v:g}' for v in box)} "
                f"(left, top, right, bottom); there are faces at {found or 'no place'}"
            )
        return int(np.argmax(shares))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaceTarget:
    """Where in a template a person (aligned crops) is put: a face's number, or a mask (h, w).

    A mask, in [0, 1], is redrawn as it is; of a face what its points tell is.
    """

    crops: UInt8[np.ndarray, "p s s 3"]
    index: int | None = None
    mask: Float[np.ndarray, "h w"] | None = None

    def __post_init__(self) -> None:
        if (self.index is None) == (self.mask is None):
            raise UserError("a person's place is either the number of a face or a mask")

    def __str__(self) -> str:
        return "the mask" if self.index is None else f"the mask of face {self.index}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InpaintRequest:
    """One picture to make of a template.

    ``control`` is what a ControlNet looks at (the template's pose, its edges), as large.
    """

    template: Template
    targets: tuple[FaceTarget, ...]
    prompt: str
    seed: int = 0
    control: UInt8[np.ndarray, "h w 3"] | None = None

    def __post_init__(self) -> None:
        if self.control is not None:
            self._check_size("control picture", self.control)
        check_seed(self.seed)
        check_prompt(self.prompt)
        for target in self.targets:
            if target.index is not None:
                self.template.check_face(target.index)
            if target.mask is not None:
                self._check_size("mask", target.mask)

    def _check_size(self, what: str, image: np.ndarray) -> None:
        height, width = self.template.image.shape[:2]
        if image.shape[:2] != (height, width):
            raise UserError(
                f"the {what} for {self.template.name} is {image.shape[1]} x {image.shape[0]}, the "
                f"template is {width} x {height}: they must be of one size"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InpaintParams:
    """How faces of templates are redrawn.

    ``strength``: of image-to-image. ``control_scale``: how much a ControlNet steers. ``fill``: the
    share of the square's side that the mask takes. ``grow`` and ``soften``: the mask is widened by
    the one and fades out over the other, both in shares of the face's size (the root of its mask's
    area).
    """

    strength: float = 0.6
    control_scale: float = 1.0
    fill: float = 0.7
    grow: float = 0.1
    soften: float = 0.15

    def __post_init__(self) -> None:
        check_strength(self.strength)
        check_range("control scale", self.control_scale, 0.0, MAX_SCALE)
        for name, low in (("fill", 0.1), ("grow", 0.0), ("soften", 0.0)):
            check_range(name, getattr(self, name), low, 1.0)


def find_template(
    path: str | os.PathLike, *, pack: str | os.PathLike | None = None
) -> tuple[Template, str]:
    """Read a template and find its faces; and a note for the user ("" if there is none)."""
    template = read_template(path)
    faces, note = find_faces(path, template.image, pack=pack)
    return dataclasses.replace(template, faces=tuple(faces)), note


def read_template(path: str | os.PathLike) -> Template:
    """A template of which no faces are looked for, which masks do not need."""
    return Template(name=Path(path).name, image=read_image(path), profile=read_profile(path))


def check_requests(
    base: BaseModel,
    requests: Sequence[InpaintRequest],
    params: GenerationParams,
    how: InpaintParams,
    batch: int,
) -> GenerationParams:
    """UserError for what ``inpaint_faces`` cannot do; gives the parameters of a square.

    Needs no model: it can be called before one is loaded.
    """
    targets = [(request, target) for request in requests for target in request.targets]
    photos = {len(target.crops) for _, target in targets}
    if not targets or len(photos) > 1 or batch < 1:
        raise UserError(
            "templates need at least one face, a batch of at least one, and the same number of "
            f"photos of every person; got {len(targets)} faces, a batch of {batch}, "
            f"{' or '.join(map(str, sorted(photos)))} photos"
        )
    if len({request.control is None for request, _ in targets}) > 1:
        raise UserError("a ControlNet needs a control picture of every template")
    params = _square_params(base, params)
    base.check(params)
    first_step(how.strength, params.steps)
    for request, target in targets:
        _mask(request, target)
    return params


def inpaint_faces(
    pipeline: Pipeline,
    requests: Sequence[InpaintRequest],
    params: GenerationParams,
    how: InpaintParams,
    *,
    batch: int = BATCH,
    bar: tqdm | None = None,
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The templates of all requests with their faces redrawn, one after another, each in its size.

    ``batch`` squares are drawn at a time, of whatever templates they are. All people need the same
    number of photos, and all requests a control picture or none. What cannot be done is said, as
    UserError, before anything is drawn. ``bar`` moves by one a call of the UNet.
    """
    params = check_requests(pipeline.base, requests, params, how, batch)
    return _redraw(pipeline, requests, params, how, batch, bar)


def _redraw(
    pipeline: Pipeline,
    requests: Sequence[InpaintRequest],
    params: GenerationParams,
    how: InpaintParams,
    batch: int,
    bar: tqdm | None,
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    targets = [
        (number, target) for number, request in enumerate(requests) for target in request.targets
    ]
    batch, done = min(batch, len(targets)), 0
    images: dict[int, np.ndarray] = {}
    for rows, count in padded_batches(len(targets), batch):
        part = [targets[i] for i in rows]
        squares = [
            _cut(pipeline.base, requests[number], target, params, how) for number, target in part
        ]
        controls = [square.control for square in squares if square.control is not None]
        drawn = pipeline.generate(
            [requests[number].prompt for number, _ in part],
            [requests[number].seed for number, _ in part],
            np.stack([target.crops for _, target in part]),
            params,
            img2img=Img2ImgInput(
                images=np.stack([square.pixels for square in squares]),
                latent_mask=np.stack([square.latent_mask for square in squares]),
                strength=how.strength,
            ),
            control=np.stack(controls) if controls else None,
            control_scale=how.control_scale,
            bar=bar,
        )
        for (number, _), square, pixels in zip(part[:count], squares, drawn, strict=False):
            image = images.get(number, requests[number].template.image)
            images[number] = paste(image, pixels, square.mask, square.place)
        following = rows[count - 1] + 1
        ready = targets[following][0] if following < len(targets) else len(requests)
        for number in range(done, ready):
            yield images.pop(number, requests[number].template.image)
        done = ready


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FaceSquare:
    """The square around one face, ready to be inpainted."""

    place: Square
    mask: Float[np.ndarray, "s s"]
    pixels: UInt8[np.ndarray, "side side 3"]
    latent_mask: Bool[np.ndarray, "rows rows"]
    control: UInt8[np.ndarray, "side side 3"] | None


def _square_params(base: BaseModel, params: GenerationParams) -> GenerationParams:
    own = base.unet.sample_size * base.vae.downscale
    side = params.height or params.width or own
    if (params.height or side) != (params.width or side):
        raise UserError(
            f"faces of templates are drawn in squares, got {params.width} x {params.height}"
        )
    return dataclasses.replace(params.generation_params(), height=side, width=side)


def _cut(
    base: BaseModel,
    request: InpaintRequest,
    target: FaceTarget,
    params: GenerationParams,
    how: InpaintParams,
) -> _FaceSquare:
    image, mask = request.template.image, _mask(request, target)
    size = float(np.sqrt(mask.sum()))
    mask = widen(mask, how.grow * size, how.soften * size)
    square = square_around(mask, how.fill)
    mask = cut_square(mask, square, mode="constant")
    drawn_size = params.height, params.height

    def seen(image: np.ndarray) -> np.ndarray:
        cut = Image.fromarray(cut_square(image, square, mode="edge"))
        return np.asarray(cut.resize(drawn_size, Image.Resampling.LANCZOS))

    inside = np.asarray(Image.fromarray(mask).resize(drawn_size, Image.Resampling.BOX))
    return _FaceSquare(
        place=square,
        mask=mask,
        pixels=seen(image),
        latent_mask=to_latent_mask(inside, base.vae.downscale),
        control=None if request.control is None else seen(request.control),
    )


def _mask(request: InpaintRequest, target: FaceTarget) -> Float[np.ndarray, "h w"]:
    """What is redrawn before it is widened; UserError if it is nothing."""
    mask, template = target.mask, request.template
    if target.index is not None:
        whole = np.ones(template.image.shape[:2], np.float32)
        mask = face_mask(whole, template.faces[target.index].points)
    if mask is None or mask.sum() < 1.0:
        raise UserError(f"{template.name}: {target} is empty")
    return mask


def square_around(mask: Float[np.ndarray, "h w"], fill: float) -> Square:
    """The square whose side the mask's longer extent fills by that share, around its middle."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    side = int(np.ceil(extent / fill))
    middle = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    left, top = (int(np.floor(m - side / 2)) for m in middle)
    return left, top, side


def cut_square(
    image: np.ndarray, square: Square, *, mode: Literal["constant", "edge"]
) -> np.ndarray:
    """What a square shows; where it reaches over the edges, by ``np.pad``'s ``mode``."""
    left, top, side = square
    height, width = image.shape[:2]
    over = [
        (max(0, -top), max(0, top + side - height)),
        (max(0, -left), max(0, left + side - width)),
        *[(0, 0)] * (image.ndim - 2),
    ]
    part = image[max(0, top) : top + side, max(0, left) : left + side]
    return np.pad(part, over, mode=mode)


def paste(
    image: UInt8[np.ndarray, "h w 3"],
    drawn: UInt8[np.ndarray, "r r 3"],
    mask: Float[np.ndarray, "s s"],
    square: Square,
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with a square drawn in it, blended by its mask; untouched where that is 0."""
    left, top, side = square
    height, width = image.shape[:2]
    rows = slice(max(0, top), min(height, top + side))
    columns = slice(max(0, left), min(width, left + side))
    own = np.s_[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    new = np.asarray(Image.fromarray(drawn).resize((side, side), Image.Resampling.LANCZOS))
    out = image.copy()
    out[rows, columns] = blend(image[rows, columns], new[own], mask[own])
    return out


def widen(mask: Float[np.ndarray, "h w"], grow: float, soften: float) -> Float[np.ndarray, "h w"]:
    """The mask dilated by ``grow`` pixels, then feathered: over ``soften`` more it fades to 0.

    Its edge is where it is 1/2; what is greyer outside of that stays.
    """
    reach = int(np.ceil(grow + soften)) + 1
    inside = mask >= 0.5
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    if not len(rows):
        return mask
    near = (
        slice(max(0, rows[0] - reach), rows[-1] + reach + 1),
        slice(max(0, columns[0] - reach), columns[-1] + reach + 1),
    )
    away = distance_transform_edt(~inside[near])
    faded = np.clip(1.0 - np.maximum(away - grow, 0.0) / max(soften, 1e-6), 0.0, 1.0)
    out = mask.copy()
    out[near] = np.maximum(out[near], faded)
    return out


def _overlap(box: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return width * height / (sum(areas) - width * height)
