"""How far pictures are marked: levels, the provider's label, the watermark, the options."""

import argparse
import importlib.machinery
import json
import sys
import types
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fact_infer.output_images import save_image, xmp_packet
from fact_infer.provenance import LEVELS, Provenance, current, marked, use, watermark
from fact_infer.provenance import options as module
from fact_infer.provenance.settings import check
from fact_jax.utils.errors import UserError

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
SOURCE = "trainedAlgorithmicMedia"


def test_levels_add_up():
    switches = ("iptc", "c2pa", "watermark")
    found = [[getattr(Provenance(level=level), name) for name in switches] for level in LEVELS]
    assert found == [
        [False, False, False],
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    assert module._LEVELS == LEVELS


def test_the_label_of_gb_45438():
    """Seven fields as JSON in XMP, which PNG and JPEG carry; without a provider there is none."""
    assert "TC260" not in xmp_packet(SOURCE)
    with marked(Provenance(provider='Zoë & "Co"')):
        packets = [xmp_packet(SOURCE) for _ in range(2)]
    labels = []
    for packet in packets:
        body = packet[packet.index("<x:xmpmeta") : packet.index("<?xpacket end")]
        (description,) = ElementTree.fromstring(body)[0]
        text = description.attrib["{http://www.tc260.org.cn/ns/AIGC/1.0/}AIGC"]
        labels.append(json.loads(text))
    assert list(labels[0]) == [
        "Label",
        "ContentProducer",
        "ProduceID",
        "ReservedCode1",
        "ContentPropagator",
        "PropagateID",
        "ReservedCode2",
    ]
    assert labels[0]["Label"] == "1"
    assert labels[0]["ContentProducer"] == 'Zoë & "Co"'
    assert labels[0]["ProduceID"] != labels[1]["ProduceID"]


@pytest.mark.parametrize("provider", ["", "a" * 201, "a\nb"])
def test_wrong_providers(provider):
    with pytest.raises(UserError, match="a name of at most 200 characters"):
        check(Provenance(provider=provider))


def test_what_is_not_installed_is_said(monkeypatch):
    for name in ("c2pa", "trustmark"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fact-jax\[provenance\]'"):
        check(Provenance(level="c2pa"))
    with pytest.raises(UserError, match=r"pip install 'fact-jax\[watermark\]'"):
        watermark.require_watermark()


@pytest.fixture
def trustmark(monkeypatch, tmp_path):
    """TrustMark's interface (0.9), which hides the word in the lowest bits."""
    made = types.ModuleType("trustmark")
    made.__spec__ = importlib.machinery.ModuleSpec(
        "trustmark", None, origin=str(tmp_path / "trustmark" / "__init__.py")
    )

    class TrustMark:
        class Encoding:
            BCH_5 = 1

        def __init__(self, verbose, device, model_type, encoding_type, loadRemover):
            assert (device, model_type, encoding_type) == ("cpu", "Q", 1)
            assert not loadRemover

        def encode(self, cover, secret):
            assert len(secret) == 8
            pixels = np.asarray(cover).copy()
            bits = np.unpackbits(np.frombuffer(secret.encode(), np.uint8))
            pixels[0, : len(bits) // 3 + 1].reshape(-1)[: len(bits)] &= 254
            flat = pixels.reshape(-1)
            flat[: len(bits)] = (flat[: len(bits)] & 254) | bits
            return Image.fromarray(pixels)

        def decode(self, stego):
            bits = np.asarray(stego).reshape(-1)[:64] & 1
            word = np.packbits(bits).tobytes().decode(errors="replace")
            return word, word == "FACT-JAX", 1

    made.TrustMark = TrustMark
    monkeypatch.setitem(sys.modules, "trustmark", made)
    watermark._trustmark.cache_clear()
    yield tmp_path / "trustmark" / "models"
    watermark._trustmark.cache_clear()


def test_a_watermark(trustmark, tmp_path, monkeypatch):
    """By what TrustMark offers; its own networks were not at hand."""
    with pytest.raises(UserError, match="fetch them once with python -c"):
        watermark.require_watermark()
    trustmark.mkdir(parents=True)
    for name in ("encoder_Q", "decoder_Q"):
        (trustmark / f"{name}.ckpt").write_bytes(b"")
    watermark.require_watermark()
    monkeypatch.setattr(Provenance, "c2pa", False)
    with marked(Provenance(level="all")):
        path = save_image(IMAGE, tmp_path / "a.png", {})
        drawing = save_image(IMAGE, tmp_path / "b.png", {}, None)
    with Image.open(path) as opened:
        assert watermark.has_watermark(np.asarray(opened))
    with Image.open(drawing) as opened:
        np.testing.assert_array_equal(np.asarray(opened), IMAGE)
    assert not watermark.has_watermark(IMAGE)


def test_options_set_the_process(monkeypatch):
    parser = argparse.ArgumentParser()
    module.add_provenance(parser)
    try:
        module.use_provenance(parser.parse_args(["--provenance", "off"]))
        assert current() == Provenance(level="off")
        module.use_provenance(argparse.Namespace())
        assert current().level == "off"
        module.use_provenance(parser.parse_args(["--provider", "Zoë"]))
        assert current() == Provenance(provider="Zoë")
        with pytest.raises(UserError, match="'off' writes no provider"):
            module.use_provenance(parser.parse_args(["--provenance", "off", "--provider", "Zoë"]))
        with pytest.raises(UserError, match="come together"):
            module.use_provenance(parser.parse_args(["--c2pa-key", "a.pem"]))
    finally:
        use(Provenance())
