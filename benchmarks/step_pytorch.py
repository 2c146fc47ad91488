"""The same step as it would be written in PyTorch: nothing clever, nothing slow on purpose."""

import argparse
import functools

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.step import Side
from benchmarks.step_ours import make_config
from fact_convert.io.json_io import read_json
from fact_infer.jax_config import pin_jax_to_cpu
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
        self._entering: list[Tensor] = []
        self._ratios: list[Tensor] = []
        for block, adapter in zip(blocks, self.adapters, strict=True):
            block.register_forward_pre_hook(self._remember)
            block.attn1.register_forward_hook(functools.partial(self._adapt, adapter))

    def forward(self, latents, t, text, face, mask) -> tuple[Tensor, Tensor]:
        self._face, self._mask = face, mask
        output = self.unet(latents, t, text).sample
        ratio = torch.stack(self._ratios).mean()
        self._ratios.clear()
        return output, ratio

    def _remember(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._entering.append(args[0])

    def _adapt(self, adapter: Adapter, attention: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = self._entering.pop() + output  # what the block is about to compute
        delta = adapter(x, self._face)
        self._ratios.append(fair_ratio(x, delta, self._mask))
        return output + delta


def fair_ratio(x: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    side = round(x.shape[1] ** 0.5)
    outside = 1 - functional.adaptive_avg_pool2d(mask[:, None], side).flatten(1)[..., None]
    there = (x.detach() * outside).flatten(1).norm(dim=1)
    return ((delta * outside).flatten(1).norm(dim=1) / there).mean()


def make(size, arguments: argparse.Namespace) -> Side:
    pin_jax_to_cpu()  # the other side's configuration is read with it
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu, batch = device.type == "cuda", arguments.batch
    half = getattr(torch, arguments.precision)
    config = make_config(size, arguments)
    text_config, unet_config = _configs(size)
    words, width = text_config.max_position_embeddings, config.options.resampler.embedding_dim
    text_encoder = CLIPTextModel(text_config).eval().requires_grad_(False)
    model = AdaptedUNet(UNet2DConditionModel(**unet_config), config.options.resampler.output_dim)
    resampler, schedule = Resampler(config.options.resampler).to(device), DDPMScheduler()
    model.to(device)
    if on_gpu:  # what is frozen lies there as it is computed with
        text_encoder.to(device, half)
        model.unet.to(half).to(memory_format=torch.channels_last)
    trained = [*model.adapters.parameters(), *resampler.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.learning_rate)
    predict = torch.compile(model) if arguments.compile else model
    channels, cells = unet_config["in_channels"], size.cells
    tokens, partner = torch.randn(2, batch, size.tokens, width, device=device)
    latents = torch.randn(batch, channels, cells, cells, device=device)
    mask = (torch.randn(batch, cells, cells, device=device) > 0).float()
    ids = torch.ones(batch, words, dtype=torch.long, device=device)

    def forward() -> Tensor:
        shuffled, no_face, no_text = (
            torch.rand(batch, 1, 1, device=device) < p for p in (SHUFFLE, NO_FACE, NO_TEXT)
        )
        with torch.no_grad():
            text = text_encoder(ids).last_hidden_state
            empty = text_encoder(torch.zeros_like(ids[:1])).last_hidden_state
        text = torch.where(no_text, empty, text)
        chosen = torch.where(shuffled, partner, tokens)
        face = resampler(torch.where(no_face, 0, chosen))
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (batch,), device=device)
        output, fair = predict(schedule.add_noise(latents, noise, t), t, text, face, mask)
        return functional.mse_loss(output.float(), noise) + FAIR_WEIGHT * fair

    def step() -> float:
        with torch.autocast(device.type, half, enabled=half != torch.float32):
            loss = forward()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return Side(
        step=step,
        trainable=sum(parameter.numel() for parameter in trained),
        device_bytes=lambda: torch.cuda.max_memory_allocated() if on_gpu else None,
    )


def _configs(size) -> tuple[CLIPTextConfig, dict]:
    """Of the text encoder and the UNet, as their libraries want them."""
    if not size.base.startswith("miniature"):
        unet, text = UNetConfig.sd15().to_dict(), TextConfig.sd15().to_dict()
    else:
        unet = read_json(f"{size.base}/unet/config.json")
        text = read_json(f"{size.base}/text_encoder/config.json")
    return CLIPTextConfig(**text), {k: v for k, v in unet.items() if not k.startswith("_")}
