"""The same step as it would be written in PyTorch: nothing clever, nothing slow on purpose."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.step_ours import make_config
from fact_convert.io.json_io import read_json
from fact_infer.torch.models import Resampler, attend
from fact_jax.models.clip_text import CLIPTextConfig as TextConfig
from fact_jax.models.unet import UNetConfig

FAIR_WEIGHT, NO_FACE, NO_TEXT, SHUFFLE = 0.01, 0.1, 0.1, 0.5


class Adapter(nn.Module):
    """FACT's adapter: gated attention of the visual tokens over themselves and the face's."""

    def __init__(self, dim: int, heads: int, face_dim: int):
        super().__init__()
        self.heads = heads
        self.linear = nn.Linear(face_dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.Linear(dim, dim)
        self.ff = FeedForward(dim, activation_fn="geglu")
        self.alpha_attn = nn.Parameter(torch.tensor(0.5))
        self.alpha_dense = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, face: Tensor) -> Tensor:
        """The increment."""
        queries = self.norm1(x)
        context = torch.cat([queries, self.norm1(self.linear(face))], dim=1)
        keys, values = self.to_k(context), self.to_v(context)
        mixed = self.to_out(attend(self.to_q(queries), keys, values, self.heads))
        first = self.alpha_attn.tanh() * mixed
        return first + self.alpha_dense.tanh() * self.ff(self.norm2(x + first))


class AdaptedUNet(nn.Module):
    """diffusers' UNet, frozen, with an adapter after the self-attention of every block."""

    def __init__(self, unet: UNet2DConditionModel, face_dim: int):
        super().__init__()
        self.unet = unet.requires_grad_(False)
        blocks = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
        self.adapters = nn.ModuleList(
            Adapter(block.norm1.normalized_shape[0], block.attn1.heads, face_dim)
            for block in blocks
        )
        self._pairs = list(zip(blocks, self.adapters, strict=True))

    def forward(self, latents, t, text, face, mask) -> tuple[Tensor, Tensor]:
        with self._adapted(face, mask) as ratios:
            output = self.unet(latents, t, text).sample
        return output, torch.stack(ratios).mean()

    @contextlib.contextmanager
    def _adapted(self, face: Tensor, mask: Tensor) -> Iterator[list[Tensor]]:
        ratios, handles, entering = [], [], []

        def remember(block, args):
            entering.append(args[0])

        def adapt(adapter):
            def hook(attention, args, output):
                x = entering.pop() + output  # what the block is about to compute
                delta = adapter(x, face)
                ratios.append(fair_ratio(x, delta, mask))
                return output + delta

            return hook

        for block, adapter in self._pairs:
            handles.append(block.register_forward_pre_hook(remember))
            handles.append(block.attn1.register_forward_hook(adapt(adapter)))
        try:
            yield ratios
        finally:
            for handle in handles:
                handle.remove()


def fair_ratio(x: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    side = round(x.shape[1] ** 0.5)
    outside = 1 - functional.adaptive_avg_pool2d(mask[:, None], side).flatten(1)[..., None]
    there = (x.detach() * outside).flatten(1).norm(dim=1)
    return ((delta * outside).flatten(1).norm(dim=1) / there).mean()


def make(size, batch: int, remat: str) -> tuple[Callable[[], float], int]:
    """(a step that returns its loss, how many numbers are trained)."""
    del remat  # the other side's
    torch.manual_seed(0)
    config = make_config(size, batch, "none")
    text_config, unet_config = _configs(size)
    words, width = text_config.max_position_embeddings, config.options.resampler.embedding_dim
    text_encoder = CLIPTextModel(text_config).eval().requires_grad_(False)
    model = AdaptedUNet(UNet2DConditionModel(**unet_config), config.options.resampler.output_dim)
    resampler, schedule = Resampler(config.options.resampler), DDPMScheduler()
    trained = [*model.adapters.parameters(), *resampler.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.learning_rate)
    channels, cells = unet_config["in_channels"], size.cells
    tokens, partner = torch.randn(2, batch, size.tokens, width)
    latents, ids = torch.randn(batch, channels, cells, cells), torch.ones(batch, words).long()
    mask = (torch.randn(batch, cells, cells) > 0).float()

    def step() -> float:
        shuffled, no_face, no_text = (torch.rand(batch, 1) < p for p in (SHUFFLE, NO_FACE, NO_TEXT))
        with torch.no_grad():
            text = text_encoder(ids).last_hidden_state
            empty = text_encoder(torch.zeros_like(ids[:1])).last_hidden_state
        text = torch.where(no_text[..., None], empty, text)
        chosen = torch.where(shuffled[..., None], partner, tokens)
        face = resampler(torch.where(no_face[..., None], 0, chosen))
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (batch,))
        output, fair = model(schedule.add_noise(latents, noise, t), t, text, face, mask)
        loss = functional.mse_loss(output, noise) + FAIR_WEIGHT * fair
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return step, sum(parameter.numel() for parameter in trained)


def _configs(size) -> tuple[CLIPTextConfig, dict]:
    """Of the text encoder and the UNet, as their libraries want them."""
    if not size.base.startswith("miniature"):
        unet, text = UNetConfig.sd15().to_dict(), TextConfig.sd15().to_dict()
    else:
        unet = read_json(f"{size.base}/unet/config.json")
        text = read_json(f"{size.base}/text_encoder/config.json")
    return CLIPTextConfig(**text), {k: v for k, v in unet.items() if not k.startswith("_")}
