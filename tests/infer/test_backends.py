"""The two backends draw the same picture from the same request, and the adapter's controls hold."""

import dataclasses
import io
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from torch import bfloat16, manual_seed
from tqdm import tqdm

from fact_convert.io.json_io import read_json
from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.photos import prepare_crops
from fact_infer.pipeline import generate_batches
from fact_infer.request import GenerationRequest, Photo
from fact_infer.torch.pipeline import TorchPipeline
from fact_jax.diffusion.samplers import num_model_calls
from fact_jax.fact import Guidance
from tests.infer.conftest import _write_adapter, difference

pytestmark = pytest.mark.heavy

# Mean difference of 8-bit pictures; the rest is rounding of the two libraries' sums.
SAME = 1.0
OTHER = 3.0


@pytest.fixture(scope="module")
def crops(files):
    return prepare_crops([Photo(path=files.photo), Photo(path=files.other_photo)], 32)[0]


def request(**changes) -> GenerationRequest:
    plain = {"prompts": ("a smiling woman",), "seeds": (3,), "sampler": "ddim", "steps": 3}
    return GenerationRequest(**(plain | {"guidance": Guidance(text=3.0)} | changes))


@pytest.mark.parametrize(
    ("changes", "photos"),
    [
        # Two prompts, two seeds, a wide picture, two photos of the person.
        (
            {
                "prompts": ("a smiling woman", "a man in a red coat"),
                "seeds": (3, 4),
                "negative": "blurred",
                "height": 16,
                "width": 40,
            },
            2,
        ),
        # The multistep sampler calls the UNet once more than it steps.
        (
            {
                "sampler": "pndm",
                "steps": 5,
                "guidance": Guidance(
                    text=4.0, negative_face="same", face_scale=0.7, start=0.2, stop=0.8
                ),
            },
            1,
        ),
        # The face has a guidance of its own, and is silent at first.
        ({"sampler": "euler", "guidance": Guidance(text=3.0, face=2.0, start=0.3)}, 1),
        # No guidance at all: one branch.
        ({"sampler": "dpmpp_2m", "steps": 4, "guidance": Guidance(text=1.0, stop=0.5)}, 1),
    ],
    ids=["ddim", "pndm", "euler", "dpmpp_2m"],
)
def test_same_picture(flax, torch, crops, changes, photos):
    asked = request(**changes)
    ours, theirs = (p.generate_request(asked, crops[:photos]) for p in (flax, torch))
    assert ours.dtype == np.uint8
    assert len(ours) == len(asked.pictures())
    assert difference(ours, theirs) <= SAME
    without = dataclasses.replace(asked.guidance, face_scale=0.0)
    base = torch.generate_request(dataclasses.replace(asked, guidance=without), crops[:photos])
    assert difference(theirs, base) > OTHER


def test_torch_controls(files, torch, crops):
    """What the controls promise, in the backend that needs no compilation."""
    plain = TorchPipeline.load(files.base)
    base = plain.generate_request(request())
    one = torch.generate_request(request(), crops[:1])
    assert difference(one, base) > OTHER
    with tqdm(file=io.StringIO()) as bar:
        list(generate_batches(torch, request(sampler="pndm"), crops[:1], bar=bar))
        assert bar.n == num_model_calls("pndm", 3)
    assert difference(torch.generate_request(request(), crops[1:]), one) > OTHER
    nothing = Guidance(text=3.0, start=0.5, stop=0.5)
    silent = torch.generate_request(request(guidance=nothing), crops[:1])
    np.testing.assert_array_equal(silent, base)
    same = torch.generate_request(
        request(guidance=Guidance(text=3.0, negative_face="same")), crops[:1]
    )
    assert (same != one).any()
    # A face guidance equal to the text's is the two branches of null face.
    third = torch.generate_request(request(guidance=Guidance(text=3.0, face=3.0)), crops[:1])
    assert difference(third, one) <= SAME


def test_flax_window_of_nothing_is_the_base(files, flax, crops):
    nothing = request(steps=1, guidance=Guidance(text=1.0, start=1.0))
    base = FlaxPipeline.load(files.base).generate_request(nothing)
    np.testing.assert_array_equal(flax.generate_request(nothing, crops[:1]), base)


def test_stochastic_samplers_repeat_by_seed_in_any_batch(flax, crops):
    """A picture's seed is all that it needs: the noise on the way is its own."""
    asked = request(sampler="lcm", steps=2, seeds=(7, 8, 9, 10), guidance=Guidance(text=1.0))
    together = flax.generate_request(asked, crops[:1])
    with tqdm(file=io.StringIO()) as bar:
        one_by_one = np.concatenate(
            list(generate_batches(flax, asked, crops[:1], batch=1, bar=bar))
        )
        assert bar.n == 4 * num_model_calls("lcm", 2)
    assert difference(together, one_by_one) <= SAME
    assert difference(together[:1], together[1:2]) > OTHER


def test_half_precision(files, torch, crops):
    """Eight bits of mantissa change less than who is in the picture."""
    exact = torch.generate_request(request(steps=2), crops[:1])
    someone_else = difference(torch.generate_request(request(steps=2), crops[1:]), exact)
    for pipeline in (
        FlaxPipeline.load(files.base, files.adapter, files.encoder, jnp.bfloat16),
        TorchPipeline.load(files.base, files.adapter, files.encoder, bfloat16),
    ):
        half = pipeline.generate_request(request(steps=2), crops[:1])
        assert 0 < difference(half, exact) < someone_else / 2


def test_sizes_that_the_unet_does_not_halve_evenly(files, base_folder, crops, tmp_path):
    """40 x 24 pixels are 20 x 12 latents: 5 x 3 on the third level, 3 x 2 on the fourth."""
    deep = shutil.copytree(base_folder, tmp_path / "deep")
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    shape = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": (down[0], down[1], down[1], down[1]),
        "up_block_types": (up[1], up[1], up[1], up[0]),
    }
    manual_seed(4)
    UNet2DConditionModel.from_config(read_json(deep / "unet/config.json") | shape).save_pretrained(
        deep / "unet"
    )
    _write_adapter(tmp_path / "adapter.safetensors", deep)
    halves = np.zeros((2, 24, 40), np.float32)
    halves[0, :, :20] = halves[1, :, 20:] = 1.0
    pictures = []
    for kind in (FlaxPipeline, TorchPipeline):
        pipeline = kind.load(deep, tmp_path / "adapter.safetensors", files.encoder)
        assert pipeline.base.factor == 8
        params = request(steps=1, height=24, width=40, guidance=Guidance(text=1.0))
        pictures.append(
            pipeline.generate(["a woman"], [3], crops[None], params, regions=halves[None])
        )
    assert pictures[0].shape == (1, 24, 40, 3)
    assert difference(*pictures) <= SAME
