"""Context of a call of the UNet: the pipe that makes it, its branches and its step."""

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fact_infer.guidance import step_scales
from fact_infer.torch.attention_processors import unwrap_compiled
from fact_jax.fact import Guidance
from fact_jax.utils.errors import UserError


def calling_pipe(unet: nn.Module) -> DiffusionPipeline | None:
    """The pipe of diffusers in whose ``__call__`` this is called; None: none around this UNet.

    A UNet can be in several pipes (``Other.from_pipe(pipe)``), and a module is not told who calls
    it: only the stack knows.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            caller = frame.f_locals.get("self")
            if isinstance(caller, DiffusionPipeline):
                own = getattr(caller, "unet", None)
                if own is not None and unwrap_compiled(own) is unwrap_compiled(unet):
                    return caller
        frame = frame.f_back
    return None


def text_guidance(pipe: DiffusionPipeline) -> float | None:
    """The guidance scale of the call that the pipe is in; 1 without a negative branch.

    That is so for ``guidance_scale`` up to 1, after ``SDCFGCutoffCallback``, and for UNets that
    are told the scale (``time_cond_proj_dim``). None: this pipe does not tell.
    """
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None:
        return None
    return float(pipe.guidance_scale) if guided else 1.0


def branches_of(pipe: DiffusionPipeline | None, guided: bool) -> tuple[bool, ...]:
    """Of each branch in the UNet's batch, in order: whether it is one with the prompt.

    Without a pipe it is as in most of diffusers: negative, positive.
    """
    if hasattr(pipe, "get_views"):
        raise UserError(
            f"{type(pipe).__name__} is not supported: it draws many views of one picture, and a "
            "face would be in each"
        )
    if guided and hasattr(pipe, "image_guidance_scale"):  # InstructPix2Pix
        return True, False, False
    branches = (False, True) if guided else (True,)
    if getattr(pipe, "do_perturbed_attention_guidance", False):
        return *branches, True
    return branches


class StepScales:
    """The adapter's strength in each call of the UNet, from the timestep that it is called with.

    ``given`` is one for each call, in order. Without it they follow from the guidance: window and
    schedule are over the steps that are drawn, from the timestep of the first call to the last
    one of the scheduler, whichever that is.
    """

    def __init__(self, guidance: Guidance, given: Sequence[float] | None = None):
        self.guidance, self.given = guidance, given
        self.begun = False
        """Whether the last call was the first one of a run."""
        self._timesteps: Tensor | None = None
        self._first = self._position = 0
        self._scales: Sequence[float] = ()

    def at(self, scheduler: Any, timestep: Tensor | float) -> float:
        """The strength in this call."""
        timesteps = scheduler.timesteps
        self.begun = timesteps is not self._timesteps
        if self.given is None:
            return self._follow(scheduler, timesteps, timestep)
        if self.begun:
            self._timesteps, self._position = timesteps, 0
        if self._position == len(self.given):
            raise UserError(
                f"the pipe takes more steps than the adapter was told of: {len(self.given)} "
                "scales were given; without them the adapter follows the pipe's steps"
            )
        self._position += 1
        return self.given[self._position - 1]

    def _follow(self, scheduler: Any, timesteps: Tensor | None, timestep: Tensor | float) -> float:
        if timesteps is None:
            return self._everywhere(scheduler, timestep)
        position = _find(timesteps, timestep, -1 if self.begun else self._position)
        if position is None:
            return self._everywhere(scheduler, timestep)
        if self.begun or position < self._position:
            self.begun, self._timesteps, self._first = True, timesteps, position
            self._scales = _scales(self.guidance, scheduler, timesteps.tolist()[position:])
        self._position = position
        return self._scales[position - self._first]

    def _everywhere(self, scheduler: Any, timestep: Tensor | float) -> float:
        """Which step it is does not matter if the strength is the same in all."""
        self._timesteps, self._position = scheduler.timesteps, sys.maxsize
        guidance = self.guidance
        if (guidance.start, guidance.stop) == (0.0, 1.0) and not isinstance(
            guidance.face_scale, tuple
        ):
            return float(guidance.face_scale)
        raise UserError(
            f"the UNet is called at timestep {float(timestep):g}, which is none of the pipe's "
            f"{type(scheduler).__name__}: give the pipe the scheduler that steps, or a window and "
            "a schedule of the face have no place"
        )


def _find(timesteps: Tensor, timestep: Tensor | float, last: int) -> int | None:
    """The place of a timestep among those of a scheduler; ``last`` is that of the call before."""
    if isinstance(timestep, Tensor):
        # Pipes pass an element of the very tensor. Its place tells apart timesteps that are rounded
        # to one number, and reading it does not wait for the device.
        offset = timestep.storage_offset() - timesteps.storage_offset()
        same = timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
        if same and timestep.dtype == timesteps.dtype and 0 <= offset < len(timesteps):
            return offset
        timestep = timestep.flatten()[0].item()
    places = [i for i, value in enumerate(timesteps.tolist()) if value == timestep]
    if last + 1 in places:
        return last + 1
    return places[0] if places else None


def _scales(guidance: Guidance, scheduler: Any, timesteps: list[float]) -> list[float]:
    """For each call to come; a scheduler may call twice a step."""
    if len(scheduler.timesteps) == getattr(scheduler, "num_inference_steps", None):
        # A call a step, even where two of the timesteps are rounded to one.
        return step_scales(guidance, range(len(timesteps)), len(timesteps)).tolist()
    order = {t: i for i, t in enumerate(sorted(set(timesteps), reverse=True))}
    return step_scales(guidance, [order[t] for t in timesteps], len(order)).tolist()
