"""Captions by a local BLIP model, through transformers."""

from collections.abc import Sequence
from pathlib import Path

from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError
from fact_train.prepare.models.provider import Photo

_MAX_TOKENS = 30


class BlipCaptioner:
    """A folder with a BLIP captioning model; greedy, so that a photo has one caption."""

    def __init__(self, folder: Path, provider: str):
        if not folder.is_dir():
            raise UserError(f"--captioner {folder} is not a folder")
        try:
            import torch
            from transformers import BlipForConditionalGeneration, BlipProcessor
        except ImportError as error:
            raise UserError(
                f"captions need PyTorch and transformers ({one_line(error)}): "
                "pip install 'fact-jax[torch]'"
            ) from None
        self.name, self._torch = folder.name, torch
        try:
            self._processor = BlipProcessor.from_pretrained(folder, local_files_only=True)
            model = BlipForConditionalGeneration.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{folder} is no BLIP model that loads: {one_line(error)}") from None
        self._model = model.to(provider).eval()

    def __call__(self, photos: Sequence[Photo]) -> list[str]:
        pictures = [photo.image for photo in photos]
        inputs = self._processor(images=pictures, return_tensors="pt").to(self._model.device)
        with self._torch.no_grad():
            tokens = self._model.generate(**inputs, max_new_tokens=_MAX_TOKENS, do_sample=False)
        found = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) or "a portrait of a person" for text in found]
