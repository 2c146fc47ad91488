"""Masked image-to-image by diffusers' image-to-image pipelines, as the JAX backend has it.

diffusers' inpainting pipelines take latents of 4 channels only. Beyond image-to-image they do
little: after each step the latents outside of the mask become the picture's own again. A callback
does that here, for latents of any width.
"""

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
)
from torch import Tensor

from fact_infer.img2img import Img2ImgInput


class _MaskedImg2Img(DiffusionPipeline):
    """What both pipelines do otherwise than diffusers' own.

    The noise is given, the picture's latents are the mean of their distribution, and ``visited``
    are the timesteps: a slice of PLMS' own would lack the step that warms it up.
    """

    def set_inputs(self, img2img: Img2ImgInput, noise: Tensor, visited: np.ndarray) -> None:
        """What the next call draws on, from which noise (b, c, h, w), at which timesteps."""
        self._noise, self._visited = noise, torch.from_numpy(np.asarray(visited))
        self._latent_mask = torch.from_numpy(img2img.latent_mask)[:, None].to(noise.device)
        # At strength 1 nothing of the picture is kept.
        self._forgotten = img2img.strength == 1.0

    def restore_unmasked(self, step: int, latents: Tensor) -> Tensor:
        """The latents after a step, those of the picture outside of the mask."""
        own = self._own
        if step < len(self._timesteps) - 1:
            following = self._timesteps[step + 1].expand(len(own))
            own = self.scheduler.add_noise(own, self._noise, following)
        return torch.where(self._latent_mask, latents, own)

    def get_timesteps(self, num_inference_steps, strength, device):
        super().get_timesteps(num_inference_steps, strength, device)
        # The scheduler looks the next one up by its value.
        self._timesteps = self._visited.to(device, self.scheduler.timesteps.dtype)
        return self._timesteps, len(self._timesteps)

    def prepare_latents(self, image, timestep, batch_size, count, dtype, device, generator=None):
        encoded = self.vae.encode(image.to(device, dtype)).latent_dist.mean
        self._own = encoded * self.vae.config.scaling_factor
        if self._forgotten:
            return self._noise * self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(self._own, self._noise, timestep)


class MaskedImg2ImgPipeline(_MaskedImg2Img, StableDiffusionImg2ImgPipeline):
    """Masked image-to-image."""


class MaskedImg2ImgControlNetPipeline(_MaskedImg2Img, StableDiffusionControlNetImg2ImgPipeline):
    """Masked image-to-image with a ControlNet."""
