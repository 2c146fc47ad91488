"""PyTorch's sides: diffusers' UNet alone, with our adapter, and with it as released."""

import contextlib
import time
from collections.abc import Callable, Iterator

import diffusers
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.inference_jax import unet_config
from benchmarks.memory import peak
from fact_infer.jax_config import pin_jax_to_cpu
from fact_infer.torch.attention_processors import FaceContext, FaceProcessor, installed, text_blocks
from fact_infer.torch.guidance_hooks import GuidanceHooks
from fact_jax.diffusion.noise_schedules import NoiseSchedule
from fact_jax.fact import Guidance
from fact_jax.models.vae import VAEConfig
from fact_jax.utils.errors import first_line

_UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *args, **options: sdpa_flop_count(q, k, v)
    )
}
"""Attention on a CPU, which PyTorch's counter of operations leaves out."""


class AsReleased(FaceProcessor):
    """The same sum as the released code goes about it: face tokens ask queries too, which are
    thrown away, their keys are computed anew in each call, and the matrix of attention is made."""

    def face_keys(self, face: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.norm1(self.linear(face))
        return tokens, tokens

    def increment(self, x: Tensor, face: tuple[Tensor, Tensor], scale: Tensor) -> Tensor:
        attn = self.attn
        tokens = torch.cat([self.norm1(x), face[0]], dim=1)
        q, k, v = (
            layer(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        mixed = attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))[:, : x.shape[1]]
        first = scale * self.alpha_attn.tanh() * mixed
        return first + scale * self.alpha_dense.tanh() * self.ff(self.norm2(x + first))


@torch.no_grad()
def measure(size, arguments) -> dict:
    """Seconds of each timed call of every side; or of pictures."""
    pin_jax_to_cpu()
    torch.manual_seed(0)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # On a CPU 16 bits are for matrix products only, which is what autocast does.
    autocast = device.type == "cpu" and arguments.dtype != "float32"
    dtype = torch.float32 if autocast else getattr(torch, arguments.dtype)
    unet = _make_unet(size).to(device, dtype)
    if device.type == "cuda" or autocast:
        # In 16 bits PyTorch's other order takes seconds a layer on a processor without such
        # arithmetic.
        unet.to(memory_format=torch.channels_last)
    adapters = _make_adapters(unet, size)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    name = (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.dtype}"
    )
    with torch.autocast("cpu", getattr(torch, arguments.dtype), enabled=autocast):
        if arguments.pictures:
            return {"device": name, "pictures": _pictures(unet, adapters, size, arguments)}
        return {"device": name} | _calls(unet, adapters, size, arguments)


def _make_unet(size) -> UNet2DConditionModel:
    config = unet_config(size.unet).to_dict()
    return UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()


def _make_adapters(unet: nn.Module, size) -> dict[str, FaceProcessor]:
    adapters = {}
    for path, block in text_blocks(unet):
        dim = block.norm2.normalized_shape[0]
        adapter = FaceProcessor(dim, block.attn2.heads, size.face_dim)
        adapter.alpha_attn.fill_(0.5), adapter.alpha_dense.fill_(0.5)
        adapters[path] = adapter.requires_grad_(False).eval().to(unet.device, unet.dtype)
    return adapters


@contextlib.contextmanager
def _adapted(unet, adapters: dict[str, FaceProcessor], kind: type) -> Iterator[FaceContext]:
    """The adapters in the UNet, computed in one way or the other, with the same weights."""
    context = FaceContext()
    for path, block in text_blocks(unet):
        adapters[path].__class__ = kind
        adapters[path].install(path, block, context)
    try:
        yield context
    finally:
        for processor in installed(unet).values():
            processor.clear()
            processor.remove()


