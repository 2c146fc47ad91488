"""Attention processors that add FACT's adapter to diffusers' UNet.

A block of diffusers computes ``x + attn2(norm2(x), text)``, and the adapter belongs before it:
``(x + d) + attn2(norm2(x + d), text)`` with d the adapter's increment. So ``norm2`` is handed
``x + d`` by a hook, and the processor of ``attn2`` adds d to what the attention gives: the block's
own sum is then right. Whatever processor the attention had, or is given later, works inside ours.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fact_infer.torch.models import attend
from fact_jax.fact import Guidance
from fact_jax.utils.errors import UserError

Keys = tuple[Tensor, Tensor]


@dataclasses.dataclass
class FaceContext:
    """The generation in progress, as the processors of one pipe see it.

    ``guidance`` is None outside of a generation with a face. ``strength`` is what the user asked
    for: one number, or one for each picture (b,) or for each person in it (b, k). ``scale`` is the
    adapter's strength in this call of the UNet: () or (b, 1, 1), or by the number of tokens n
    (b, n, 1); None: it is silent and costs nothing. ``regions`` (b, k, n), by the number of tokens
    n, say whose region of k people each token lies in; the face tokens are then theirs, an equal
    share each (see ``fact_jax.models.adapter.FaceControls``).
    """

    guidance: Guidance | None = None
    strength: Tensor | None = None
    scale: Tensor | Mapping[int, Tensor] | None = None
    regions: Mapping[int, Tensor] | None = None


class _GatedAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(
        self, x: Tensor, face: Keys, regions: Tensor | None = None, *, adain: bool = False
    ) -> Tensor:
        own = self.to_k(x), self.to_v(x)
        if adain:
            people = 1 if regions is None else regions.shape[1]
            face = tuple(_match_mean(a, to, people) for a, to in zip(face, own, strict=True))
        keys, values = (
            torch.cat([a, added.to(a.dtype)], dim=1) for a, added in zip(own, face, strict=True)
        )
        mask = None if regions is None else _attention_mask(regions, face[0].shape[1])
        return self.to_out[0](attend(self.to_q(x), keys, values, self.heads, mask))


class FaceProcessor(nn.Module):
    """One block's adapter, around the processor that its ``attn2`` has (``inner``).

    Its parameters have the released names under ``...attn2.processor.`` and move with the pipe, but
    are no part of the UNet's state: a pipe is saved as the base that it is. ``own_norm`` is for
    files that hold a copy of the block's ``norm2``. ``keys`` are keys and values of the face's
    tokens, computed once a generation and None outside of it; ``factor`` is what this block's
    strength is multiplied by.
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
        self.inner: Any = None
        self.keys: Keys | None = None
        self.factor = 1.0
        self._increment: Tensor | None = None

    def install(self, path: str, block: BasicTransformerBlock, context: FaceContext) -> None:
        """Take the place in ``block``, whose path in the UNet is ``path``."""
        attention = block.attn2
        # In a tuple, so that the base's modules do not become a part of this one.
        self.path, self.context, self._block = path, context, (block,)
        self.inner = attention.processor
        attention.set_processor(self)
        # To diffusers its own processor is still there: slicing and the like replace that one.
        attention.set_processor, attention.get_processor = self._set_inner, self._get_inner
        self._hooks = [
            block.norm2.register_forward_pre_hook(self._add_increment),
            attention.register_state_dict_post_hook(_drop_adapter_state),
            attention.register_load_state_dict_pre_hook(_keep_adapter_state),
        ]
        if self.ln is not None:
            self._hooks.append(block.norm2.register_forward_hook(self._copied_norm))

    def remove(self) -> None:
        """Give the block back as it was."""
        (block,) = self._block
        for hook in self._hooks:
            hook.remove()
        del block.attn2.set_processor, block.attn2.get_processor
        block.attn2.set_processor(self.inner)

    def clear(self) -> None:
        """Drop what belongs to a generation."""
        self.keys = self._increment = None

    def face_keys(self, face: Tensor) -> Keys:
        """Keys and values (b, m, c) of face tokens."""
        tokens = self.norm1(self.linear(face))
        return self.attn.to_k(tokens), self.attn.to_v(tokens)

    def increment(self, x: Tensor, face: Keys, scale: Tensor | float) -> Tensor:
        """What the adapter adds to the visual tokens ``x``; only they ask queries."""
        guidance, regions = self.context.guidance or _PLAIN, self.context.regions
        regions = None if regions is None else regions[x.shape[1]]
        scale = scale * self.factor
        mixed = self.attn(self.norm1(x), face, regions, adain=guidance.adain)
        first = scale * self.alpha_attn.tanh() * mixed
        added = first + scale * self.alpha_dense.tanh() * self.ff(self.norm2(x + first))
        if regions is not None:
            added = added.where(regions.any(dim=1)[..., None], 0)
        return added if guidance.cap is None else _cap_norm(added, x, guidance.cap)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        """diffusers' call of a processor: the attention to the text, plus the kept increment.

        diffusers passes on what the signature names: that is all that its own processors take.
        """
        increment, self._increment = self._increment, None
        more = {"temb": temb, "ip_adapter_masks": ip_adapter_masks}
        text = self.inner(
            attn,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **{name: value for name, value in more.items() if value is not None},
        )
        return text if increment is None else text + increment

    def _add_increment(self, norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Before the block's ``norm2``: the tokens with the increment, which is kept for later."""
        scale = self.context.scale
        if self.keys is None:
            if self.context.guidance is not None:
                raise UserError(
                    "the UNet is called in another way than the face was prepared for (with or "
                    "without torch.compile): name the pipe that calls it, as fact.on(pipe).face"
                )
            return None
        if scale is None or not self.factor:
            return None
        if isinstance(scale, Mapping):
            scale = scale[args[0].shape[1]]
        self._increment = self.increment(args[0], self.keys, scale)
        return (args[0] + self._increment,)

    def _copied_norm(self, norm: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return output if self.keys is None or self.ln is None else self.ln(args[0])

    def _set_inner(self, processor: Any) -> None:
        del self.inner  # a module cannot be overwritten by what is none
        self.inner = processor

    def _get_inner(self) -> Any:
        return self.inner


_PLAIN = Guidance()


def _match_mean(face: Tensor, to: Tensor, people: int) -> Tensor:
    """Each person's tokens (b, m, c), their mean replaced by that of ``to`` (arXiv 2403.11781)."""
    own = face.unflatten(1, (people, -1))
    mean = to.mean(dim=1)[:, None, None].to(face.dtype)
    return (own - own.mean(dim=2, keepdim=True) + mean).flatten(1, 2)


def _attention_mask(regions: Tensor, tokens: int) -> Tensor:
    """Which of all visual and then ``tokens`` face tokens each visual token sees: (b, n, keys)."""
    batch, people, n = regions.shape
    faces = regions.transpose(1, 2).repeat_interleave(tokens // people, dim=2)
    return torch.cat([faces.new_ones(batch, n, n), faces], dim=2)


def _cap_norm(added: Tensor, x: Tensor, cap: float) -> Tensor:
    """``added`` times min(1, cap |x| / |added|), norms of a whole sample in float32."""
    length, limit = (a.float().flatten(1).norm(dim=1)[:, None, None] for a in (added, x))
    limit = cap * limit
    return added * torch.where(length > limit, limit / length, 1.0).to(added.dtype)


def _drop_adapter_state(
    attention: Attention, state: dict[str, Tensor], prefix: str, _: dict
) -> None:
    """A UNet's state is without the adapter's, but has that of the processor inside."""
    own, inner = f"{prefix}processor.", f"{prefix}processor.inner."
    for key in [key for key in state if key.startswith(own)]:
        tensor = state.pop(key)
        if key.startswith(inner):
            state[own + key.removeprefix(inner)] = tensor


def _keep_adapter_state(
    attention: Attention, state: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """The other way: a UNet takes such a state, and the adapter keeps its own."""
    for key, tensor in attention.processor.state_dict().items():
        name = f"{prefix}processor.{key}"
        outside = f"{prefix}processor.{key.removeprefix('inner.')}"
        state[name] = state.pop(outside, tensor) if name != outside else tensor


def text_blocks(unet: nn.Module) -> Iterator[tuple[str, BasicTransformerBlock]]:
    """Every transformer block with text cross-attention, by its path in the UNet."""
    for path, module in unwrap_compiled(unet).named_modules():
        if isinstance(module, BasicTransformerBlock) and module.attn2 is not None:
            yield path, module


def unwrap_compiled(unet: nn.Module) -> nn.Module:
    """The UNet itself, if ``torch.compile`` has wrapped it."""
    return getattr(unet, "_orig_mod", unet)


def installed(unet: nn.Module) -> dict[str, FaceProcessor]:
    """The installed processors, by the path of their block."""
    return {
        path: block.attn2.processor
        for path, block in text_blocks(unet)
        if isinstance(block.attn2.processor, FaceProcessor)
    }
