"""The JAX side of `benchmarks.accelerator`: does this device compute what a CPU computes?

Errors are relative: the norm of the difference over the norm of what is right, the largest of all
arrays that come out. Right is float32 on a CPU from the same weights and inputs, which are numbers
that bfloat16 holds; for attention, the plain form in float32 on the device itself.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.inference_jax import model_configs
from benchmarks.random_weights import random_model
from fact_jax.diffusion.noise_schedules import NoiseSchedule
from fact_jax.diffusion.samplers import SAMPLERS, python_loop
from fact_jax.models.adapter import FaceControls
from fact_jax.models.controlnet import ControlNetConfig
from fact_jax.ops.attention import attention, attention_plain
from fact_jax.ops.attention_kernels import HiddenKeys, installed_kernels
from fact_jax.ops.precision import matmul_precision
from fact_jax.regions import region_masks
from fact_jax.utils.errors import first_line

PRECISIONS = ("float32", "bfloat16")
MOST = {
    "models": {"float32": 1e-4, "bfloat16": 5e-2},
    "samplers": {"float32": 1e-4, "bfloat16": 5e-2},
    "attention": {"float32": 1e-5, "bfloat16": 1e-2},
}
"""Largest errors."""

LEVELS = {
    "sd15": ((4096, 40), (1024, 80), (256, 160), (64, 160)),
    "mini": ((400, 16), (64, 32)),
}
"""Visual tokens and head width of the UNet's levels."""
HEADS = {"sd15": 8, "mini": 2}
FACE_TOKENS, TEXT_TOKENS, BATCH, STEPS = 16, 77, 2, 10
FACES = {
    "no face": (0, False),
    "1 face": (1, False),
    "2 faces": (2, False),
    "3 faces": (3, False),
    "2 regions": (2, True),
    "3 regions": (3, True),
    "text": None,
}
"""What the visual tokens attend to beside themselves, and whether under regions; or to a text."""


class Case(NamedTuple):
    """A call of a model."""

    name: str
    call: Callable[..., Any]
    inputs: tuple[np.ndarray, ...]


def models(size: str) -> list[dict]:
    """Every model in both precisions."""
    rows = []
    for kind, config, cases in _models(size):
        graph, state = random_model(kind, config, "bfloat16")
        for case in cases:
            call = functools.partial(_call, graph, case.call)
            rows += _compared("models", case.name, jax.jit(call), state, *case.inputs)
    return rows


def _call(graph: nnx.GraphDef, call: Callable[..., Any], state: Any, *inputs: jax.Array) -> Any:
    return call(nnx.merge(graph, state), *inputs)


def _models(size: str) -> Iterator[tuple[str, Any, list[Case]]]:
    configs, rng = model_configs(size), np.random.default_rng(0)
    unet, vae, encoder = (configs[kind] for kind in ("unet", "vae", "transface"))

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype("bfloat16")

    words = configs["clip_text"].max_position_embeddings
    ids = rng.integers(0, configs["clip_text"].vocab_size, (BATCH, words), np.int32)
    yield "clip_text", configs["clip_text"], [Case("text encoder", lambda m, ids: m(ids), (ids,))]
    crops = draw(BATCH, encoder.img_size, encoder.img_size, 3)
    yield "transface", encoder, [Case("face encoder", lambda m, crops: m(crops), (crops,))]
    tokens = draw(BATCH, encoder.tokens, encoder.embed_dim)
    yield "resampler", configs["resampler"], [Case("resampler", lambda m, x: m(x), (tokens,))]
    side, pixels = unet.sample_size, unet.sample_size * vae.downscale
    latents = draw(BATCH, side, side, unet.in_channels)
    yield (
        "vae",
        vae,
        [
            Case("VAE's encoder", lambda m, x: m.encode(x), (draw(1, pixels, pixels, 3),)),
            Case("VAE's decoder", lambda m, x: m.decode(x), (latents[:1],)),
        ],
    )
    text, t = draw(BATCH, words, unet.cross_attention_dim), np.array([801, 37])
    face = draw(BATCH, 2 * FACE_TOKENS, unet.face_dim)
    halves = np.stack([np.tile(np.arange(8) < 4, (8, 1)), np.tile(np.arange(8) >= 4, (8, 1))])
    levels = len(unet.block_out_channels)
    regions = region_masks(halves[None].astype(np.float32), (side, side), levels)

    def in_regions(m, x, t, text, face):
        own = {n: jnp.repeat(mask, BATCH, axis=0) for n, mask in regions.items()}
        return m(x, t, text, face=face, controls=FaceControls(regions=own))

    inputs = (latents, t, text)
    yield (
        "unet",
        unet,
        [
            Case("UNet", lambda m, x, t, text: m(x, t, text), inputs),
            Case("UNet, face", lambda m, x, t, text, face: m(x, t, text, face), (*inputs, face)),
            Case("UNet, people in regions", in_regions, (*inputs, face)),
        ],
    )
    if size == "sd15":  # the miniature has none
        config = ControlNetConfig.sd15()
        picture = draw(BATCH, pixels, pixels, 3)

        def control(m, x, t, text, picture):
            return m(x, t, text, m.embed(picture))

        yield "controlnet", config, [Case("ControlNet", control, (*inputs, picture))]


