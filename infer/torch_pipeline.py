"""Pictures by PyTorch: a stock StableDiffusionPipeline of diffusers with FACT in it."""

import contextlib
import os
from collections.abc import Sequence

import diffusers
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import UInt8
from tqdm import tqdm

from converters.tokenizer import tokenize
from fact_jax.fact import initial_noise
from fact_jax.samplers import DIFFUSERS_SCHEDULERS
from infer.base import Base, FaceFiles, read_base, read_face_files
from infer.pipeline import Drawer
from infer.request import Settings
from infer.torch_fact import FactTorch, load_fact


class TorchPipeline(Drawer):
    """A base model, with or without a face adapter, ready to draw; the twin of FlaxPipeline.

    From the same request both start with the same noise and give the same pictures, but for the
    samplers that draw noise of their own on the way (euler_ancestral, lcm).
    """

    def __init__(self, base: Base, face: FaceFiles | None, pipe: diffusers.StableDiffusionPipeline):
        self.base, self.face, self.pipe = base, face, pipe
        self.fact: FactTorch | None = load_fact(pipe, files=face) if face is not None else None

    @classmethod
    def load(
        cls,
        base: str | os.PathLike | Base,
        adapter: str | os.PathLike | None = None,
        encoder: str | os.PathLike | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        face: FaceFiles | None = None,
    ) -> "TorchPipeline":
        """Read a diffusers folder and, for faces, an adapter file and an encoder.

        Runs on the first CUDA device where there is one. ``face`` are adapter and encoder as
        ``read_face_files`` opened them, instead of their names.
        """
        base = base if isinstance(base, Base) else read_base(base)
        if face is None and adapter is not None:
            face = read_face_files(adapter, encoder)
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            base.folder,
            dtype=dtype,
            safety_checker=None,
            requires_safety_checker=False,
            local_files_only=True,
        )
        return cls(base, face, pipe.to("cuda" if torch.cuda.is_available() else "cpu"))

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        crops: UInt8[np.ndarray, "#b p s s 3"] | None,
        settings: Settings,
        *,
        bar: tqdm | None = None,
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """One picture for each prompt, seed and person (``infer.pipeline.Drawer``)."""
        name, extra = DIFFUSERS_SCHEDULERS[settings.sampler]
        scheduler = getattr(diffusers, name).from_config(self.base.schedule.to_dict(), **extra)
        self.pipe.scheduler = scheduler
        self.pipe.set_progress_bar_config(disable=True)
        text = self._text([settings.negative, *prompts])
        height, width = self.base.latent_size(settings)
        factor = self.base.vae.downscale
        with self._face(crops, len(prompts), settings):
            pictures = self.pipe(
                prompt_embeds=text[1:],
                negative_prompt_embeds=text[:1].expand_as(text[1:]),
                guidance_scale=settings.guidance.text,
                num_inference_steps=settings.steps,
                height=height * factor,
                width=width * factor,
                latents=self._noise(seeds, height, width),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=None if bar is None else _ticking(bar),
                output_type="np",
            ).images
        return np.round(255 * pictures).astype(np.uint8)

    def _text(self, prompts: Sequence[str]) -> torch.Tensor:
        ids, _ = tokenize(self.base.tokenizer, prompts)
        with torch.no_grad():
            return self.pipe.text_encoder(torch.from_numpy(ids).long().to(self.pipe.device))[0]

    def _noise(self, seeds: Sequence[int], height: int, width: int) -> torch.Tensor:
        """The noise of the JAX backend, channels first."""
        channels = self.base.unet.in_channels
        noise = np.array(initial_noise(jnp.asarray(seeds, jnp.int32), height, width, channels))
        return torch.from_numpy(noise).permute(0, 3, 1, 2).to(self.pipe.device, self.pipe.dtype)

    def _face(
        self, crops: UInt8[np.ndarray, "#b p s s 3"] | None, count: int, settings: Settings
    ) -> contextlib.AbstractContextManager:
        if crops is None:
            return contextlib.nullcontext()
        face = self.fact.face_tokens(crops)
        return self.fact.face(face.expand(count, *face.shape[1:]), settings.guidance)


def _ticking(bar: tqdm):
    def tick(pipe, i, t, kwargs):
        bar.update()
        return kwargs

    return tick
