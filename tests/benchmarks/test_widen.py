import dataclasses

import jax
import numpy as np
import pytest

from benchmarks.widen import widen_parameter
from fact_convert.weights import dump_state, load_state
from fact_jax.models.unet import UNetConfig
from tests.models import filled_model


@pytest.mark.parametrize("factor", [2, 3])
def test_a_wider_unet_computes_the_same(factor):
    """Two levels: down, up, skip connections and shortcuts; every parameter is away from 0."""
    config = UNetConfig(
        block_out_channels=(8, 16),
        down_attention=(True, False),
        up_attention=(False, True),
        layers_per_block=1,
        cross_attention_dim=5,
        heads=(2, 2),
        norm_num_groups=4,
    )
    draw = np.random.default_rng(0)
    unet = filled_model("unet", config, lambda _, shape: 0.3 * draw.standard_normal(shape) + 0.1)
    state = {key: widen_parameter(key, array, factor) for key, array in dump_state(unet).items()}
    widths = tuple(factor * width for width in config.block_out_channels)
    wide = load_state("unet", state, dataclasses.replace(config, block_out_channels=widths))
    shapes = (2, 8, 8, config.in_channels), (2, 3, config.cross_attention_dim)
    given = [np.asarray(draw.standard_normal(shape), np.float32) for shape in shapes]
    one, other = (jax.jit(model)(given[0], np.array([10, 700]), given[1]) for model in (unet, wide))
    assert np.linalg.norm(one - other) < 1e-5 * np.linalg.norm(one)
