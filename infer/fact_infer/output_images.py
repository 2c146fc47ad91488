"""Pictures as PNG or JPEG files that say how they were made, and that a model drew them.

The mark is IPTC's Digital Source Type in an XMP packet, which picture agencies, search engines and
social networks read (https://cv.iptc.org/newscodes/digitalsourcetype/).
"""

import dataclasses
import json
import os
import re
import tempfile
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import quoteattr

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, PngImagePlugin

from fact_infer.parts import BaseModel
from fact_infer.provenance import Provenance, current
from fact_infer.request import GenerationRequest
from fact_jax.fact import Guidance
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import create

Source = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
"""Drawn by a model altogether, or a photo of which a model drew a part."""
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
PNG_XMP = "XML:com.adobe.xmp"
JPEG_QUALITY = 95
_NAME_LENGTH = 60
_NAME_BYTES = 200
"""File systems take 255, of which a number, a suffix and a temporary name need some."""


def parameters(
    request: GenerationRequest, prompt: str, seed: int, base: BaseModel, **files: object
) -> dict[str, Any]:
    """The parameters of one picture of a request, ready for JSON.

    ``files`` name what the request does not hold: adapter, encoder, backend, precision.
    """
    height, width = base.picture_size(request)
    faced: dict[str, Any] = {"guidance": request.guidance.text}
    if request.photos:
        photos = [photo.path.name for photo in request.photos]
        faced["face"] = {"photos": photos, **guidance_record(request.guidance)}
    if request.regions:
        faced["regions"] = [path.name for path in request.regions]
    if request.image:
        faced |= {"image": request.image.name, "strength": request.strength}
    if request.image_mask:
        faced["image mask"] = request.image_mask.name
    if request.control:
        faced |= {"control": request.control.name, "control scale": request.control_scale}
    return {
        "prompt": prompt,
        "negative": request.negative,
        "seed": seed,
        "sampler": request.sampler,
        "steps": request.steps,
        "height": height,
        "width": width,
        **faced,
        "base": base.name,
        **{name: value if value is None else str(value) for name, value in files.items()},
    }


def guidance_record(guidance: Guidance) -> dict[str, Any]:
    """The face's part of a guidance, ready for JSON, without what is switched off."""
    fields = {k: v for k, v in dataclasses.asdict(guidance).items() if k != "text"}
    used = {k: v for k, v in fields.items() if not (v is None or v is False or v == ())}
    return json.loads(json.dumps(used))


def describe(values: Mapping[str, Any]) -> str:
    """The parameters as text: the prompts on lines of their own, the rest as ``name: value``."""
    lines = [str(values["prompt"])]
    if values["negative"]:
        lines.append(f"Negative prompt: {values['negative']}")
    rest = {k: v for k, v in values.items() if k not in ("prompt", "negative") and v is not None}
    rest |= {f"face {k}": v for k, v in rest.pop("face", {}).items() if v is not None}
    return "\n".join([*lines, ", ".join(f"{k}: {_plain(v)}" for k, v in rest.items())])


def _plain(value: object) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)


def save_picture(
    image: UInt8[np.ndarray, "h w 3"],
    folder: str | os.PathLike,
    values: Mapping[str, Any],
    *,
    suffix: str = ".png",
    source: Source = "trainedAlgorithmicMedia",
) -> Path:
    """Write a picture to ``folder`` under its prompt and seed, and return its path.

    A name that is taken gets a number: nothing is ever overwritten. The file's text holds
    ``parameters`` for people and ``fact_jax`` as JSON.
    """
    words = re.sub(r"[^\w]+", "-", str(values["prompt"]).lower()).strip("-")[:_NAME_LENGTH]
    name = f"{words.rstrip('-') or 'picture'}-seed{values['seed']}"
    return save_image(image, picture_path(folder, name, suffix), recorded(values), source)


def recorded(values: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a file: ``parameters`` for people, ``fact_jax`` as JSON."""
    return {"parameters": describe(values), "fact_jax": json.dumps(values, ensure_ascii=False)}


def save_image(
    image: UInt8[np.ndarray, "h w 3"],
    path: str | os.PathLike,
    text: Mapping[str, str],
    source: Source | None = "trainedAlgorithmicMedia",
    profile: bytes | None = None,
) -> Path:
    """Write a new ``.png``, ``.jpg`` or ``.jpeg`` with text metadata; gives the path that it got.

    A name that is taken gets a number (``fact_jax.utils.files.create``). ``source`` marks it as
    drawn by a model, as far as ``fact_infer.provenance`` says; None: no model drew it. ``profile``
    is the ICC profile in which its colours are meant; None: sRGB.
    """
    writers = {".png": save_png, ".jpg": save_jpeg, ".jpeg": save_jpeg}
    suffix = Path(path).suffix.lower()
    if suffix not in writers:
        raise UserError(f"{path}: a picture's name ends in {', '.join(writers)}")
    marks = current() if source is not None else Provenance(level="off")
    if marks.watermark:
        from fact_infer.provenance.watermark import add_watermark

        image = add_watermark(image)
    picture = Image.fromarray(image)
    picture.info["icc_profile"] = profile

    def write(temporary: Path) -> None:
        writers[suffix](picture, temporary, text, source if marks.iptc else None)
        if marks.c2pa and source is not None:
            from fact_infer.provenance.content_credentials import open_signer, sign

            signer = open_signer(marks.certificate, marks.key)
            signed = sign(temporary.read_bytes(), suffix, signer, source, marks.provider)
            temporary.write_bytes(signed)

    return create(path, write)


def picture_path(folder: str | os.PathLike, name: str, suffix: str) -> Path:
    """Where a picture of that name goes; a long name is cut."""
    return Path(folder) / (name.encode()[:_NAME_BYTES].decode(errors="ignore") + suffix)


def check_folder(folder: str | os.PathLike) -> None:
    """Raises UserError unless files could be written to ``folder``, which need not be there."""
    there = Path(folder).absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{folder}: {there} is not a folder")
    try:
        # What permissions do not tell: /proc, a read-only file system, a full one.
        with tempfile.NamedTemporaryFile(dir=there, prefix=".fact-infer."):
            pass
    except OSError as error:
        raise UserError(f"{folder}: no file can be written in {there}: {error.strerror}") from None


def xmp_packet(source: Source) -> str:
    """The XMP packet that carries the mark."""
    tool = quoteattr(f"FACT-JAX {version('fact-jax')}")
    label, provider = "", current().provider
    if provider is not None:
        # GB 45438-2025, annex E; its namespace is that of the guide TC260-PG-20258A.
        names = ("ReservedCode1", "ContentPropagator", "PropagateID", "ReservedCode2")
        fields = {"Label": "1", "ContentProducer": provider, "ProduceID": str(uuid.uuid4())}
        fields |= dict.fromkeys(names, "")
        label = quoteattr(json.dumps(fields, ensure_ascii=False))
        label = f' xmlns:TC260="http://www.tc260.org.cn/ns/AIGC/1.0/" TC260:AIGC={label}'
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about=""'
        ' xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        f" xmp:CreatorTool={tool}"
        f" Iptc4xmpExt:DigitalSourceType={quoteattr(SOURCE_TYPES + source)}{label}/>"
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
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    more = {} if source is None else {"xmp": xmp_packet(source).encode()}
    more["icc_profile"] = image.info.get("icc_profile")
    image.save(path, format="JPEG", quality=JPEG_QUALITY, exif=exif, **more)
