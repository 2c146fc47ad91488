"""The face's controls in PyTorch: the JAX adapter's numbers, and what each of them promises."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from fact_infer.torch.attention_processors import FaceContext, FaceProcessor
from fact_infer.torch.models import load_strictly
from fact_jax.fact import Guidance, combine_photos
from fact_jax.models.adapter import FaceAdapter, FaceControls
from fact_jax.regions import region_masks
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy

DIM, HEADS, FACE_DIM, PEOPLE, TOKENS, CELLS = 8, 2, 6, 2, 3, 10


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def twins() -> tuple[FaceAdapter, FaceProcessor]:
    """One adapter in JAX and in PyTorch, its gates open."""
    adapter = FaceAdapter(DIM, HEADS, FACE_DIM, rngs=nnx.Rngs(0))
    adapter.alpha_attn[...], adapter.alpha_dense[...] = jnp.asarray(1.0), jnp.asarray(-0.7)
    state = {}
    for path, variable in nnx.to_flat_state(nnx.state(adapter)):
        *place, leaf = map(str, path)
        value = np.asarray(variable.get_value())
        name = ".".join([*place, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])
        state[name] = value.T if leaf == "kernel" else value
    processor = load_strictly(FaceProcessor(DIM, HEADS, FACE_DIM), state, "the adapter")
    processor.context = FaceContext()
    return adapter, processor


@pytest.mark.parametrize(
    "controls", [{"cap": 0.3}, {"adain": True}, {}, {"cap": 0.3, "adain": True}], ids=str
)
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_increments_of_both_backends(twins, controls, several):
    adapter, processor = twins
    x, face = 2 * normal(1, 2, CELLS, DIM) + 0.5, normal(2, 2, PEOPLE * TOKENS, FACE_DIM)
    seen = np.random.default_rng(3).random((2, PEOPLE, CELLS)) < 0.5
    regions = {CELLS: seen} if several else None
    with torch.no_grad():
        processor.context.guidance = Guidance(**controls)
        processor.context.regions = {CELLS: torch.from_numpy(seen)} if several else None
        keys = processor.face_keys(torch.from_numpy(face))
        ours = processor.increment(torch.from_numpy(x), keys, 0.8).numpy()
    regions = regions and {n: jnp.asarray(mask) for n, mask in regions.items()}
    _, theirs = adapter(
        jnp.asarray(x),
        adapter.keys(jnp.asarray(face)),
        0.8,
        FaceControls(regions=regions, **controls),
    )
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    if several:
        assert not ours[~seen.any(1)].any()


@pytest.fixture(scope="module")
def fact(files):
    """The tiny pipe with a face in it, and how it draws a prompt with a guidance."""
    from fact_infer.torch.pipeline import TorchPipeline

    pipeline = TorchPipeline.load(files.base, files.adapter, files.encoder)
    pipeline.pipe.set_progress_bar_config(disable=True)
    return pipeline.fact


CROPS = np.random.default_rng(7).integers(0, 256, (1, 2, 32, 32, 3), np.uint8)


def draw(fact, face=None, guidance=None, regions=None, steps: int = 2) -> np.ndarray:
    import contextlib

    guidance = guidance or Guidance(text=3.0)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    around = contextlib.nullcontext()
    if face is not None:
        around = fact.face(face, guidance, regions=regions)
    with around:
        return fact.pipe(
            "a man",
            num_inference_steps=steps,
            latents=noise,
            guidance_scale=guidance.text,
            output_type="np",
        ).images


def test_strengths_by_block_and_step(fact):
    face, base = fact.face_tokens(CROPS), draw(fact)
    plain = Guidance(text=3.0)
    ours = draw(fact, face, plain)
    silent = {"block_scales": ((".", 0.0),)}, {"face_scale": (0.0, 0.0)}
    for changes in silent:
        drawn = draw(fact, face, dataclasses.replace(plain, **changes))
        np.testing.assert_array_equal(drawn, base)
    twice = Guidance(text=3.0, face_scale=2.0, block_scales=((".", 0.5),))
    np.testing.assert_allclose(draw(fact, face, twice), ours, atol=1e-4)
    middle = Guidance(text=3.0, block_scales=(("mid_block", 1.0), (".", 0.0)))
    assert np.abs(draw(fact, face, middle) - base).max() > 1e-3
    fading = draw(fact, face, Guidance(text=3.0, face_scale=(1.0, 0.0)))
    np.testing.assert_array_equal(fading, draw(fact, face, Guidance(text=3.0, stop=0.5)))
    with pytest.raises(UserError, match="found in the path of no block"):
        draw(fact, face, Guidance(block_scales=(("middle", 1.0),)))


def test_regions_of_a_pipe(fact):
    """Nobody's regions leave the base, bit for bit; where somebody's are makes a difference."""
    base = draw(fact)
    tokens = [fact.face_tokens(CROPS[:, i : i + 1]) for i in range(2)]
    both = torch.cat(tokens, dim=1)
    assert torch.equal(fact.face_tokens(CROPS, people=2), both)
    masks = np.zeros((1, 2, 32, 32), np.float32)
    masks[:, 0, :, :8] = masks[:, 1, :, 24:] = 1.0
    regions = region_masks(masks, (16, 16), 2)
    ours = draw(fact, both, regions=regions)
    for other in (base, draw(fact, both), draw(fact, both.flip(1), regions=regions)):
        assert np.abs(ours - other).mean() > 1e-3
    nobody = {n: np.zeros_like(mask) for n, mask in regions.items()}
    np.testing.assert_array_equal(draw(fact, both, regions=nobody), base)
    # A face guidance of its own has three branches, and the regions are for all of them.
    third = draw(fact, both, Guidance(text=3.0, face=3.0), regions=regions)
    two = draw(fact, both, Guidance(text=3.0), regions=regions)
    np.testing.assert_allclose(third, two, atol=1e-3)
    with pytest.raises(UserError, match="the regions are not for latents of 16 x 16"):
        draw(fact, both, regions=region_masks(masks, (8, 8), 2))


def test_photos_of_one_person(fact):
    for how in ("concat", "average", "normalized"):
        each = fact.face_tokens(CROPS).reshape(1, 2, -1, 20)
        ours = fact.face_tokens(CROPS, how)
        expected = combine_photos(jnp.asarray(each.numpy()), how)
        np.testing.assert_allclose(ours, expected, atol=1e-5)
