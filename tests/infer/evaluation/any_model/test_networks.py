"""ONNX recognisers and CLIP against the numbers that they should give."""

import numpy as np
import pytest

from fact_infer.evaluation.any_model.networks import Clip, OnnxNetwork
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy

WEIGHT = np.random.default_rng(0).normal(size=(5, 3 * 4 * 4)).astype(np.float32)


def write_network(path, *, batch="b", inside=False, shape=(3, 112, 112), width=48):
    """Means of 4 x 4 cells, then a matrix; ``inside`` begins with (x - 127.5) * (1 / 127.5)."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    side = 28
    arrays = {"w": WEIGHT[:, :width], "mean": np.float32(127.5), "scale": np.float32(1 / 127.5)}
    start = "n" if inside else "x"
    nodes = [
        helper.make_node(
            "AveragePool", [start], ["p"], kernel_shape=[side] * 2, strides=[side] * 2
        ),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w"], ["y"], transB=1),
    ]
    if inside:
        names = ["Sub0", "Mul0"] if inside == "named" else ["/Sub", "/Mul"]
        first = helper.make_node("Sub", ["x", "mean"], ["s"], names[0])
        nodes = [first, helper.make_node("Mul", ["s", "scale"], ["n"], names[1]), *nodes]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, [batch, *shape])],
        [helper.make_tensor_value_info("y", kind, [batch, 5])],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(path))
    return path


@pytest.mark.parametrize("options", [{}, {"batch": 1}, {"batch": 4}, {"inside": "named"}])
def test_a_recogniser_sees_what_arcface_files_expect(options, tmp_path):
    network = OnnxNetwork(write_network(tmp_path / "net.onnx", **options))
    crops = np.random.default_rng(1).integers(0, 256, (6, 112, 112, 3), np.uint8)
    pixels = (crops.astype(np.float64) - 127.5) / 127.5
    cells = pixels.reshape(6, 4, 28, 4, 28, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(6, -1)
    np.testing.assert_allclose(network(crops), cells @ WEIGHT.T, atol=1e-4)
    assert (network.name, network.size, network.blanked) == ("net", 112, False)
    assert network.features(crops[0]) == pytest.approx(network(crops[:1])[0], abs=1e-4)


def test_a_graph_that_subtracts_under_other_names_takes_scaled_pixels(tmp_path):
    """As insightface and `data build` do: the names tell, not what the nodes are."""
    network = OnnxNetwork(write_network(tmp_path / "net.onnx", inside="pytorch"))
    crops = np.random.default_rng(1).integers(0, 256, (1, 112, 112, 3), np.uint8)
    pixels = ((crops.astype(np.float64) - 127.5) / 127.5 - 127.5) / 127.5
    cells = pixels.reshape(1, 4, 28, 4, 28, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(1, -1)
    np.testing.assert_allclose(network(crops), cells @ WEIGHT.T, atol=1e-4)


def test_files_that_are_no_recogniser_are_one_line(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    grey = write_network(tmp_path / "grey.onnx", shape=(1, 112, 112), width=16)
    for path, message in (
        (tmp_path / "none.onnx", "no such file"),
        (tmp_path / "bad.onnx", "not an ONNX model that opens"),
        (grey, "pictures of"),
    ):
        with pytest.raises(UserError, match=message):
            OnnxNetwork(path)


def test_numbers_that_are_not_finite_are_one_line(tmp_path, monkeypatch):
    broken = np.full_like(WEIGHT, np.nan)
    monkeypatch.setitem(write_network.__globals__, "WEIGHT", broken)
    network = OnnxNetwork(write_network(tmp_path / "nan.onnx"))
    with pytest.raises(UserError, match=r"nan\.onnx: gives numbers of a picture"):
        network(np.zeros((2, 112, 112, 3), np.uint8))


def test_clip_features_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )

    from fact_convert.models.tokenizer import Tokenizer, write_tokenizer
    from fact_jax.portraits.vocabulary import caption_vocabulary

    torch.manual_seed(0)
    vocab, merges = caption_vocabulary()
    write_tokenizer(Tokenizer(vocab=vocab, merges=merges), tmp_path)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    text = {**small, "vocab_size": len(vocab), "bos_token_id": len(vocab) - 2}
    text |= {"eos_token_id": len(vocab) - 1, "pad_token_id": len(vocab) - 1}
    config = CLIPConfig(
        text_config=text,
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    processor = CLIPProcessor(images, CLIPTokenizer.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    clip = Clip(tmp_path)
    image = np.random.default_rng(2).integers(0, 256, (40, 50, 3), np.uint8)
    prompts = ["a portrait of a smiling person", "red"]
    given = processor(text=prompts, images=image, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**given)
    cosines = (out.logits_per_image / model.logit_scale.exp())[0].detach().numpy()
    np.testing.assert_allclose(clip.texts(prompts) @ clip.features(image), cosines, atol=1e-5)
    with pytest.raises(UserError, match=r"no CLIP folder: its config\.json is not there"):
        Clip(tmp_path / "none")
