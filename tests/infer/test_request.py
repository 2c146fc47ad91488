"""Requests: what is refused, and in which order pictures come."""

import numpy as np
import pytest

from fact_jax.errors import UserError
from fact_jax.fact import Guidance
from infer.base import read_base
from infer.pipeline import Drawer
from infer.request import Request, Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "heun"}, "no sampler 'heun'; known are ddim, pndm"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"guidance": Guidance(text=0.5)}, "guidance must lie in 1..50, got 0.5"),
        ({"guidance": Guidance(text=float("nan"))}, "guidance must lie in 1..50, got nan"),
        ({"guidance": Guidance(face=-1.0)}, "face guidance must lie in 0..50, got -1"),
        ({"guidance": Guidance(face_scale=2.5)}, "face scale must lie in 0..2, got 2.5"),
        ({"height": 0}, "height must be positive, got 0"),
        ({"prompts": ()}, "at least one prompt and one seed"),
        ({"seeds": (-1,)}, "a seed must lie in 0..2147483647, got -1"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Request(**({"prompts": ("a man",)} | changes))


def test_base_refuses_what_it_cannot_draw(base_folder):
    base = read_base(base_folder)
    assert base.latent_size(Settings()) == (16, 16)
    assert base.latent_size(Settings(height=16, width=40)) == (8, 20)
    for changes, message in (
        ({"width": 36}, "width 36: with this base it must be a multiple of 8"),
        ({"steps": 1001}, "steps must lie in 1..1000, got 1001"),
        ({"sampler": "lcm", "steps": 51}, "lcm takes at most 50 steps, got 51"),
    ):
        with pytest.raises(UserError, match=message):
            base.check(Settings(**changes))


class Recorder(Drawer):
    """Draws the first letter of the prompt and the seed."""

    face = None

    def __init__(self, base):
        self.base, self.batches = base, []

    def draw(self, prompts, seeds, crops, settings, *, bar=None):
        assert crops is None
        self.batches.append(len(prompts))
        return np.array(
            [[[[ord(p[0]), s, 0]]] for p, s in zip(prompts, seeds, strict=True)], np.uint8
        )


def test_pictures_in_order_in_batches_of_one_shape(base_folder):
    drawer = Recorder(read_base(base_folder))
    asked = Request(prompts=("a", "b", "c"), seeds=range(5, 7))
    pictures = drawer.generate(asked, batch=4)
    assert drawer.batches == [4, 4]
    assert pictures[:, 0, 0, :2].tolist() == [
        [ord(prompt), seed] for prompt, seed in asked.pictures()
    ]
    with pytest.raises(UserError, match="a batch holds at least one"):
        drawer.generate(asked, batch=0)
