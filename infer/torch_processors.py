"""FACT's adapter inside diffusers' UNet: processors of the text cross-attentions.

A block of diffusers computes ``x + attn2(norm2(x), text)``, and the adapter belongs before it:
``(x + d) + attn2(norm2(x + d), text)`` with d the adapter's increment. Nothing of a block but the
processor of ``attn2`` can be replaced, so the block's own ``norm2`` is made to hand x on, and the
processor returns ``d + attn2(norm2(x + d), text)``: the block's own sum then gives the right thing.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from torch import Tensor, nn

from infer.torch_models import attend

FaceKeys = tuple[Tensor, Tensor]


@dataclasses.dataclass
class FaceContext:
    """What the processors of one pipe know of the generation in progress.

    ``keys`` are those of every block by its path; None, outside of a generation with a face,
    makes the pipe compute exactly what it did before the adapter was loaded.
    """

    keys: Mapping[str, FaceKeys] | None = None
    scale: float = 0.0


class _GatedAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, face: FaceKeys) -> Tensor:
        keys = torch.cat([self.to_k(x), face[0]], dim=1)
        values = torch.cat([self.to_v(x), face[1]], dim=1)
        return self.to_out[0](attend(self.to_q(x), keys, values, self.heads))


class FaceProcessor(nn.Module):
    """One block's adapter, in the place of the processor that its ``attn2`` had.

    Its parameters have the released names, ``...attn2.processor.*`` in the UNet's own state, and
    move with the pipe. ``own_norm`` is for files that hold a copy of the block's ``norm2``.
    """

    def __init__(self, dim: int, heads: int, face_dim: int, *, own_norm: bool = False):
        super().__init__()
        self.linear = nn.Linear(face_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = _GatedAttention(dim, heads)
        self.ff = FeedForward(dim, activation_fn="geglu")
        self.alpha_attn = nn.Parameter(torch.zeros(()))
        self.alpha_dense = nn.Parameter(torch.zeros(()))
        self.ln = nn.LayerNorm(dim) if own_norm else None

    def install(self, path: str, block: BasicTransformerBlock, context: FaceContext) -> None:
        """Take the place in ``block``; ``path`` finds this block's keys in the context."""
        # In a tuple, so that the base's norm does not become a part of this module's state.
        self._place = (path, block, block.attn2.processor, context)
        block.norm2.forward = _hand_on
        block.attn2.set_processor(self)

    def remove(self) -> None:
        """Give the block back as it was."""
        _, block, former, _ = self._place
        block.attn2.set_processor(former)
        del block.norm2.forward

    def face_keys(self, face: Tensor) -> FaceKeys:
        """Keys and values (b, m, c) of face tokens, computed once a generation."""
        tokens = self.norm1(self.linear(face))
        return self.attn.to_k(tokens), self.attn.to_v(tokens)

    def increment(self, x: Tensor, face: FaceKeys, scale: float) -> Tensor:
        """What the adapter adds to the visual tokens ``x``; only they ask queries."""
        first = scale * self.alpha_attn.tanh() * self.attn(self.norm1(x), face)
        return first + scale * self.alpha_dense.tanh() * self.ff(self.norm2(x + first))

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """diffusers' call, ``hidden_states`` being the block's tokens before their ``norm2``."""
        path, block, former, context = self._place
        norm, increment = block.norm2, None
        if context.keys is not None:
            norm = self.ln or norm
            if context.scale:
                increment = self.increment(hidden_states, context.keys[path], context.scale)
                hidden_states = hidden_states + increment
        text = former(
            attn,
            type(norm).forward(norm, hidden_states),
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            temb=temb,
        )
        return text if increment is None else increment + text


def _hand_on(x: Tensor) -> Tensor:
    return x


def text_blocks(unet: nn.Module) -> Iterator[tuple[str, BasicTransformerBlock]]:
    """Every transformer block with text cross-attention, by its path in the UNet."""
    for path, module in unet.named_modules():
        if isinstance(module, BasicTransformerBlock) and module.attn2 is not None:
            yield path, module


def installed(unet: nn.Module) -> dict[str, FaceProcessor]:
    """The processors that are in place, by the path of their block."""
    return {
        path: block.attn2.processor
        for path, block in text_blocks(unet)
        if isinstance(block.attn2.processor, FaceProcessor)
    }
