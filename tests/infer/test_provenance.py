"""What a picture file says of itself: parameters and the mark, in PNG and JPEG."""

from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fact_infer.output_images import save_image, save_picture, xmp_packet
from fact_jax.utils.errors import UserError
from tests.infer.conftest import read_text

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
TEXT = {"parameters": "Zoë <smiling> & more", "fact_jax": '{"seed": 3}'}


@pytest.mark.parametrize("name", ["picture.png", "picture.jpg", "picture.JPEG"])
@pytest.mark.parametrize(
    "source", ["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
)
def test_text_and_mark_come_back(tmp_path, name, source):
    save_image(IMAGE, tmp_path / name, TEXT, source)
    assert read_text(tmp_path / name) == TEXT | {"source": source}
    with Image.open(tmp_path / name) as opened:
        pixels = np.asarray(opened)
    # Where other programs look: the chunk or segment that the XMP specification names.
    where = (
        b"iTXtXML:com.adobe.xmp\0" if name.endswith(".png") else b"http://ns.adobe.com/xap/1.0/\0"
    )
    assert where in (tmp_path / name).read_bytes()
    assert pixels.shape == IMAGE.shape
    if name.endswith(".png"):
        np.testing.assert_array_equal(pixels, IMAGE)


def test_a_drawing_that_no_model_made_has_no_mark(tmp_path):
    for name in ("drawing.png", "drawing.jpg"):
        save_image(IMAGE, tmp_path / name, TEXT, None)
        assert read_text(tmp_path / name) == TEXT | {"source": None}


def test_the_packet_is_xml_with_iptc_s_own_name():
    packet = xmp_packet("trainedAlgorithmicMedia")
    body = packet[packet.index("<x:xmpmeta") : packet.index("<?xpacket end")]
    (description,) = ElementTree.fromstring(body)[0]
    name = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    mark = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert description.attrib[name] == mark


def test_a_picture_of_a_request_is_marked(tmp_path):
    values = {"prompt": "A man!", "negative": "", "seed": 1}
    for suffix in (".png", ".jpg"):
        path = save_picture(IMAGE, tmp_path, values, suffix=suffix)
        assert path.name == f"a-man-seed1{suffix}"
        assert read_text(path)["source"] == "trainedAlgorithmicMedia"


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.png, \.jpg, \.jpeg"):
        save_image(IMAGE, tmp_path / "picture.webp", TEXT)
    assert list(tmp_path.iterdir()) == []
