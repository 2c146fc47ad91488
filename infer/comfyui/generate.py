"""The node that draws by FACT-JAX's own pipeline: the bits of its command line, page and API.

Imported only where ``fact_infer`` is installed beside ComfyUI.
"""

import argparse
import functools
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from fact_infer.cli.models import load_pipeline
from fact_infer.parts import load_parts
from fact_infer.photos import prepare_crops
from fact_infer.pipeline import BATCH
from fact_infer.request import MAX_SCALE, MAX_SEED, MAX_SIDE, GenerationRequest, Photo
from fact_infer.service.work import GenerateWork
from fact_jax.diffusion.samplers import SAMPLERS
from fact_jax.fact import Guidance
from fact_jax.utils.errors import UserError

from .faces import BLACK, read_points, to_bytes
from .models import WEIGHTS

FOLDER = "fact"
_INDEX = "model_index.json"


class GenerateFact(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list(FOLDER)
        bases = [os.path.dirname(name) for name in files if os.path.basename(name) == _INDEX]
        weights = [name for name in files if name.endswith(WEIGHTS)]
        whole: dict[str, Any] = {"min": 0, "max": MAX_SIDE, "default": 0}
        return io.Schema(
            node_id="FactGenerate",
            display_name="FACT Generate (fact-jax)",
            category="FACT",
            description="Pictures by FACT-JAX's own pipeline and samplers, bit for bit those of "
            "its command line. Without an image the base draws alone.",
            inputs=[
                io.Combo.Input(
                    "base", options=bases, tooltip="diffusers folder in models/fact: a link will do"
                ),
                io.Combo.Input("adapter", options=weights),
                io.Combo.Input("encoder", options=weights),
                io.Combo.Input("backend", options=["torch", "flax"]),
                io.Combo.Input("precision", options=["float32", "tf32", "bfloat16", "float16"]),
                io.String.Input("prompt", default="", multiline=True),
                io.String.Input("negative", default="", multiline=True),
                io.Int.Input("seed", default=0, min=0, max=MAX_SEED),
                io.Int.Input("count", default=1, min=1, max=64, tooltip="seeds, one after another"),
                io.Combo.Input("sampler", options=list(SAMPLERS), default="pndm"),
                io.Int.Input("steps", default=50, min=1, max=1000),
                io.Float.Input("guidance", default=5.0, min=1.0, max=50.0, step=0.1),
                io.Float.Input("face_scale", default=1.0, min=0.0, max=MAX_SCALE, step=0.05),
                io.Int.Input("width", tooltip="0: the base's own", **whole),
                io.Int.Input("height", tooltip="0: the base's own", **whole),
                io.String.Input(
                    "points",
                    default="",
                    multiline=True,
                    tooltip="as of FACT face; empty: insightface",
                ),
                io.Image.Input("image", optional=True, tooltip="one person's photos"),
                io.Mask.Input("head_mask", optional=True, tooltip="white on the head"),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(
        cls,
        base: str,
        adapter: str,
        encoder: str,
        backend: str,
        precision: str,
        prompt: str,
        negative: str,
        seed: int,
        count: int,
        sampler: str,
        steps: int,
        guidance: float,
        face_scale: float,
        width: int,
        height: int,
        points: str,
        image: Any = None,
        head_mask: Any = None,
    ) -> io.NodeOutput:
        index, *face = (
            folder_paths.get_full_path_or_raise(FOLDER, name)
            for name in (os.path.join(base, _INDEX), adapter, encoder)
        )
        if os.path.basename(face[1]) == "model.safetensors":  # its config.json lies beside it
            face[1] = os.path.dirname(face[1])
        face = [] if image is None else face
        pipeline = _pipeline(os.path.dirname(index), *face, backend=backend, precision=precision)
        with tempfile.TemporaryDirectory(prefix="fact-") as folder:
            photos = [] if image is None else _photos(Path(folder), image, points, head_mask)
            request = GenerationRequest(
                prompts=[prompt],
                negative=negative,
                seeds=range(seed, seed + count),
                photos=photos,
                sampler=sampler,
                steps=steps,
                guidance=Guidance(text=guidance, face_scale=face_scale),
                width=width or None,
                height=height or None,
            )
            pipeline.base.check(request)
            crops, notes = None, pipeline.base.cut_prompts([prompt, negative])
            try:
                if photos:
                    crops, found = prepare_crops(photos, pipeline.face.encoder_config.img_size)
                    notes += found
            except UserError as error:  # the folder's name says nothing to anybody
                raise UserError(str(error).replace(f"{folder}{os.sep}", "")) from None
        for line in notes:
            logging.info("FACT: %s", line.replace(f"{folder}{os.sep}", ""))
        work = GenerateWork(batch=BATCH, request=request, crops=crops, record={})
        drawn = [picture.image for picture in work.draw(pipeline, _Bar(work.steps))]
        return io.NodeOutput(torch.from_numpy(np.stack(drawn)).float() / 255.0)


@functools.lru_cache(maxsize=1)
def _pipeline(base: str, *face: str, backend: str, precision: str) -> Any:
    """The pipeline of these files; that of the last picture is kept."""
    how = argparse.Namespace(backend=backend, precision=precision)
    return load_pipeline(how, load_parts(base, *face))


def _photos(folder: Path, image: Any, points: str, head_mask: Any) -> list[Photo]:
    """The pictures of a batch as files, with their points and masks."""
    places = read_points(points, len(image)) or [None] * len(image)
    masks = [None] if head_mask is None else list(head_mask.cpu().numpy())
    masks = masks * len(image) if len(masks) == 1 else masks
    if len(masks) != len(image):
        raise ValueError(f"{len(masks)} masks for {len(image)} photos: give one for each")
    photos = []
    for number, (pixels, place, mask) in enumerate(zip(image, places, masks, strict=True)):
        path = folder / f"photo{number}.png"
        Image.fromarray(to_bytes(pixels.cpu())).save(path)
        beside: dict[str, Path] = {}
        if place is not None:
            beside["points"] = path.with_suffix(".points.json")
            beside["points"].write_text(json.dumps({"points": place.tolist()}))
        if mask is not None and not mask.max() >= 0.5:
            raise ValueError(BLACK)
        if mask is not None:
            beside["mask"] = path.with_suffix(".mask.png")
            grey = np.rint(255.0 * np.clip(mask, 0, 1)).astype(np.uint8)
            Image.fromarray(grey).save(beside["mask"])
        photos.append(Photo(path=path, **beside))
    return photos


class _Bar:
    """Stands where a pipeline expects tqdm's bar; a cancelled prompt ends between two steps."""

    def __init__(self, steps: int):
        self._bar = comfy.utils.ProgressBar(steps)
        self.n, self.total = 0, steps

    def set_description(self, text: str, refresh: bool = True) -> None:
        """ComfyUI shows no text."""

    def update(self, steps: int = 1) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.n += steps
        self._bar.update(steps)
