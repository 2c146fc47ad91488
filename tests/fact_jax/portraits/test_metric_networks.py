"""The metric networks' files: half precision on disk, float32 in use."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from fact_jax.portraits.metric_networks import (
    AttributeNet,
    FaceFeatureNet,
    IdentityNet,
    load_network,
    save_network,
)
from fact_jax.utils.errors import UserError


@pytest.mark.parametrize("kind", [AttributeNet, FaceFeatureNet, IdentityNet])
def test_a_network_comes_back_rounded_to_half_precision(kind, tmp_path):
    module = kind(rngs=nnx.Rngs(1))
    save_network(module, tmp_path / "network.safetensors")
    held = load_file(tmp_path / "network.safetensors")
    assert {array.dtype.name for array in held.values()} == {"float16"}
    again = load_network(kind, tmp_path / "network.safetensors")
    found, wanted = (dict(nnx.to_flat_state(nnx.state(network))) for network in (again, module))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name][...].dtype == jnp.float32
        np.testing.assert_array_equal(found[name][...], value[...].astype(jnp.float16))


def test_what_half_precision_does_not_hold_is_not_written(tmp_path):
    module = FaceFeatureNet(rngs=nnx.Rngs(1))
    module.mean[...] = jnp.full(11, 1e5)
    with pytest.raises(UserError, match=r"not finite in half precision: mean$"):
        save_network(module, tmp_path / "network.safetensors")
    assert not list(tmp_path.iterdir())
