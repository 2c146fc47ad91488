"""Pictures by PyTorch: a stock StableDiffusionPipeline of diffusers with FACT in it."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Float, UInt8
from tqdm import tqdm

from fact_convert.lora import read_lora
from fact_convert.models.controlnet import find_controlnet
from fact_convert.models.pipeline import check_pipeline
from fact_convert.models.tokenizer import tokenize
from fact_infer.base_model import Base, FaceFiles, check_crops
from fact_infer.guidance import keep_jax_on_cpu
from fact_infer.img2img import Canvas
from fact_infer.parts import open_parts
from fact_infer.pipeline import Drawer
from fact_infer.request import Settings
from fact_infer.torch.adapter import FactTorch, load_fact
from fact_infer.torch.img2img import OnCanvas, OnCanvasUnderControl
from fact_infer.torch.lora import merge_loras
from fact_infer.torch.unet_calls import strengths
from fact_jax.diffusion.samplers import DIFFUSERS_SCHEDULERS, model_calls
from fact_jax.fact import initial_noise
from fact_jax.regions import region_masks
from fact_jax.utils.errors import UserError


class TorchPipeline(Drawer):
    """A base model, with or without a face adapter, ready to draw; the twin of FlaxPipeline.

    From the same request both start with the same noise and give the same pictures, but for the
    samplers that draw noise of their own on the way (euler_ancestral, lcm).
    """

    def __init__(
        self,
        base: Base,
        face: FaceFiles | None,
        pipe: diffusers.StableDiffusionPipeline,
        controlnet: diffusers.ControlNetModel | None = None,
    ):
        self.base, self.face, self.pipe, self.controlnet = base, face, pipe, controlnet
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
        loras: Sequence[tuple[str | os.PathLike, float]] = (),
        controlnet: str | os.PathLike | None = None,
    ) -> "TorchPipeline":
        """Read a diffusers folder and, for faces, an adapter file and an encoder.

        Runs on the first CUDA device where there is one. ``face`` are adapter and encoder as
        ``read_face_files`` opened them, instead of their names. ``loras`` are files that are
        added to the base, each times its factor.
        """
        keep_jax_on_cpu()
        base, face = open_parts(base, adapter, encoder, face=face, controlnet=controlnet)
        added = [(read_lora(file), factor) for file, factor in loras]
        folder = base.whole()
        check_pipeline(folder)
        pipe = _from_folder(
            diffusers.StableDiffusionPipeline,
            folder,
            dtype=dtype,
            safety_checker=None,
            requires_safety_checker=False,
        )
        merge_loras(pipe, folder, added)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if controlnet is not None:
            folder, _ = find_controlnet(controlnet)
            controlnet = _from_folder(diffusers.ControlNetModel, folder, dtype=dtype).to(device)
        return cls(base, face, pipe.to(device), controlnet)

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
        """One picture for each prompt, seed and person (``fact_infer.pipeline.Drawer``)."""
        check_crops(self.face, crops)
        name, extra = DIFFUSERS_SCHEDULERS[settings.sampler]
        scheduler = getattr(diffusers, name).from_config(self.base.schedule.to_dict(), **extra)
        (height, width), start = self.base.latent_size(settings), 0
        if canvas is not None:
            canvas.check(self.base, settings, len(prompts))
            start = canvas.start(settings.steps)
        indices, timesteps = model_calls(
            settings.sampler, self.base.schedule, settings.steps, start
        )
        pipe = self._pipe_for(canvas, control)
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        noise = self._noise(seeds, height, width)
        inputs = _control_inputs(canvas, control, control_scale, len(prompts))
        if canvas is None:
            factor = self.base.vae.downscale
            inputs |= {"height": height * factor, "width": width * factor, "latents": noise}
        else:
            pipe.put(canvas, noise, timesteps)
            inputs |= {"image": _pixels(canvas.images), "strength": canvas.strength}
        text = self._text([settings.negative, *prompts])
        face = contextlib.nullcontext()
        if crops is not None:
            guidance, people, places = settings.guidance, 1, None
            if regions is not None:
                people, levels = regions.shape[1], len(self.base.unet.block_out_channels)
                places = region_masks(regions, (height, width), levels)
            tokens = self.fact.face_tokens(crops, guidance.combine, people)
            tokens = tokens.expand(len(prompts), *tokens.shape[1:])
            scales = strengths(guidance, indices - start, settings.steps - start)
            face = self.fact.on(pipe).face(tokens, guidance, scales, places)
        with face:
            pictures = pipe(
                prompt_embeds=text[1:],
                negative_prompt_embeds=text[:1].expand_as(text[1:]),
                guidance_scale=settings.guidance.text,
                num_inference_steps=settings.steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=_after_step(canvas is not None, bar),
                output_type="np",
                **inputs,
            ).images
        return np.round(255 * pictures).astype(np.uint8)

    def _pipe_for(
        self, canvas: Canvas | None, control: np.ndarray | None
    ) -> diffusers.DiffusionPipeline:
        """The pipeline of diffusers that takes what is given."""
        if control is None and canvas is None:
            return self.pipe
        parts = self.pipe.components | {"requires_safety_checker": False}
        if control is None:
            return OnCanvas(**parts)
        if self.controlnet is None:
            raise UserError("a control picture was given, but no ControlNet to look at it")
        kind = OnCanvasUnderControl
        if canvas is None:
            kind = diffusers.StableDiffusionControlNetPipeline
        return kind(**parts, controlnet=self.controlnet)

    def _text(self, prompts: Sequence[str]) -> torch.Tensor:
        ids, _ = tokenize(self.base.tokenizer, prompts)
        with torch.no_grad():
            return self.pipe.text_encoder(torch.from_numpy(ids).long().to(self.pipe.device))[0]

    def _noise(self, seeds: Sequence[int], height: int, width: int) -> torch.Tensor:
        """The noise of the JAX backend, channels first."""
        channels = self.base.unet.in_channels
        noise = np.array(initial_noise(jnp.asarray(seeds, jnp.int32), height, width, channels))
        return torch.from_numpy(noise).permute(0, 3, 1, 2).to(self.pipe.device, self.pipe.dtype)


def _from_folder(kind: type, folder: Path, **options: Any) -> Any:
    """What diffusers reads from a folder; UserError where it cannot."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()
        raise UserError(
            f"{folder}: diffusers cannot read it: {line[0] if line else type(error).__name__}"
        ) from error


def _control_inputs(
    canvas: Canvas | None, control: np.ndarray | None, scale: float, count: int
) -> dict[str, Any]:
    """What a ControlNet is given, under the names that its pipeline has for it."""
    if control is None:
        return {}
    name = "image" if canvas is None else "control_image"
    pictures = _pixels(control).expand(count, -1, -1, -1)
    return {name: pictures, "controlnet_conditioning_scale": scale}


def _pixels(images: UInt8[np.ndarray, "b h w 3"]) -> torch.Tensor:
    """Pictures as diffusers takes them: channels first, in [0, 1]."""
    return torch.tensor(images).permute(0, 3, 1, 2).float() / 255


def _after_step(on_canvas: bool, bar: tqdm | None) -> Callable[..., dict]:
    def after(pipe: Any, step: int, t: torch.Tensor, values: dict) -> dict:
        if on_canvas:
            values["latents"] = pipe.keep_outside(step, values["latents"])
        if bar is not None:
            bar.update()
        return values

    return after
