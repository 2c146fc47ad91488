"""The safety checker that a base comes with, over finished pictures of either backend."""

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from jaxtyping import Bool, UInt8
from PIL import Image
from transformers import CLIPImageProcessor

from fact_convert.io.hub import local_folder
from fact_infer.parts import BaseModel
from fact_jax.utils.errors import UserError


class SafetyChecker:
    """diffusers' ``StableDiffusionSafetyChecker`` of a base; UserError where it has none."""

    def __init__(self, base: BaseModel):
        files = (
            "safety_checker/config.json",
            "safety_checker/*.safetensors",
            "feature_extractor/*",
        )
        folder = local_folder(base.name, files, None, weights=False)
        parts = [folder / name for name in ("safety_checker", "feature_extractor")]
        for part in parts:
            if not part.is_dir():
                raise UserError(
                    f"{base.name}: no {part.name} in {folder}, --safety-checker needs it"
                )
        try:
            self._checker = StableDiffusionSafetyChecker.from_pretrained(
                parts[0], local_files_only=True
            ).eval()
            self._extract = CLIPImageProcessor.from_pretrained(parts[1], local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            line = " ".join(str(error).split())
            raise UserError(f"{folder}: its safety checker cannot be read: {line}") from error

    def __call__(
        self, pictures: UInt8[np.ndarray, "b h w 3"]
    ) -> tuple[UInt8[np.ndarray, "b h w 3"], Bool[np.ndarray, " b"]]:
        """The pictures, those black that it marks, and which those are."""
        inputs = self._extract([Image.fromarray(one) for one in pictures], return_tensors="pt")
        with torch.no_grad():
            # It blackens a copy that nobody needs: what is drawn here are bytes.
            _, marked = self._checker(
                images=np.zeros((len(pictures), 1, 1, 3)), clip_input=inputs.pixel_values
            )
        marked = np.asarray(marked, bool)
        return np.where(marked[:, None, None, None], np.uint8(0), pictures), marked
