"""The planned programs are those of the real pipeline: the same weights, arguments and products."""

import dataclasses

import jax
import numpy as np
import pytest

from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.pipeline import Pipeline
from fact_infer.plan.abstract_pipeline import PlannedGeneration, build, inputs_of
from fact_infer.request import GenerationParams
from fact_jax.fact import Guidance
from fact_jax.plan.jaxpr_costs import flops_by_product, without_dead_code
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def request_(files):
    return PlannedGeneration(
        base=str(files.base),
        adapter=str(files.adapter),
        encoder=str(files.encoder),
        precision="bfloat16",
        batch=3,
        photos=3,
        steps=7,
        face_guidance=2.0,
    )


@pytest.fixture(scope="module")
def planned(request_):
    return build(request_)


def shapes(tree):
    return jax.tree.map(lambda a: (a.shape, np.dtype(a.dtype)), tree)


def test_weights_and_arguments_are_those_of_generate(files, request_, planned, monkeypatch):
    pipeline, notes = planned
    assert notes == []
    real = FlaxPipeline.load(files.base, files.adapter, files.encoder, "bfloat16")
    assert shapes(pipeline.states) == shapes(real._states)

    seen = []
    monkeypatch.setattr(FlaxPipeline, "_generate", lambda self, inputs, bar: seen.append(inputs))
    params = GenerationParams(steps=7, guidance=Guidance(face=2.0))
    crops = np.zeros((1, 3, 32, 32, 3), np.uint8)
    Pipeline.generate(real, ["a"] * 3, [1, 2, 3], crops, params)

    def described(inputs):
        shape, *arguments = real._inputs_of_prepare(inputs)
        return shape, shapes(arguments), shapes(real._inputs_of_steps(inputs, None))

    assert described(seen[0]) == described(inputs_of(request_, pipeline))


def test_products_of_the_traced_programs(request_, planned):
    """16 bits in UNet and text encoder, the platform's own float32 in the encoder and the VAE."""
    pipeline, _ = planned
    programs = pipeline.trace(inputs_of(request_, pipeline), jax.devices()[0])
    found = {
        name: set(flops_by_product(without_dead_code(program.traced.jaxpr.jaxpr))) - {"bool"}
        for name, program in programs.items()
    }
    assert found == {  # but for masks
        "prepare": {"bfloat16", "default"},
        "denoise": {"bfloat16"},
        "decode": {"default"},
    }
    (pixels,) = jax.tree.leaves(programs["decode"].traced.out_info)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32, 3), np.uint8)


def test_what_is_not_here_is_as_released(tmp_path):
    absent = PlannedGeneration(base="owner/sd15", adapter="fact.ckpt", controlnet="owner/pose")
    pipeline, notes = build(absent)
    assert [note.partition(" is ")[0] for note in notes] == [
        *("owner/sd15", "fact.ckpt", "encoder", "owner/pose"),
    ]
    count = {name: sum(a.size for a in jax.tree.leaves(s)) for name, s in pipeline.states.items()}
    assert count["unet"] > 859_520_964  # the base's own, and the adapters
    assert count["text_encoder"] == 123_060_480
    assert count["controlnet"] == 361_279_120
    assert inputs_of(absent, pipeline).size == (64, 64)


def test_parts_that_do_not_fit(files, request_):
    with pytest.raises(UserError, match="is for another base model"):
        build(dataclasses.replace(request_, base="owner/sd15"))
    pipeline, _ = build(dataclasses.replace(request_, adapter=None))
    odd = dataclasses.replace(request_, width=33)
    with pytest.raises(UserError, match="must be a multiple of"):
        inputs_of(odd, pipeline)
