"""Generation in PyTorch: a stock StableDiffusionPipeline of diffusers with FACT in it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import diffusers
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Int, UInt8
from tqdm import tqdm

from fact_convert.models.controlnet import find_controlnet
from fact_convert.models.pipeline import check_pipeline
from fact_infer.jax_config import pin_jax_to_cpu
from fact_infer.parts import Parts
from fact_infer.pipeline import GenerationInputs, Pipeline
from fact_infer.torch.adapter import FactTorch, load_fact
from fact_infer.torch.img2img import MaskedImg2ImgControlNetPipeline, MaskedImg2ImgPipeline
from fact_infer.torch.lora import merge_loras
from fact_jax.diffusion.samplers import DIFFUSERS_SCHEDULERS, model_calls
from fact_jax.fact import initial_noise
from fact_jax.utils.cache import ContentCache
from fact_jax.utils.errors import UserError, first_line


class TorchPipeline(Pipeline):
    """Generation in PyTorch, all of it in ``dtype``, on the first CUDA device if there is one.

    From the same request FlaxPipeline starts with the same noise and gives the same pictures, but
    for the samplers that draw noise of their own on the way (euler_ancestral, lcm).
    """

    def __init__(
        self,
        parts: Parts,
        pipe: diffusers.StableDiffusionPipeline,
        controlnet: diffusers.ControlNetModel | None = None,
        *,
        tf32: bool = False,
    ):
        super().__init__(parts)
        self.tf32 = tf32
        self.pipe, self.controlnet = pipe, controlnet
        self._cache = ContentCache()
        self.fact: FactTorch | None = load_fact(pipe, files=parts.face) if parts.face else None

    @classmethod
    def load(cls, *files: Any, **options: Any) -> Self:
        pin_jax_to_cpu()
        return super().load(*files, **options)

    @classmethod
    def from_parts(cls, parts: Parts, dtype: Any = "float32") -> Self:
        pin_jax_to_cpu()
        tf32 = dtype == "tf32"
        if isinstance(dtype, str):
            dtype = torch.float32 if tf32 else getattr(torch, dtype)
        folder = parts.base.weights_folder()
        check_pipeline(folder)
        pipe = _from_folder(
            diffusers.StableDiffusionPipeline,
            folder,
            dtype=dtype,
            safety_checker=None,
            requires_safety_checker=False,
        )
        merge_loras(pipe, folder, parts.loras)
        device, controlnet = "cuda" if torch.cuda.is_available() else "cpu", None
        if parts.controlnet is not None:
            folder, _ = find_controlnet(parts.controlnet)
            controlnet = _from_folder(diffusers.ControlNetModel, folder, dtype=dtype).to(device)
        return cls(parts, pipe.to(device), controlnet, tf32=tf32)

    @contextlib.contextmanager
    def _products(self) -> Iterator[None]:
        # By PyTorch's default convolutions multiply float32 as TF32, and other products do not.
        cudnn, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            with cudnn.flags(
                enabled=cudnn.enabled,
                benchmark=cudnn.benchmark,
                deterministic=cudnn.deterministic,
                allow_tf32=self.tf32,
            ):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _generate(self, inputs: GenerationInputs, bar: tqdm | None) -> UInt8[np.ndarray, "b h w 3"]:
        params, img2img, start = inputs.params, inputs.img2img, inputs.start
        name, extra = DIFFUSERS_SCHEDULERS[params.sampler]
        scheduler = getattr(diffusers, name).from_config(self.base.schedule.to_dict(), **extra)
        indices, timesteps = model_calls(params.sampler, self.base.schedule, params.steps, start)
        pipe = self._pipe_for(inputs)
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        noise = self._noise(inputs.seeds, *inputs.size)
        more = _control_inputs(inputs)
        if img2img is None:
            factor = self.base.vae.downscale
            height, width = (factor * side for side in inputs.size)
            more |= {"height": height, "width": width, "latents": noise}
        else:
            pipe.set_inputs(img2img, noise, timesteps)
            more |= {"image": _pixels(img2img.images), "strength": img2img.strength}
        ids = inputs.token_ids
        text = self._cache.get(functools.partial(self._text, ids), ids)
        face: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.fact is not None and inputs.crops is not None:
            guidance = inputs.guidance
            asked = inputs.crops, params.guidance.combine, guidance.people
            tokens = self._cache.get(functools.partial(self.fact.face_tokens, *asked), *asked)
            tokens = tokens.expand(len(inputs.seeds), *tokens.shape[1:])
            scales = guidance.step_scales[indices - start].tolist()
            face = self.fact.on(pipe).face(tokens, params.guidance, scales, guidance.regions)
        with face:
            pictures = pipe(
                prompt_embeds=text[1:],
                negative_prompt_embeds=text[:1].expand_as(text[1:]),
                guidance_scale=params.guidance.text,
                num_inference_steps=params.steps,
                generator=[torch.Generator().manual_seed(int(seed)) for seed in inputs.seeds],
                callback_on_step_end=self._after_step(img2img is not None, bar),
                output_type="np",
                **more,
            ).images
        return np.round(255 * pictures).astype(np.uint8)

    def _after_step(self, img2img: bool, bar: tqdm | None) -> Callable[..., dict]:
        show = getattr(bar, "show", None)

        def after(pipe: Any, step: int, t: torch.Tensor, values: dict) -> dict:
            if img2img:
                values["latents"] = pipe.restore_unmasked(step, values["latents"])
            if bar is not None:
                bar.update()
            if show is not None:
                show(functools.partial(self._so_far, values["latents"]))
            return values

        return after

    def _so_far(self, latents: torch.Tensor) -> UInt8[np.ndarray, "b h w 3"]:
        """The pictures of latents that are still noisy."""
        vae = self.pipe.vae
        with torch.no_grad():
            pictures = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        pixels = (pictures.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return np.round(255 * pixels.cpu().numpy()).astype(np.uint8)

    def _pipe_for(self, inputs: GenerationInputs) -> diffusers.DiffusionPipeline:
        """The pipeline of diffusers that takes what is given."""
        if inputs.control is None and inputs.img2img is None:
            return self.pipe
        parts = self.pipe.components | {"requires_safety_checker": False}
        if inputs.control is None:
            return MaskedImg2ImgPipeline(**parts)
        kind = MaskedImg2ImgControlNetPipeline
        if inputs.img2img is None:
            kind = diffusers.StableDiffusionControlNetPipeline
        return kind(**parts, controlnet=self.controlnet)

    def _text(self, token_ids: Int[np.ndarray, "rows n"]) -> torch.Tensor:
        ids = torch.from_numpy(token_ids).long().to(self.pipe.device)
        with torch.no_grad():
            return self.pipe.text_encoder(ids)[0]

    def _noise(self, seeds: Int[np.ndarray, " b"], height: int, width: int) -> torch.Tensor:
        """The noise of the JAX backend, channels first."""
        channels = self.base.unet.in_channels
        noise = np.array(initial_noise(jnp.asarray(seeds), height, width, channels))
        return torch.from_numpy(noise).permute(0, 3, 1, 2).to(self.pipe.device, self.pipe.dtype)


def _from_folder(
    kind: type[diffusers.DiffusionPipeline | diffusers.ModelMixin], folder: Path, **options: Any
) -> Any:
    """What diffusers reads from a folder; UserError where it cannot."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: diffusers cannot read it: {first_line(error)}") from error


def _control_inputs(inputs: GenerationInputs) -> dict[str, Any]:
    """What a ControlNet is given, under the names that its pipeline has for it."""
    if inputs.control is None:
        return {}
    name = "image" if inputs.img2img is None else "control_image"
    scale = {"controlnet_conditioning_scale": inputs.control_scale}
    return scale | {name: _pixels(inputs.control)}


def _pixels(images: UInt8[np.ndarray, "b h w 3"]) -> torch.Tensor:
    """Pictures as diffusers takes them: channels first, in [0, 1]."""
    return torch.tensor(images).permute(0, 3, 1, 2).float() / 255
