"""What a picture file says of how it came to be: its parameters, and that a model drew it.

The mark is IPTC's Digital Source Type in an XMP packet, which picture agencies, search engines and
social networks read (https://cv.iptc.org/newscodes/digitalsourcetype/).
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import quoteattr

from PIL import ExifTags, Image, PngImagePlugin

Source = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
"""Drawn by a model altogether, or a photo of which a model drew a part."""
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
PNG_XMP = "XML:com.adobe.xmp"
JPEG_QUALITY = 95


def xmp_packet(source: Source) -> str:
    """The XMP packet that carries the mark."""
    tool = quoteattr(f"FACT-JAX {version('fact-jax')}")
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about=""'
        ' xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        f" xmp:CreatorTool={tool}"
        f" Iptc4xmpExt:DigitalSourceType={quoteattr(SOURCE_TYPES + source)}/>"
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def save_png(
    image: Image.Image, path: Path, text: Mapping[str, str], source: Source | None
) -> None:
    """A PNG: ``text`` in text chunks, the mark in an iTXt chunk; its ICC profile if it has one."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    if source is not None:
        info.add_itxt(PNG_XMP, xmp_packet(source))
    image.save(path, format="PNG", pnginfo=info, icc_profile=image.info.get("icc_profile"))


def save_jpeg(
    image: Image.Image, path: Path, text: Mapping[str, str], source: Source | None
) -> None:
    """A JPEG: ``text`` as JSON in EXIF's user comment, the mark in its XMP segment; its profile."""
    exif = Image.Exif()
    # EXIF's own way to say that the comment is Unicode.
    comment = b"UNICODE\0" + json.dumps(dict(text), ensure_ascii=False).encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.BaseModel.UserComment] = comment
    more = {} if source is None else {"xmp": xmp_packet(source).encode()}
    more["icc_profile"] = image.info.get("icc_profile")
    image.save(path, format="JPEG", quality=JPEG_QUALITY, exif=exif, **more)
