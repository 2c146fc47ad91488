"""Guidance as arrays, padded photos, and JAX's settings."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_infer.guidance import resolve_guidance
from fact_infer.jax.pipeline import pad_photos
from fact_infer.jax_config import enable_compilation_cache
from fact_jax.fact import Guidance

pytestmark = pytest.mark.heavy

BLOCKS = ("down_blocks.0", "mid_block", "up_blocks.0", "up_blocks.1")


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(),
        Guidance(text=1.5, face=2.0, cap=0.3),
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
def test_guidance_is_resolved_to_arrays(guidance):
    """Branches and their weights add up to the guidance; strengths are by step and by block."""
    found = resolve_guidance(guidance, 6, BLOCKS, with_face=True)
    assert sum(found.weights) == pytest.approx(1.0)
    prompted = [w for branch, w in zip(found.branches, found.weights, strict=True) if branch.prompt]
    assert sum(prompted) == pytest.approx(guidance.text)
    if guidance.face is not None:
        assert [branch.face for branch in found.branches] == [False, False, True]
        assert found.weights[-1] == guidance.face
    else:
        same = guidance.negative_face == "same"
        assert [branch.face for branch in found.branches] == [same, True]
    controlled = guidance.cap is not None or guidance.adain
    assert found.adain == (np.bool_(guidance.adain) if controlled else None)
    cap = np.inf if guidance.cap is None and guidance.adain else guidance.cap
    assert found.cap == (cap and np.float32(cap))
    by_hand = [guidance.scale_at(jnp.asarray(i), 6) for i in range(6)]
    np.testing.assert_allclose(found.step_scales, by_hand, rtol=1e-6)
    np.testing.assert_allclose(found.block_factors, guidance.block_factors(BLOCKS), rtol=1e-6)


def test_window_and_schedule_are_over_the_steps_that_are_drawn():
    guidance = Guidance(face_scale=(0.9, 0.3), stop=0.5)
    found = resolve_guidance(guidance, 4, BLOCKS, with_face=True)
    np.testing.assert_allclose(found.step_scales, [0.9, 0.7, 0, 0], rtol=1e-6)


def test_guidance_and_controls_take_a_program_each():
    """What a program is compiled for: the branches, and whether there are controls."""

    def static(**changes):
        found = resolve_guidance(Guidance(**changes), 4, BLOCKS, with_face=True)
        return found.branches, found.cap is None, found.adain is None

    assert len({static(text=text) for text in (1.0, 3.0, 5.0)}) == 2
    controls = ({"cap": 0.2}, {"cap": 0.4}, {"adain": True}, {"cap": 0.2, "adain": True})
    assert len({static(**more) for more in controls}) == 1


@pytest.mark.parametrize(
    ("photos", "padded", "masked"),
    [(1, 1, False), (2, 2, False), (3, 4, True), (4, 4, True), (5, 8, True)],
)
def test_photos_are_padded(photos, padded, masked):
    crops = np.random.default_rng(0).integers(0, 256, (1, 2 * photos, 4, 4, 3), np.uint8)
    found, mask = pad_photos(crops, 2)
    assert found.shape == (1, 2 * padded, 4, 4, 3)
    for person in range(2):
        own = found[:, person * padded : person * padded + photos]
        np.testing.assert_array_equal(own, crops[:, person * photos : (person + 1) * photos])
    if masked:
        np.testing.assert_array_equal(mask, np.arange(padded) < photos)
    else:
        assert mask is None


def test_where_programs_are_kept(tmp_path, monkeypatch):
    """In the user's caches, unless JAX was told of another place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert enable_compilation_cache() == tmp_path / "fact-jax" / "programs"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "fact-jax" / "programs")
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
        assert enable_compilation_cache() == tmp_path / "mine"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# Asked of JAX in processes of their own, in which nothing says beforehand where it shall compute.
COMMAND_LINE = """
from fact_infer.cli.main import main
base, adapter, encoder, photo = sys.argv[1:]
main(["generate", "--backend", "torch", "--base", base, "--prompt", "a man", "--steps", "1",
      "--adapter", adapter, "--encoder", encoder, "--photo", photo, "--out", "/proc/none"])
"""
LIBRARY = """
from diffusers import StableDiffusionPipeline
from fact_infer.torch.adapter import load_fact
base, adapter, encoder, photo = sys.argv[1:]
load_fact(StableDiffusionPipeline.from_pretrained(base, safety_checker=None), adapter, encoder)
"""


@pytest.mark.parametrize("code", [COMMAND_LINE, LIBRARY])
def test_jax_stays_on_the_cpu_beside_pytorch(files, code):
    asks = "import jax; print(jax.config.jax_platforms, jax.default_backend())"
    paths = (files.base, files.adapter, files.encoder, files.photo)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{asks}", *map(str, paths)],
        env={k: v for k, v in os.environ.items() if not k.startswith("JAX_PLATFORM")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split()[-2:] == ["cpu", "cpu"], done.stderr