def samplers() -> list[dict]:
    """Every sampler around the miniature's UNet, whose numbers alone are of 16 bits."""
    config = model_configs("mini")["unet"]
    graph, state = random_model("unet", config, "bfloat16")
    unet = jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))
    rng = np.random.default_rng(0)
    side = config.sample_size
    noise = rng.standard_normal((BATCH, side, side, config.in_channels), np.float32)
    text = rng.standard_normal((BATCH, 24, config.cross_attention_dim)).astype("bfloat16")
    rows = []
    for name, sample in SAMPLERS.items():

        def draw(state, text, noise, sample=sample):
            dtype = text.dtype

            def model(x, t, i):
                return unet(state, x.astype(dtype), t, text).astype(jnp.float32)

            key = jax.random.key(0)
            schedule = NoiseSchedule.sd15()
            return sample(model, noise, schedule, steps=STEPS, key=key, loop=python_loop)

        rows += _compared("samplers", name, draw, state, text, noise)
    return rows


def _compared(part: str, name: str, call: Callable[..., Any], *arrays: Any) -> list[dict]:
    """A row for each precision, with the error of the device."""
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    right = _computed(call, cpu, "float32", arrays)

    def error(precision: str) -> dict:
        return {"error": _error(_computed(call, device, precision, arrays), right)}

    return [_row(part, name, precision, error, precision) for precision in PRECISIONS]


def _computed(call: Callable[..., Any], device: jax.Device, precision: str, arrays: Any) -> Any:
    """The result on the host; of the arrays those of bfloat16 are in the precision."""

    def placed(array):
        array = array.astype(precision) if array.dtype == jnp.bfloat16 else array
        return jax.device_put(array, device)

    with jax.default_device(device), matmul_precision(precision):
        return jax.device_get(call(*jax.tree.map(placed, arrays)))


def _error(found: Any, right: Any) -> float:
    errors = []
    for one, other in zip(*map(jax.tree.leaves, (found, right)), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        errors.append(float(np.linalg.norm(one - other) / np.linalg.norm(other)))
    return max(errors, key=lambda error: (np.isnan(error), error))


def _row(part: str, name: str, precision: str, measure: Callable[..., dict], *given: Any) -> dict:
    """What is measured, with the error allowed; or why nothing was."""
    row = {"case": f"{name}, {precision}", "most": MOST[part][precision]}
    try:
        return row | measure(*given)
    except Exception as error:  # of whatever class: the other rows go on
        return row | {"failed": f"{type(error).__name__}: {first_line(error)}"}


def attention_forms(size: str, runs: int) -> list[dict]:
    """The form of attention that is taken here against the plain one, with gradients.

    The error is the largest of all :data:`FACES`; seconds are those of one face, forwards and
    backwards.
    """
    rows = []
    for n, width in LEVELS[size]:
        for precision in PRECISIONS:
            q = jnp.zeros((BATCH, n, HEADS[size], width), precision)
            form, name = _form(q)
            name = f"{name}, {n:,} queries of width {width}"
            rows.append(_row("attention", name, precision, _attention, form, q, precision, runs))
    return rows


def _form(q: jax.Array) -> tuple[Callable[..., jax.Array], str]:
    platform = jax.devices()[0].platform
    kernel = installed_kernels(q).get("cuda" if platform == "gpu" else platform)
    if kernel is None:
        return attention, "XLA"
    return kernel, kernel.__name__.removeprefix("attention_")


def _attention(form: Callable[..., jax.Array], like: jax.Array, precision: str, runs: int) -> dict:
    compiled, plain = _with_gradients(form), _with_gradients(_plain)
    errors, seconds = {}, {}
    for name, faces in FACES.items():
        arrays, hidden = _attention_inputs(like, faces)
        exact = [a.astype(jnp.float32) for a in arrays]
        with matmul_precision(precision):
            found = compiled(*arrays, hidden)
        with matmul_precision("float32"):
            right = plain(*exact, hidden)
        errors[name] = _error(*jax.device_get((found, right)))
        if name == "1 face":
            with matmul_precision(precision):
                seconds = {
                    "seconds": _seconds(compiled, *arrays, hidden, runs=runs),
                    "plain_seconds": _seconds(plain, *arrays, hidden, runs=runs),
                }
    return {"error": max(errors.values()), "errors": errors, **seconds}


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, hidden: HiddenKeys | None) -> jax.Array:
    return attention_plain(q, k, v, None if hidden is None else hidden.visible())


def _with_gradients(form: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(q, k, v, gradient of the result, hidden keys) to the result and the three gradients."""

    def both(q, k, v, g, hidden):
        out, backwards = jax.vjp(lambda *qkv: form(*qkv, hidden), q, k, v)
        return out, *backwards(g)

    return jax.jit(both)


def _attention_inputs(
    like: jax.Array, faces: tuple[int, bool] | None
) -> tuple[list[jax.Array], HiddenKeys | None]:
    """q, k, v and the result's gradient, and which keys are hidden.

    Under regions each token lies in that of one person, or in nobody's.
    """
    b, n, heads, width = like.shape
    people, regions = faces or (0, False)
    keys = n + FACE_TOKENS * people if faces is not None else TEXT_TOKENS
    rng = np.random.default_rng(0)
    shapes = [(b, rows, heads, width) for rows in (n, keys, keys, n)]
    arrays = [jnp.asarray(rng.standard_normal(s, np.float32), like.dtype) for s in shapes]
    if not regions:
        return arrays, None
    person = jnp.arange(people)
    queries = jnp.arange(n)[None, :, None] % (people + 1) != person
    owned = (jnp.arange(keys)[None, :, None] - n) // FACE_TOKENS == person
    return arrays, HiddenKeys(queries, owned)


def _seconds(call: Callable[..., Any], *arrays: Any, runs: int) -> float:
    """Median of the runs after a first one that compiles."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        jax.block_until_ready(call(*arrays))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
