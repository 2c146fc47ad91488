"""What happens around each call of the UNet while faces are being drawn."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

from fact_jax.errors import UserError
from fact_jax.fact import Guidance
from fact_jax.regions import Regions
from infer.torch_processors import FaceContext, installed


class Steering:
    """Keys of face and text, the adapter's strength in each call, and the third branch if any.

    A pipe knows two branches and sums n + g (p - n). A face guidance f asks for
    n + g (t - n) + f (tf - t), t and tf being text without and with face: so the text branch is
    drawn in both ways, and p = t + f / g (tf - t) is handed to the pipe.
    """

    def __init__(
        self,
        pipe: Any,
        context: FaceContext,
        guidance: Guidance,
        scales: Sequence[float] | None = None,
        regions: Regions | None = None,
    ):
        self.pipe, self.context, self.guidance, self.scales = pipe, context, guidance, scales
        self.regions = regions
        self.processors = installed(pipe.unet)
        self._timesteps: Tensor | None = None
        self._coming: Iterator[Tensor | None] = iter(())
        self._text: Tensor | None = None
        self._lora = 1.0

    @contextlib.contextmanager
    def through(self, branches: Sequence[Tensor]) -> Iterator[None]:
        """While this is entered, the UNet draws the faces (b, m, d) of these branches."""
        if self.context.guidance is not None:
            raise UserError("faces are being drawn already: leave that `with` before the next")
        unet = self.pipe.unet
        hooks = [
            unet.register_forward_pre_hook(self._before, with_kwargs=True),
            unet.register_forward_hook(self._after),
        ]
        try:
            self._prepare(branches)
            yield
        finally:
            self._forget()
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _prepare(self, branches: Sequence[Tensor]) -> None:
        """Compute the keys of the face tokens (b, m, d) of each branch, in every block."""
        unet = self.pipe.unet
        if unet.device.type == "meta":
            raise UserError(
                "sequential CPU offload takes the adapter's weights away: use "
                "enable_model_cpu_offload instead"
            )
        self.people, self.branches = len(branches[0]), len(branches)
        tokens = torch.cat(tuple(branches)).to(unet.device, unet.dtype)
        factors = self.guidance.block_factors(list(self.processors))
        for processor, factor in zip(self.processors.values(), factors, strict=True):
            processor.keys, processor.factor = processor.face_keys(tokens), factor
        self.context.guidance = self.guidance

    def _forget(self) -> None:
        """Leave nothing of the generation behind, even if it ended within a block."""
        for processor in self.processors.values():
            processor.forget()
        self.context.guidance = self.context.scale = self.context.regions = None

    # Which call this is, torch.compile need not know: it would compile each of them.
    @torch.compiler.disable
    @torch.no_grad()
    def _before(self, unet: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A hook: what the pipe passes on, widened by the third branch."""
        sample = args[0]
        if self.pipe.scheduler.timesteps is not self._timesteps:
            self._begin(sample)
        try:
            self.context.scale = next(self._coming)
        except StopIteration:
            raise UserError("the pipe takes more steps than the adapter was told of") from None
        text = kwargs.pop("encoder_hidden_states")
        lora = (kwargs.get("cross_attention_kwargs") or {}).get("scale", 1.0)
        args, kwargs = (self._widen(values, len(sample)) for values in (args, kwargs))
        return args, kwargs | {"encoder_hidden_states": self._read(text, lora)}

    @torch.compiler.disable
    def _after(self, unet: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> Any:
        """A hook: the pipe's own branches, the last one made of two."""
        if self.guidance.face is None:
            return None
        *negative, text, both = output[0].split(self.people)
        weight = self.guidance.face / self.guidance.text
        return (torch.cat([*negative, text + weight * (both - text)]), *output[1:])

    def _begin(self, sample: Tensor) -> None:
        """The pipe has set its timesteps: what it asks for must be what the faces are for."""
        asked = getattr(self.pipe, "_guidance_scale", self.guidance.text)
        if asked != self.guidance.text:
            raise UserError(
                f"the pipe was called with guidance_scale={asked:g}, the face was given "
                f"{self.guidance.text:g}: they must be the same"
            )
        pictures = len(sample) / (self.branches - (self.guidance.face is not None))
        if pictures != self.people:
            raise UserError(
                f"the pipe draws {pictures:g} pictures at once, there are faces for {self.people}: "
                "give one row of face tokens for each picture"
            )
        self._place(sample)
        self._timesteps = self.pipe.scheduler.timesteps
        scales = self._own_scales() if self.scales is None else self.scales
        tensors = {scale: torch.tensor(scale, device=sample.device) for scale in set(scales)}
        self._coming = iter([tensors[scale] if scale else None for scale in scales])
        for processor in self.processors.values():
            # Under CPU offload they were computed where the UNet waits.
            processor.keys = tuple(half.to(sample.device) for half in processor.keys)

    def _place(self, sample: Tensor) -> None:
        """The regions of every branch, for latents of this size."""
        if self.regions is None:
            return
        height, width = sample.shape[2:]
        if height * width not in self.regions:
            raise UserError(f"the regions are not for latents of {height} x {width}")
        self.context.regions = {
            n: torch.tensor(mask, device=sample.device)
            .expand(self.people, -1, -1)
            .repeat(self.branches, 1, 1)
            for n, mask in self.regions.items()
        }

    def _own_scales(self) -> list[float]:
        """For each call to come; a scheduler may call twice a step, or leave out the first ones."""
        timesteps = self._timesteps.tolist()
        if len(timesteps) == self.pipe.scheduler.num_inference_steps:
            # A call a step, even where two of the timesteps are rounded to one.
            indices, steps = list(range(len(timesteps))), len(timesteps)
        else:
            order = {t: i for i, t in enumerate(sorted(set(timesteps), reverse=True))}
            indices, steps = [order[t] for t in timesteps], len(order)
        calls = getattr(self.pipe, "num_timesteps", len(timesteps))
        return strengths(self.guidance, indices[-calls:], steps)

    def _read(self, text: Tensor, lora: float) -> Tensor:
        """The text of all branches; the same as in the call before has its keys already.

        ``lora`` is what diffusers will multiply LoRA layers by inside the call.
        """
        if text is not self._text or lora != self._lora:
            self._text, self._lora = text, lora
            self._widened, self._unread = self._widen(text, len(text)), True
            for processor in self.processors.values():
                processor.text = None
        # Under CPU offload the UNet only comes to the device after this hook, the first time.
        if self._unread and self.pipe.unet.device == text.device:
            self._unread = False
            with _scaled_lora(self.pipe.unet, lora):
                for processor in self.processors.values():
                    processor.text = processor.text_keys(self._widened)
        return self._widened

    def _widen(self, value: Any, batch: int) -> Any:
        """The last branch a second time, in everything that has a row for each sample."""
        if self.guidance.face is None:
            return value
        if isinstance(value, Tensor) and value.ndim and len(value) == batch:
            return torch.cat([value, value[-self.people :]])
        if isinstance(value, dict):
            return {key: self._widen(part, batch) for key, part in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self._widen(part, batch) for part in value)
        return value


@contextlib.contextmanager
def _scaled_lora(unet: nn.Module, scale: float) -> Iterator[None]:
    """LoRA layers multiplied as diffusers has them inside a call of the UNet."""
    if not USE_PEFT_BACKEND:
        yield
        return
    scale_lora_layers(unet, scale)
    try:
        yield
    finally:
        unscale_lora_layers(unet, scale)


def strengths(guidance: Guidance, indices: Sequence[int], steps: int) -> list[float]:
    """The adapter's strength in calls of the UNet at these step numbers of ``steps``."""
    scales = jax.vmap(lambda i: guidance.scale_at(i, steps))(jnp.asarray(indices))
    return np.asarray(scales).tolist()
