"""Two hundred bad files of 25 sorts: each is handled as documented, none is lost, none stops it."""

import io
import json
import os
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fact_train.data.records import Records, decode
from fact_train.prepare.build import build
from fact_train.prepare.photos.decoder import Decoder, decoder
from fact_train.prepare.settings import BuildSettings, Gates, RejectedError
from tests.train.prepare.conftest import POINTS, noise, rejected

EACH = 8


def encoded(pixels, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width, height) -> bytes:
    """A PNG of a few bytes that says it is huge."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def gif(pixels) -> bytes:
    first = Image.fromarray(pixels)
    second = Image.fromarray(255 - pixels)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=[second])
    return buffer.getvalue()


def turned(pixels) -> bytes:
    """Stored on its side; the EXIF orientation says so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    return encoded(np.ascontiguousarray(np.rot90(pixels)), "JPEG", quality=95, exif=exif)


def cmyk(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def palette(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).quantize(256).save(buffer, "PNG")
    return buffer.getvalue()


def deep(pixels) -> bytes:
    return encoded((pixels[..., 0].astype(np.uint16) << 8) + 7, "PNG")


def floating(pixels) -> bytes:
    return encoded(pixels[..., 0].astype(np.float32), "TIFF")


def transparent(pixels) -> bytes:
    return encoded(np.dstack([pixels, np.full(pixels.shape[:2], 200, np.uint8)]))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
# Sort -> ending, content of the photo, side files, and the reason; None is a record.
SORTS = {
    "empty": (".jpg", lambda p: b"", {}, "not readable"),
    "text": (".jpg", lambda p: b"<html>404</html>", {}, "not readable"),
    "noise": (".png", lambda p: os.urandom(5000), {}, "not readable"),
    "cut jpeg": (".jpg", lambda p: encoded(p, "JPEG")[:900], {}, "not readable"),
    "cut png": (".png", lambda p: encoded(p)[:3000], {}, "not readable"),
    "damaged png": (
        ".png",
        lambda p: encoded(p)[:40] + b"xx" + encoded(p)[42:],
        {},
        "not readable",
    ),
    "bomb": (".png", lambda p: bomb(30_000, 30_000), {}, "too large"),
    "claims more": (".png", lambda p: bomb(9_000, 9_000), {}, "not readable"),
    "tiny": (".png", lambda p: encoded(p[:8, :8]), {}, "too small"),
    "narrow": (".png", lambda p: encoded(p[:20]), {}, "too small"),
    "floating": (".tif", floating, {}, "not readable"),
    "heic": (
        ".heic",
        lambda p: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        {},
        ("HEIC", "not readable"),
    ),
    "no points": (".png", encoded, {".points.json": None}, "no points"),
    "bad json": (".png", encoded, {".points.json": b"{"}, "points"),
    "four points": (".png", encoded, {".points.json": b'{"points": [[1,2],[3,4]]}'}, "points"),
    "nan points": (".png", encoded, {".points.json": b'{"points": NaN}'}, "points"),
    "points outside": (".png", encoded, {".points.json": POINTS + 500}, "points"),
    "mirrored points": (".png", encoded, {".points.json": POINTS[[1, 0, 2, 4, 3]]}, "points"),
    "deep json": (".png", encoded, {".points.json": b"[" * 100_000}, "points"),
    "empty mask": (".png", encoded, {".mask.png": lambda p: encoded(0 * p)}, "mask"),
    "mask of another size": (".png", encoded, {".mask.png": lambda p: encoded(p[:9, :9])}, "mask"),
    "mask that is none": (".png", encoded, {".mask.png": b"no"}, "mask"),
    "caption of bytes": (".png", encoded, {".txt": b"\xff\xfe\x00\xd8"}, "caption"),
    "caption too long": (".png", encoded, {".txt": b"x" * 3000}, "caption"),
    "a face too small": (".png", encoded, {".points.json": POINTS / 8 + 20}, "gate face"),
    # Not bad, only rare: these are records.
    "turned": (".jpg", turned, {}, None),
    "cmyk": (".jpg", cmyk, {}, None),
    "palette": (".png", palette, {}, None),
    "16 bits": (".png", deep, {}, None),
    "animated": (".gif", gif, {}, None),
    "transparent": (".png", transparent, {}, None),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    wanted = {}
    for sort, (ending, content, beside, reason) in SORTS.items():
        for number in range(EACH):
            pixels = noise(hash_of(sort, number))
            path = source / "anna" / f"{sort.replace(' ', '_')}{number}{ending}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content(pixels))
            files = {".points.json": POINTS, **beside}
            for end, what in files.items():
                if what is not None:
                    what = what(pixels) if callable(what) else what
                    text = what if isinstance(what, bytes) else points_json(what)
                    path.with_suffix(end).write_bytes(text)
            wanted[f"anna/{path.name}"] = reason
    # What the file system itself can do to a reader.
    person = source / "bo"
    person.mkdir()
    os.mkfifo(person / "pipe.jpg")
    (person / "folder.png").mkdir()
    (person / "gone.jpg").symlink_to(person / "nowhere.jpg")
    os.mkfifo(person / "side.png")
    # Names that are no UTF-8, or hold what a terminal would follow: the photos are records.
    for number, name in enumerate((b"caf\xe9", b"two\nlines\x1b[2J")):
        photo = os.path.join(os.fsencode(person), name)
        for end, what in (
            (b".png", encoded(noise(5000 + number))),
            (b".points.json", points_json(POINTS)),
        ):
            with open(photo + end, "wb") as opened:
                opened.write(what)
    wanted |= {"bo/caf\\udce9.png": None, "bo/two\nlines\x1b[2J.png": None}
    wanted |= dict.fromkeys(
        ("bo/pipe.jpg", "bo/folder.png", "bo/gone.jpg", "bo/side.png"), "no file"
    )
    out = tmp_path_factory.mktemp("made") / "out"
    settings = BuildSettings(source=str(source), size=64, crop=48, gates=Gates(face=16))
    return wanted, build(settings, str(out)).summary, out


def hash_of(sort, number):
    return zlib.crc32(f"{sort} {number}".encode())


def points_json(points) -> bytes:
    return json.dumps({"points": np.asarray(points).tolist()}).encode()


def test_each_has_its_reason_and_none_is_lost(built):
    wanted, summary, out = built
    bad = {name: reason for name, reason in wanted.items() if reason is not None}
    assert len(bad) >= 200
    assert len([sort for sort in SORTS.values() if sort[3] is not None]) >= 25
    found = rejected(out)
    assert found.keys() == bad.keys()
    for name, reason in bad.items():
        assert found[name][0] in (reason if isinstance(reason, tuple) else (reason,)), name
        assert "\n" not in found[name][1]
        assert name in found[name][1] or name.rsplit(".", 1)[0] in found[name][1]
    assert summary["in"] == len(wanted) == summary["records"] + summary["rejected"]
    assert summary["records"] == len(wanted) - len(bad)
    assert Counter(reason for reason, _ in found.values()) == summary["reasons"]


def test_rare_files_are_the_pictures_that_they_show(built):
    wanted, _, out = built
    records = Records(out)
    by_name = {}
    for number in range(len(records)):
        row = records[number]
        by_name[row["name"].decode()] = decode(row["photo"]).astype(int)
    assert len(by_name) == sum(reason is None for reason in wanted.values())
    plain = {}
    for sort in ("turned", "cmyk", "palette", "16 bits", "animated", "transparent"):
        ending = SORTS[sort][0]
        pixels = noise(hash_of(sort, 0)).astype(int)
        if sort == "16 bits":
            pixels = np.repeat(pixels[..., :1], 3, -1)
        if sort == "transparent":
            pixels = (pixels * 200 + 255 * 55) // 255
        # The head's middle is near x = 68: the square of 80 px begins near 28.
        seen = by_name[f"anna/{sort.replace(' ', '_')}0{ending}"]
        small = np.asarray(
            Image.fromarray(pixels.astype(np.uint8)).crop((28, 0, 108, 80)).resize((64, 64), 3)
        )
        shifts = [np.abs(np.roll(small, s, 1).astype(int) - seen).mean() for s in range(-6, 7)]
        plain[sort] = min(shifts)
    # JPEG, 256 colours and filters change a little; another frame or turn would be 40 off.
    assert max(plain.values()) < 25, plain


# What a decoder's process does with a photo of these bytes.
POISON = """
import os, time
from fact_train.prepare.photos import decoder
read = decoder.read_image
def poisoned(file, **more):
    content = file.getvalue()
    if content == b"crash":
        os.abort()
    if content == b"hang":
        time.sleep(60)
    if content == b"memory":
        bytearray(decoder.MEMORY + (1 << 30))
    if content == b"print":
        os.write(1, b"a library speaks")
    return read(file, **more)
decoder.read_image = poisoned
decoder.serve()
"""


@pytest.mark.parametrize("name", ["too large.jpg", "a is too small.jpg", " is too small"])
def test_the_reason_is_not_read_from_the_name(name):
    with pytest.raises(RejectedError) as caught:
        decoder()(b"no picture", name, 1000)
    assert caught.value.reason == "not readable"


def test_what_crashes_or_hangs_a_decoder_stops_nothing():
    good = encoded(noise(1))
    decode_one = Decoder(POISON, seconds=8.0)
    lines = {}
    for content in (b"crash", b"hang", b"memory", b"print"):
        with pytest.raises(RejectedError) as caught:
            decode_one(content, "bad.jpg", 1000)
        assert caught.value.reason == "not readable"
        lines[content] = str(caught.value)
        image, full = decode_one(good, "good.png", 100)
        assert full == (80, 120)
        assert image.shape == (66, 100, 3)
    assert lines == {
        b"crash": "bad.jpg crashes the decoder",
        b"hang": "bad.jpg takes longer than 8 s to decode",
        b"memory": "bad.jpg cannot be decoded: MemoryError: MemoryError",
        b"print": "bad.jpg is not an image that Pillow can read",
    }
    decode_one.close()
