"""Masked image-to-image by diffusers' image-to-image pipelines, as the JAX backend has it.

diffusers' inpainting pipelines take latents of 4 channels only. What they do beyond image-to-image
is little: after each step the cells outside of the mask become the picture's own again. A callback
does that here, for latents of any width.
"""

import numpy as np
import torch
from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
)
from torch import Tensor

from fact_infer.img2img import Canvas


class _OnCanvas:
    """What both pipelines do otherwise than diffusers' own.

    The noise is given, the picture's latents are the mean of their distribution, and ``visited``
    are the timesteps: a slice of PLMS' own would lack the step that warms it up.
    """

    def put(self, canvas: Canvas, noise: Tensor, visited: np.ndarray) -> None:
        """What the next call draws on, from which noise (b, c, h, w), at which timesteps."""
        self._noise, self._visited = noise, torch.from_numpy(np.asarray(visited))
        self._cells = torch.from_numpy(canvas.cells)[:, None].to(noise.device)
        # A canvas of which everything is to be forgotten is none.
        self._forgotten = canvas.strength == 1.0

    def keep_outside(self, step: int, latents: Tensor) -> Tensor:
        """The latents after a step, those of the picture outside of the mask."""
        own = self._own
        if step < len(self._timesteps) - 1:
            following = self._timesteps[step + 1].expand(len(own))
            own = self.scheduler.add_noise(own, self._noise, following)
        return torch.where(self._cells, latents, own)

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


class OnCanvas(_OnCanvas, StableDiffusionImg2ImgPipeline):
    """Masked image-to-image."""


class OnCanvasUnderControl(_OnCanvas, StableDiffusionControlNetImg2ImgPipeline):
    """Masked image-to-image with a ControlNet."""