def _calls(unet, adapters, size, arguments) -> dict:
    batch, like = arguments.batch, {"device": unet.device, "dtype": unet.dtype}
    x = torch.randn(batch, unet.config.in_channels, size.cells, size.cells, **like)
    text = torch.randn(batch, size.words, unet.config.cross_attention_dim, **like)
    face = torch.randn(batch, size.face_tokens, size.face_dim, **like)
    t = torch.tensor(500, device=unet.device)

    def call(model: nn.Module) -> float:
        return _seconds(lambda: model(x, t, encoder_hidden_states=text), unet.device)

    def with_face(kind: type) -> Callable[[nn.Module], float]:
        def timed(model: nn.Module) -> float:
            with _adapted(unet, adapters, kind) as context:
                for processor in installed(unet).values():
                    processor.keys = processor.face_keys(face)
                context.scale = torch.tensor(1.0, device=unet.device)
                return call(model)

        return timed

    sides = {"plain": call, "ours": with_face(FaceProcessor), "released": with_face(AsReleased)}
    seconds, operations = {side: [] for side in sides}, {}
    for side, run in sides.items():
        with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
            run(unet)
        operations[side] = counter.get_total_flops()
    model = unet
    if arguments.compile:
        model = torch.compile(unet)
        for run in sides.values():
            run(model)
    for _ in range(arguments.runs):
        for side, run in sides.items():
            seconds[side].append(run(model))
    return {"seconds": seconds, "operations": operations, "product": _product_rate(unet)}


def _product_rate(unet: nn.Module, runs: int = 5) -> float:
    """Operations a second in a product of two matrices, the most that a call can come near."""
    side = 8192 if unet.device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=unet.device, dtype=unet.dtype)
    return 2 * side**3 / min(_seconds(lambda: a @ b, unet.device) for _ in range(runs))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _pictures(unet, adapters, size, arguments) -> list[dict]:
    """Seconds a picture and peak memory of every side, of each batch."""
    device, dtype = unet.device, unet.dtype
    vae = VAEConfig.mini() if size.unet == "mini" else VAEConfig.sd15()
    parts = {k: v for k, v in vae.to_dict().items() if not k.startswith("_")}
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**parts).to(device, dtype),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=PNDMScheduler(**_schedule()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    if arguments.compile:
        pipe.unet = torch.compile(unet)
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    words = (size.words, unet.config.cross_attention_dim)
    factor = 2 ** (len(vae.block_out_channels) - 1)
    rows = []
    for batch in arguments.pictures:
        text = torch.randn(batch, *words, device=device, dtype=dtype)
        negative = torch.randn(1, *words, device=device, dtype=dtype).expand_as(text)
        null, face = torch.randn(2, batch, size.face_tokens, size.face_dim, device=device)

        def draw(text=text, negative=negative):
            pipe(
                prompt_embeds=text,
                negative_prompt_embeds=negative,
                guidance_scale=5.0,
                num_inference_steps=arguments.steps,
                height=size.cells * factor,
                width=size.cells * factor,
                output_type="np",
            )

        for side, kind in (("plain", None), ("face", FaceProcessor), ("released", AsReleased)):
            row = {"side": side, "batch": batch}
            rows.append(row)
            with contextlib.ExitStack() as stack:
                if kind is not None:
                    context = stack.enter_context(_adapted(unet, adapters, kind))
                    hooks = GuidanceHooks(pipe, context, Guidance(text=5.0))
                    stack.enter_context(hooks.active(face, null))
                try:
                    row |= _timed(draw, batch, arguments.runs, pipe)
                except RuntimeError as error:  # out of memory, or no compiler for the compiler
                    row["failed"] = first_line(error)
    return rows


def _schedule() -> dict:
    schedule = NoiseSchedule.sd15().to_dict() | {"skip_prk_steps": True}
    return {k: v for k, v in schedule.items() if not k.startswith("_")}


def _timed(draw: Callable[[], None], batch: int, runs: int, pipe) -> dict:
    device = pipe.unet.device
    first = _seconds(draw, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [_seconds(draw, device) / batch for _ in range(runs)]
    modules = (pipe.unet, pipe.vae)
    held = sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
    return {
        "first_seconds": first,
        "seconds": seconds,
        "device_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "host_bytes": peak(),
        "weights": held,
    }
