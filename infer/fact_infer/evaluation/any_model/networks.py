"""Networks that measure pictures of any model: recognisers and features from ONNX files, CLIP."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from fact_jax.face.images import one_line, takes_raw_pixels
from fact_jax.metrics.identity import unit
from fact_jax.utils.errors import UserError

_MAX_SIDE = 2048


class OnnxNetwork:
    """A network on pictures from a local ONNX file, by onnxruntime on the CPU.

    Input (b, 3, s, s), RGB; output 0 is taken, flattened to (b, k). Pixels go in as
    (x - 127.5) / 127.5, or as 0..255 where the graph scales them itself: ``takes_raw_pixels``.
    """

    blanked = False

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = self.path.stem
        onnx, runtime = _onnx_libraries()
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; it is to be a recogniser in the ONNX format")
        try:
            graph = onnx.load(str(self.path), load_external_data=False).graph
            self._session = runtime.InferenceSession(
                str(self.path), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # their errors share no base class
            raise UserError(f"{path}: not an ONNX model that opens: {one_line(error)}") from None
        self._raw = takes_raw_pixels([node.name for node in list(graph.node)[:8]])
        given = self._session.get_inputs()[0]
        sides = [112 if not isinstance(side, int) else side for side in given.shape[2:]]
        if len(given.shape) != 4 or given.shape[1] not in (3, None, "None") or len(set(sides)) > 1:
            raise UserError(f"{path}: takes {given.shape}; pictures of (batch, 3, side, side) are")
        self._input, self.size = given.name, sides[0]
        if not 16 <= self.size <= _MAX_SIDE:
            raise UserError(f"{path}: takes pictures of {self.size} pixels, 16 to {_MAX_SIDE} are")
        self._batch = given.shape[0] if isinstance(given.shape[0], int) else None

    def __call__(self, crops: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n k"]:
        """What it says of crops of its size."""
        pixels = crops.astype(np.float32).transpose(0, 3, 1, 2)
        pixels = pixels if self._raw else (pixels - 127.5) / 127.5
        size = self._batch or 16
        parts = []
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            filled = np.concatenate([part, np.zeros_like(pixels[:1]).repeat(size - len(part), 0)])
            given = filled if self._batch else part
            try:
                found = self._session.run(None, {self._input: given})[0]
            except Exception as error:
                raise UserError(f"{self.path} failed: {one_line(error)}") from None
            parts.append(np.asarray(found, np.float32).reshape(len(given), -1)[: len(part)])
        numbers = np.concatenate(parts)
        if not np.isfinite(numbers).all():
            raise UserError(f"{self.path}: gives numbers of a picture that are not finite")
        return numbers

    def features(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, " k"]:
        """What it says of a whole picture, resized (bicubic) to its size."""
        small = Image.fromarray(image).resize((self.size,) * 2, Image.Resampling.BICUBIC)
        return self(np.asarray(small)[None])[0]


class Clip:
    """A CLIP model from a local folder, by transformers: unit features of pictures and texts."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.name = f"CLIP {self.path.name}"
        try:
            import torch
            from transformers import CLIPModel, CLIPProcessor
            from transformers.utils import logging
        except ImportError as error:
            raise UserError(
                f"CLIP needs torch and transformers ({one_line(error)}): "
                "pip install 'fact-jax[torch]'"
            ) from None
        self._torch = torch
        logging.disable_progress_bar()  # of loading a few layers
        if not (self.path / "config.json").is_file():
            raise UserError(f"{folder}: no CLIP folder: its config.json is not there")
        options: dict[str, Any] = {"local_files_only": True}
        try:
            self._model = CLIPModel.from_pretrained(
                self.path, use_safetensors=True, **options
            ).eval()
            self._processor = CLIPProcessor.from_pretrained(self.path, **options)
        except Exception as error:  # whatever the first bad file causes
            raise UserError(f"{folder}: not a CLIP model that opens: {one_line(error)}") from None

    def features(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, " k"]:
        """Unit features of a picture."""
        pixels = self._processor(images=Image.fromarray(image), return_tensors="pt")
        with self._torch.no_grad():
            vision = self._model.vision_model(pixel_values=pixels["pixel_values"])
            found = self._model.visual_projection(vision.pooler_output)
        return unit(found[0].numpy())

    def texts(self, prompts: Sequence[str]) -> Float[np.ndarray, "n k"]:
        """Unit features of prompts, cut at CLIP's length."""
        parts = []
        for prompt in prompts:
            tokens = self._processor(
                text=[prompt], return_tensors="pt", truncation=True, max_length=77
            )
            given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            with self._torch.no_grad():
                text = self._model.text_model(**given)
                parts.append(self._model.text_projection(text.pooler_output)[0].numpy())
        return unit(np.stack(parts))


def _onnx_libraries() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"ONNX recognisers need onnx and onnxruntime ({one_line(error)}): "
            "pip install 'fact-jax[faces]'"
        ) from None
    return onnx, onnxruntime
