"""The parallel adapter of comparisons: beside the text, marked in its file, drawn by JAX alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_convert import load_adapter
from fact_convert.models.adapter import PARALLEL, form_of
from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.request import GenerationParams
from fact_jax.models.adapter import FaceControls
from fact_jax.utils.errors import UserError
from fact_train.tasks.adapter import AdapterTask
from tests.train.tiny import tiny_config

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def task(miniature) -> AdapterTask:
    return AdapterTask(tiny_config(miniature, form="parallel"))


@pytest.fixture(scope="module")
def opened(task):
    """Trained and frozen parts, the trained ones moved off their silent start."""
    trainable, frozen = task.init(jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.3, trainable), frozen


@pytest.fixture(scope="module")
def exported(task, opened, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    task.export(*opened, folder, 3)
    return folder / "adapter.safetensors"


def test_text_does_not_see_what_was_added_beside_it(task, opened):
    """One block by hand: x + text(x) + face(x), where FACT's is h + text(h), h = x + face(x)."""
    unet = task.unet(opened[0]["adapter"], opened[1]["unet"])
    (_, block), *_ = unet.transformer_blocks()
    draw = np.random.default_rng(0)
    width = block.norm1.num_features
    x, text, face = (
        jnp.asarray(draw.normal(size=shape), jnp.float32)
        for shape in ((2, 16, width), (2, 5, 12), (2, 4, task.face_dim))
    )
    keys, found = block.face.keys(face), {}
    for parallel in (True, False):
        controls = FaceControls(parallel=parallel)
        found[parallel], _ = block(x, text, keys, 1.0, None, None, controls, (4, 4))
        h = x + block.attn1(block.norm1(x))
        adapted, increment = block.face(h, keys, 1.0, controls)
        if parallel:
            h = h + block.attn2(block.norm2(h), text) + increment
        else:
            h = adapted + block.attn2(block.norm2(adapted), text)
        np.testing.assert_allclose(found[parallel], h + block.ff(block.norm3(h)), atol=1e-5)
    assert np.abs(found[True] - found[False]).max() > 1e-2


def test_its_file_says_so_and_others_refuse_it(exported, miniature):
    with pytest.raises(UserError, match="a parallel adapter, of a comparison"):
        load_adapter(exported)
    assert form_of(load_adapter(exported, variations=True).metadata) == PARALLEL


@pytest.mark.slow
def test_torch_refuses_what_jax_draws(exported, miniature, task):
    from fact_infer.torch.pipeline import TorchPipeline

    parts = (miniature / "base", exported, miniature / "encoder")
    pipeline = FlaxPipeline.load(*parts)
    assert pipeline.parallel
    crops = np.random.default_rng(1).integers(0, 256, (1, 1, 16, 16, 3), np.uint8)
    params = GenerationParams(sampler="ddim", steps=2)
    drawn = pipeline.generate(["a person"], [0], crops, params)
    plain = pipeline.generate(["a person"], [0], None, params)
    assert (drawn != plain).any()
    with pytest.raises(UserError, match="only fact-infer's JAX backend"):
        TorchPipeline.load(*parts)
