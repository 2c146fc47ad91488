"""What the two backends have in common: requests in batches, one picture a prompt and seed."""

import abc
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from fact_infer.base_model import Base, FaceFiles, check_faces
from fact_infer.img2img import Canvas
from fact_infer.input_images import read_inputs
from fact_infer.photos import prepare_crops
from fact_infer.request import Request, Settings
from fact_jax.utils.errors import UserError

BATCH = 4


class Drawer(abc.ABC):
    """A loaded backend: a base model, with or without a face adapter, ready to draw."""

    base: Base
    face: FaceFiles | None

    @abc.abstractmethod
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        crops: UInt8[np.ndarray, "#b p s s 3"] | None,
        settings: Settings,
        *,
        canvas: Canvas | None = None,
        regions: Float[np.ndarray, "#b k h w"] | None = None,
        control: UInt8[np.ndarray, "#b h w 3"] | None = None,
        control_scale: float = 1.0,
        bar: tqdm | None = None,
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """One picture for each prompt, seed and person, all at once.

        ``crops`` are the aligned faces of each picture's person (or of one for all pictures);
        None draws with the base alone. ``canvas`` is what is drawn over, if anything. With
        ``regions``, masks in [0, 1] of any size, the crops are of ``k`` people, an equal number of
        each, who are drawn there. ``control`` are pictures for the ControlNet, as large as what is
        drawn. ``bar`` moves by one a call of the UNet.
        """

    def generate(
        self,
        request: Request,
        crops: UInt8[np.ndarray, "p s s 3"] | None = None,
        *,
        batch: int = BATCH,
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """All pictures of a request, in the order of ``request.pictures()``.

        Its photos are read unless ``crops`` are given.
        """
        return np.concatenate(list(generate_batches(self, request, crops, batch=batch)))


def generate_batches(
    drawer: Drawer,
    request: Request,
    crops: UInt8[np.ndarray, "p s s 3"] | None = None,
    *,
    batch: int = BATCH,
    bar: tqdm | None = None,
) -> Iterator[UInt8[np.ndarray, "b h w 3"]]:
    """The pictures of a request, up to ``batch`` at a time; crops are made unless given."""
    if batch < 1:
        raise UserError(f"a batch holds at least one picture, got {batch}")
    drawer.base.check(request)
    check_faces(drawer.face, len(request.photos if crops is None else crops))
    if crops is None and request.photos:
        crops, _ = prepare_crops(request.photos, drawer.face.encoder_config.img_size)
    people = None if crops is None else crops[None]
    pictures = request.pictures()
    batch = min(batch, len(pictures))
    inputs = read_inputs(request, drawer.base, batch)
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        # The last batch is filled up: another shape would be compiled anew.
        full = part + part[-1:] * (batch - len(part))
        prompts, seeds = zip(*full, strict=True)
        drawn = drawer.draw(prompts, seeds, people, request, **inputs, bar=bar)[: len(part)]
        yield inputs["canvas"].finish(drawn) if "canvas" in inputs else drawn
