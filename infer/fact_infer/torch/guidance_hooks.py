"""Forward hooks of the UNet that guide a generation by faces."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from fact_infer.torch.attention_processors import FaceContext, installed
from fact_infer.torch.unet_calls import StepScales, branches_of, calling_pipe, text_guidance
from fact_jax.face import resize_area
from fact_jax.fact import Guidance
from fact_jax.regions import Regions, region_masks
from fact_jax.utils.errors import UserError

SEQUENTIAL = (
    "sequential CPU offload takes the adapter's weights away: use enable_model_cpu_offload instead"
)
Masks = Sequence[Float[np.ndarray, "h w"]]
"""One of each person, of any size, in [0, 1]."""


class GuidanceHooks:
    """Keys of the face, the adapter's strength in each call, and the third branch if any.

    A call of the UNet holds one branch (the prompt), two (negative, positive) or more, each with a
    row for every picture; the rows of faces are repeated to as many. A pipe sums
    n + g (p - n). A face guidance f asks for n + g (t - n) + f (tf - t), t and tf being text
    without and with face: so the text branch is drawn in both ways, and p = t + f / g (tf - t) is
    handed to the pipe.

    With ``follow`` the guidance scale is always the pipe's; else ``guidance.text``, and a pipe that
    is called with another is refused.
    """

    def __init__(
        self,
        pipe: Any,
        context: FaceContext,
        guidance: Guidance,
        scales: Sequence[float] | None = None,
        regions: Regions | Masks | None = None,
        *,
        follow: bool = False,
    ):
        self.pipe, self.context, self.guidance, self.follow = pipe, context, guidance, follow
        self.regions = regions
        self.processors = installed(pipe.unet)
        self._scales = StepScales(guidance, scales)
        self._pictures = 0
        self._text = 1.0
        self._expanded_for: tuple | None = None
        self._strength: Tensor | None = None

    @contextlib.contextmanager
    def active(self, face: Tensor, null: Tensor) -> Iterator[None]:
        """While this is entered, the UNet draws the faces (b, m, d); ``null`` is their absence."""
        if self.context.guidance is not None:
            raise UserError("faces are being drawn already: leave that `with` before the next")
        unet = self.pipe.unet
        hooks = [
            unet.register_forward_pre_hook(self._pre_forward, with_kwargs=True),
            unet.register_forward_hook(self._post_forward),
        ]
        try:
            self._prepare_keys(face, null)
            yield
        finally:
            self._clear()
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _prepare_keys(self, face: Tensor, null: Tensor) -> None:
        """Compute the keys of the null face and the face (b, m, d), in every block."""
        unet = self.pipe.unet
        if unet.device.type == "meta":
            raise UserError(SEQUENTIAL)
        self.faces = len(face)
        tokens = torch.cat([null.expand_as(face), face]).to(unet.device, unet.dtype)
        factors = self.guidance.block_factors(list(self.processors))
        for processor, factor in zip(self.processors.values(), factors, strict=True):
            processor.factor = factor
        self._keys = [processor.face_keys(tokens) for processor in self.processors.values()]
        self.context.guidance = self.guidance

    def _clear(self) -> None:
        """Leave nothing of the generation behind, even if it ended within a block."""
        for processor in self.processors.values():
            processor.clear()
        self.context.guidance = self.context.scale = self.context.regions = None
        self.context.strength = None

    # Which call this is, torch.compile need not know: it would compile each of them.
    @torch.compiler.disable
    @torch.no_grad()
    def _pre_forward(self, unet: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook: what the pipe passes on, widened by the third branch."""
        inputs = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        sample = inputs["sample"]
        caller = calling_pipe(unet)
        scale = self._scales.at((caller or self.pipe).scheduler, inputs["timestep"])
        self._text = self._text_guidance(caller)
        self._expand_rows(self._branches(caller, len(sample)), sample)
        self._set_scale(scale, sample)
        return tuple(self._add_branch(values, len(sample)) for values in (args, kwargs))

    @torch.compiler.disable
    def _post_forward(self, unet: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook: the pipe's own branches, the last one made of two."""
        if self.guidance.face is None:
            return None
        *negative, text, both = output[0].split(self._pictures)
        weight = self.guidance.face / self._text
        mixed = torch.cat([*negative, text + weight * (both - text)])
        return (mixed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=mixed)

    def _text_guidance(self, caller: DiffusionPipeline | None) -> float:
        """The guidance scale of this call; 1 if it has no negative branch."""
        found = None if caller is None else text_guidance(caller)
        if caller is None or found is None:
            if not self.follow:
                return max(self.guidance.text, 1.0)
            who = "no pipe of diffusers calls the UNet" if caller is None else "this pipe"
            tells = "" if caller is None else f" ({type(caller).__name__}) tells no guidance scale"
            raise UserError(
                f"{who}{tells}: give it to the face, as guidance=Guidance(text=7.5), or "
                "Guidance(text=1) for calls without a negative branch"
            )
        if not self.follow and self._scales.begun:
            own, asked = self.guidance.text, float(caller.guidance_scale)
            if own != asked and max(own, found) > 1.0:
                raise UserError(
                    f"the pipe was called with guidance_scale={asked:g}, the face was given "
                    f"{own:g}: they must be the same, or the face be given none"
                )
        return found

    def _branches(self, caller: DiffusionPipeline | None, rows: int) -> tuple[bool, ...]:
        """Which of the branches of this call, the third included, see the face."""
        branches, face = branches_of(caller, self._text > 1.0), self.guidance.face is not None
        # Self-attention guidance calls a second time, with the negative branch alone.
        again = hasattr(caller, "sag_masking")
        if face and (again or branches not in ((False, True), (True,))):
            raise UserError(
                f"{type(caller).__name__} has branches of its own: there a guidance scale of the "
                "face is not supported"
            )
        if again and not self._scales.begun and rows == self._pictures and len(branches) == 2:
            branches = (False,)
        self._pictures, rest = divmod(rows, len(branches))
        if rest:
            raise UserError(
                f"the UNet is called with {rows} rows, which are not {len(branches)} branches "
                f"alike (guidance scale {self._text:g})"
            )
        if self._pictures % self.faces:
            raise UserError(
                f"the pipe draws {self._pictures} pictures at once, there are faces for "
                f"{self.faces}: give one row of face tokens for each picture, or one for all"
            )
        if face:
            return *branches[:-1], False, True
        same = self.guidance.negative_face == "same"
        return tuple(branch or same for branch in branches)

    def _expand_rows(self, branches: tuple[bool, ...], sample: Tensor) -> None:
        """The rows of face keys and regions for a call with these branches."""
        size, device = tuple(sample.shape[2:]), sample.device
        arranged = (branches, self._pictures, size, device)
        if arranged == self._expanded_for:
            return
        self._expanded_for, self._strength = arranged, None
        each = self._pictures // self.faces
        row = torch.arange(self.faces, device=device).repeat_interleave(each)
        seen = torch.cat([row + self.faces * sees for sees in branches])
        self._row = row.repeat(len(branches))
        for i, processor in enumerate(self.processors.values()):
            # Under CPU offload they were computed where the UNet waits.
            self._keys[i] = tuple(half.to(device) for half in self._keys[i])
            processor.keys = tuple(half[seen] for half in self._keys[i])
        if self.regions is not None:
            self.context.regions = {
                n: torch.tensor(mask, device=device).expand(self.faces, -1, -1)[self._row]
                for n, mask in self._by_tokens(self.regions, *size).items()
            }

    def _by_tokens(self, regions: Regions | Masks, height: int, width: int) -> Regions:
        """The regions by the number of tokens, for latents of this size."""
        if not isinstance(regions, Mapping):
            masks = np.stack([np.asarray(resize_area(m, (height, width))) for m in regions])
            levels = len(self.pipe.unet.config.block_out_channels)
            return region_masks(masks[None], (height, width), levels)
        if height * width not in regions:
            raise UserError(f"the regions are not for latents of {height} x {width}")
        return regions

    def _set_scale(self, scale: float, sample: Tensor) -> None:
        """The strength in this call: the step's times what the user has set by now."""
        strength = self.context.strength
        if self._strength is None or strength is not self._strength[0]:
            self._strength = strength, self._row_scales(strength, sample)
        scales = self._strength[1]
        if not scale or (isinstance(scales, float) and not scales):
            self.context.scale = None
        elif isinstance(scales, Mapping):
            self.context.scale = {n: scale * each for n, each in scales.items()}
        elif isinstance(scales, Tensor):
            self.context.scale = scale * scales
        else:
            # Filled on the device: copying a number there would wait for it.
            self.context.scale = torch.full((), scale * scales, device=sample.device)

    def _row_scales(
        self, strength: Tensor | None, sample: Tensor
    ) -> float | Tensor | Mapping[int, Tensor]:
        """A strength, or one for each picture (b,) or person (b, k), over rows and tokens."""
        if strength is None or strength.numel() == 1:
            return 1.0 if strength is None else strength.item()
        regions = self.context.regions or {}
        people = next((mask.shape[1] for mask in regions.values()), 1)
        if strength.ndim == 1:
            strength = strength[:, None].expand(-1, people)
        if strength.shape[0] not in (1, self.faces) or strength.shape[1:] != (people,):
            raise UserError(
                f"strengths {tuple(strength.shape)} of the face are not for {self.faces} pictures "
                f"with {people} people: give a number, one for each picture, or [[...], ...] with "
                "one for each person in it"
            )
        rows = strength.to(sample).expand(self.faces, -1)[self._row]
        if people == 1:
            return rows[..., None]
        # Where regions overlap: the mean of those who are there.
        return {
            n: ((rows[..., None] * mask).sum(1) / mask.sum(1).clamp(min=1))[..., None]
            for n, mask in regions.items()
        }

    def _add_branch(self, value: Any, batch: int) -> Any:
        """The last branch a second time, in everything that has a row for each sample."""
        if self.guidance.face is None:
            return value
        if isinstance(value, Tensor) and value.ndim and len(value) == batch:
            return torch.cat([value, value[-self._pictures :]])
        if isinstance(value, dict):
            return {key: self._add_branch(part, batch) for key, part in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self._add_branch(part, batch) for part in value)
        return value
