"""The face encoder as ONNX, run by onnxruntime."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from fact_convert.models.onnx_export import write_onnx
from fact_convert.weights import abstract_state, dump_state, load_state
from fact_jax.models.transface import TransFaceConfig
from fact_jax.utils.errors import UserError

onnx = pytest.importorskip("onnx")
# 4 x 4 patches and 4 pixels that belong to none.
CONFIG = TransFaceConfig(
    img_size=40, patch_size=9, embed_dim=24, depth=2, num_heads=3, num_classes=10
)


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    """A PyTorch state whose activations stay of order one."""
    rng = np.random.default_rng(1)
    graph, flat = abstract_state("transface", CONFIG)
    filled = []
    for path, var in flat.items():
        shape = tuple(var.get_value().shape)
        array = rng.standard_normal(shape, np.float32)
        if path.endswith("kernel"):
            array *= 2 / np.sqrt(np.prod(shape[:-1], dtype=np.float32))
        elif path.endswith(("scale", "var")):
            array = 1 + 0.3 * np.abs(array)
        keys = tuple(int(part) if part.isdigit() else part for part in path.split("."))
        filled.append((keys, var.replace(array)))
    return dump_state(nnx.merge(graph, nnx.from_flat_state(filled)))


def test_as_our_model(state, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    write_onnx(state, CONFIG, tmp_path / "encoder.onnx")
    images = np.random.default_rng(2).uniform(-1, 1, (3, 40, 40, 3)).astype(np.float32)
    session = runtime.InferenceSession(
        tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"]
    )
    tokens, embedding = session.run(
        ["tokens", "embedding"], {"images": images.transpose(0, 3, 1, 2)}
    )
    graph, values = nnx.split(load_state("transface", state, CONFIG))
    ours = jax.jit(lambda values, images: nnx.merge(graph, values)(images))(values, images)
    assert 0.5 < tokens.std() < 5
    assert 0.5 < embedding.std() < 10
    assert tokens.shape == (3, 16, 24)
    np.testing.assert_allclose(tokens, ours[0], rtol=0, atol=1e-4, strict=True)
    np.testing.assert_allclose(embedding, ours[1], rtol=0, atol=1e-4, strict=True)


def test_the_file_is_whole_and_says_what_it_is(state, tmp_path):
    """The weights have their own names and bits; the mask token is only for training."""
    halved = {key: array.astype(np.float16) for key, array in state.items()}
    for name, given in (("full", state), ("half", halved)):
        write_onnx(given, CONFIG, tmp_path / f"{name}.onnx")
        model = onnx.load(tmp_path / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        assert set(given) - set(held) == {"mask_token"}
        for key in set(given) - {"mask_token"}:
            np.testing.assert_array_equal(held[key], given[key].astype(np.float32), strict=True)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert TransFaceConfig.from_dict(json.loads(about["config"])) == CONFIG
    assert (tmp_path / "full.onnx").stat().st_size == model.ByteSize()


def test_what_does_not_fit_is_said(state, tmp_path):
    lacking = {key: array for key, array in state.items() if key != "norm.bias"}
    with pytest.raises(UserError, match=r"1 missing \(norm.bias\); 1 unexpected \(head\)"):
        write_onnx(lacking | {"head": state["norm.bias"]}, CONFIG, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
