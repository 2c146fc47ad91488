"""FACT in a Stable Diffusion pipeline of diffusers: ``load_fact``, ``unload_fact``."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from converters.adapter import check_blocks, describe, infer_resampler, split_state
from converters.weights import read_config
from fact_jax.errors import UserError
from fact_jax.fact import Combine, Guidance
from fact_jax.regions import Regions
from infer.base import FaceFiles, read_face_files
from infer.hub import find_face_files, save_face_files
from infer.program import keep_jax_on_cpu
from infer.torch_models import Resampler, TransFaceTokens, encoder_from, load_strictly
from infer.torch_processors import FaceContext, FaceProcessor, installed, text_blocks, whole
from infer.torch_steering import Steering


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactTorch:
    """A pipe with an adapter in it, and what turns photos into its condition.

    Outside of :meth:`face` the pipe draws what it always drew.
    """

    pipe: Any
    encoder: TransFaceTokens
    resampler: Resampler
    context: FaceContext
    files: FaceFiles

    def on(self, pipe: Any) -> "FactTorch":
        """The same for another pipe around the same UNet, as ``Other.from_pipe(pipe)`` gives."""
        if whole(pipe.unet) is not whole(self.pipe.unet):
            raise UserError("this pipe has another UNet: load_fact into it")
        return dataclasses.replace(self, pipe=pipe)

    @torch.no_grad()
    def face_tokens(
        self, crops: UInt8[np.ndarray, "b p s s 3"], combine: Combine = "concat", people: int = 1
    ) -> Tensor:
        """Face tokens (b, m, d) for pictures from ``p`` aligned crops each, in a row; float32.

        The crops are of ``people`` people, an equal number of each, one's after another's.
        """
        pictures, photos = crops.shape[:2]
        pixels = torch.from_numpy(np.ascontiguousarray(crops)).flatten(0, 1).permute(0, 3, 1, 2)
        device = self.pipe.device
        tokens = self.encoder.to(device)(pixels.to(device, torch.float32) / 127.5 - 1)
        tokens = self.resampler.to(device)(tokens)
        tokens = tokens.unflatten(0, (pictures, people, photos // people))
        return _together(tokens, combine).flatten(1, 2)

    @torch.no_grad()
    def null_tokens(self, photos: int = 1) -> Tensor:
        """The condition 'no face' (1, m, d): the resampler of all-zero encoder tokens."""
        config = self.encoder.config
        zeros = torch.zeros(1, config.tokens, config.embed_dim, device=self.pipe.device)
        return self.resampler.to(zeros.device)(zeros).repeat(1, photos, 1)

    @contextlib.contextmanager
    def face(
        self,
        face: Tensor,
        guidance: Guidance,
        scales: Sequence[float] | None = None,
        regions: Regions | None = None,
    ) -> Iterator[None]:
        """While this is entered, the pipe draws as many pictures as ``face`` has rows (b, m, d).

        Call the pipe with ``guidance_scale=guidance.text``, as often as you like. ``scales`` are
        the adapter's strength in each call of the UNet; without them it follows from ``guidance``
        and the timesteps of the pipe's scheduler, whichever that is. With ``regions``
        (``fact_jax.regions``) a row holds the tokens of several people, an equal share each.
        """
        inside = installed(self.pipe.unet).values()
        if not inside or any(processor.context is not self.context for processor in inside):
            raise UserError("this adapter is no longer in the pipe: load_fact it again")
        people = next(iter(regions.values())).shape[1] if regions else 1
        if face.shape[1] % people:
            raise UserError(f"{face.shape[1]} face tokens cannot be of {people} people alike")
        photos = face.shape[1] // self.resampler.config.num_queries
        null = self.null_tokens(photos).to(face).expand_as(face)
        branches = [face]
        if guidance.face is not None:
            branches = [null, face]
        if guidance.text > 1.0:
            same = guidance.negative_face == "same" and guidance.face is None
            branches = [face if same else null, *branches]
        steering = Steering(self.pipe, self.context, guidance, scales, regions)
        with steering.through(branches):
            yield

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write adapter and encoder to a folder, which ``load_fact(pipe, folder)`` reads.

        As it is, the folder can be uploaded as a repository of the Hub and be named instead.
        """
        config = describe(dict(self.pipe.unet.config), self.resampler.config)
        save_face_files(self.files, folder, config)


def load_fact(
    pipe: Any,
    adapter: str | os.PathLike | None = None,
    encoder: str | os.PathLike | None = None,
    *,
    files: FaceFiles | None = None,
) -> FactTorch:
    """Put an adapter into a Stable Diffusion pipeline of diffusers.

    ``adapter`` and ``encoder`` are paths or names on the Hub, as ``find_face_files`` takes them;
    ``files`` is both as ``read_face_files`` opened them, instead.
    JAX, which makes noise and schedules, stays on the CPU, unless this process used it before.
    Raises UserError if they are not what they should be or the adapter is for another base.
    """
    keep_jax_on_cpu()
    files = files or read_face_files(*find_face_files(adapter, encoder))
    if installed(pipe.unet):
        raise UserError("this pipe has a face adapter already: unload_fact it first")
    resampler_state, states = split_state(files.adapter_state, files.adapter)
    found = files.metadata.get("config", {}).get("resampler") or infer_resampler(resampler_state)
    with torch.device("meta"):
        resampler = Resampler(read_config("resampler", found))
    load_strictly(resampler, resampler_state, files.adapter)
    encoder = encoder_from(files.encoder_state, files.encoder_config, files.encoder)
    blocks = dict(text_blocks(pipe.unet))
    widths = {path: block.norm2.normalized_shape[0] for path, block in blocks.items()}
    check_blocks(states, widths, files.adapter)
    context = FaceContext()
    processors = {}
    for path, block in blocks.items():
        with torch.device("meta"):
            processor = FaceProcessor(
                widths[path],
                block.attn2.heads,
                resampler.config.output_dim,
                own_norm="ln.weight" in states[path],
            )
        source = f"{files.adapter}, {path}"
        processors[path] = load_strictly(processor, states[path], source, pipe.unet.dtype)
    for path, processor in processors.items():
        processor.to(pipe.unet.device).install(path, blocks[path], context)
    return FactTorch(pipe=pipe, encoder=encoder, resampler=resampler, context=context, files=files)


def unload_fact(pipe: Any) -> None:
    """Give a pipe back as it was before ``load_fact``: the same modules, the same processors."""
    for processor in installed(pipe.unet).values():
        processor.remove()


def _together(tokens: Tensor, combine: Combine) -> Tensor:
    """``fact_jax.fact.combine_photos`` of tokens (b, k, p, m, d): (b, k, tokens, d)."""
    if combine == "concat":
        return tokens.flatten(2, 3)
    if combine == "average":
        return tokens.mean(dim=2)
    lengths = tokens.norm(dim=-1, keepdim=True)
    mean = (tokens / lengths.clamp(min=1e-6)).mean(dim=2)
    return mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-6) * lengths.mean(dim=2)
