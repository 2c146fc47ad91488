"""What a program is compiled for, and what it is fed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_jax.fact import Guidance
from infer.program import join_guidance, keep_programs, split_guidance

BLOCKS = ("down_blocks.0", "mid_block", "up_blocks.0", "up_blocks.1")


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(),
        Guidance(text=1.0, face=2.0, cap=0.3),
        Guidance(
            text=3.0,
            negative_face="same",
            face_scale=(0.2, 1.1, 0.4),
            block_scales=(("up", 0.5), ("mid", 0.0)),
            start=0.2,
            stop=0.7,
            adain=True,
            combine="average",
        ),
    ],
)
def test_split_and_joined_again(guidance):
    """The same strengths in every step and block, the same numbers, and one program for all."""
    shape, numbers = split_guidance(guidance, 6, BLOCKS)
    joined = join_guidance(shape, {k: jnp.asarray(v) for k, v in numbers.items()}, BLOCKS)
    for i in range(6):
        i = jnp.asarray(i)
        np.testing.assert_allclose(joined.scale_at(i, 6), guidance.scale_at(i, 6), rtol=1e-6)
    np.testing.assert_array_equal(
        joined.block_factors(BLOCKS), np.float32(guidance.block_factors(BLOCKS))
    )
    for name in ("text", "face", "cap", "negative_face", "adain", "combine"):
        value = getattr(guidance, name)
        wanted = np.float32(value) if isinstance(value, float) else value
        assert getattr(joined, name) == wanted
    other = dataclasses.replace(guidance, face_scale=0.9, block_scales=(), start=0.1)
    assert split_guidance(other, 6, BLOCKS)[0] == shape


def test_no_guidance_is_a_program_of_its_own():
    shapes = {split_guidance(Guidance(text=text), 6, BLOCKS)[0] for text in (1.0, 3.0, 5.0)}
    assert len(shapes) == 2


def test_where_programs_are_kept(tmp_path, monkeypatch):
    """In the user's caches, unless JAX was told of another place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert keep_programs() == tmp_path / "fact-jax" / "programs"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "fact-jax" / "programs")
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
        assert keep_programs() == tmp_path / "mine"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
