"""diffusers' masked image-to-image, with and without a ControlNet, as the JAX backend has it."""

from typing import Any

import diffusers
import numpy as np
import torch

from infer.canvas import Canvas


class _Canvas:
    """What both pipelines do otherwise than diffusers' own.

    The noise is given (as ``latents``), the picture's latents are the mean of their distribution,
    and ``visited`` are the timesteps: a slice of PLMS' own would lack the step that warms it up.
    """

    visited: np.ndarray

    def get_timesteps(self, num_inference_steps, strength, device):
        super().get_timesteps(num_inference_steps, strength, device)
        timesteps = torch.from_numpy(np.asarray(self.visited))
        # The scheduler looks the next one up by its value.
        timesteps = timesteps.to(device, self.scheduler.timesteps.dtype)
        return timesteps, len(timesteps)

    def prepare_latents(
        self,
        batch_size,
        num_channels_latents,
        height,
        width,
        dtype,
        device,
        generator,
        latents,
        *,
        image,
        timestep,
        is_strength_max,
        return_noise,
        return_image_latents,
    ):
        own = self._encode_vae_image(image.to(device, dtype), generator)
        if is_strength_max:
            noised = latents * self.scheduler.init_noise_sigma
        else:
            noised = self.scheduler.add_noise(own, latents, timestep)
        return noised, latents, own

    def prepare_mask_latents(self, mask, masked_image, batch_size, *rest):
        # Only UNets made for inpainting look at the masked picture: encoding would be for nothing.
        nothing = masked_image.new_zeros(batch_size, 4, 1, 1)
        return super().prepare_mask_latents(mask, nothing, batch_size, *rest)

    def _encode_vae_image(self, image, generator):
        return self.vae.encode(image).latent_dist.mean * self.vae.config.scaling_factor


class OnCanvas(_Canvas, diffusers.StableDiffusionInpaintPipeline):
    """Masked image-to-image."""


class OnCanvasUnderControl(_Canvas, diffusers.StableDiffusionControlNetInpaintPipeline):
    """Masked image-to-image with a ControlNet."""


def canvas_inputs(canvas: Canvas) -> dict[str, Any]:
    """A canvas as diffusers takes it: channels first, and the cells as a mask of pixels."""
    factor = canvas.images.shape[1] // canvas.cells.shape[1]
    mask = canvas.cells.repeat(factor, 1).repeat(factor, 2)
    return {
        "image": torch.tensor(canvas.images).permute(0, 3, 1, 2).float() / 255,
        "mask_image": torch.from_numpy(mask)[:, None].float(),
        "strength": canvas.strength,
    }
