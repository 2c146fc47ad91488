"""JAX pictures: what they depend on, and what they must not depend on."""


import numpy as np
import pytest

from fact_jax.fact import Guidance
from infer.flax_pipeline import FlaxPipeline
from infer.request import Photo, Request


@pytest.fixture(scope="module")
def pipeline(files):
    return FlaxPipeline.load(files.base, files.adapter, files.encoder)


@pytest.fixture(scope="module")
def request_of(files):
    """A request of three steps with the face of one photo, with changes."""

    def make(**changes) -> Request:
        plain = {
            "prompts": ("a smiling woman",),
            "seeds": (3,),
            "photos": (Photo(path=files.photo),),
            "sampler": "ddim",
            "steps": 3,
            "guidance": Guidance(text=3.0),
        }
        return Request(**(plain | changes))

    return make


def test_face_changes_the_picture(pipeline, request_of, files):
    one = pipeline.generate(request_of())
    assert one.shape == (1, 32, 32, 3)
    assert one.dtype == np.uint8
    two = pipeline.generate(request_of(photos=(Photo(path=files.other_photo),)))
    both = pipeline.generate(
        request_of(photos=(Photo(path=files.photo), Photo(path=files.other_photo)))
    )
    assert (one != two).mean() > 0.05
    assert (both != one).any()
    assert (both != two).any()
