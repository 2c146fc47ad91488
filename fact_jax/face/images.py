"""Reading image files, with bounds and one-line errors."""

import contextlib
import functools
import io
import os
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from fact_jax.utils.errors import UserError

MAX_PIXELS = 100_000_000
MIN_SIDE = 16
# Brands of HEIF files with HEVC inside; those with AV1 (AVIF) Pillow reads itself.
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class ImageBytes(io.BytesIO):
    """An image file in memory, under the name that messages give it."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self._name = name

    def __str__(self) -> str:
        return self._name


ImageFile = str | os.PathLike | ImageBytes


@contextlib.contextmanager
def open_image(path: ImageFile) -> Iterator[Image.Image]:
    """An image file, opened and fully decoded; UserError when it cannot be.

    Size is checked before anything is decoded, so a small file cannot ask for all the memory. HEIC
    is read where the package pillow-heif is installed.
    """
    heif = _register_heif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except UnidentifiedImageError:
        if _is_heic(path) and heif:
            raise UserError(f"{path} is truncated or damaged: a HEIC picture") from None
        if _is_heic(path):
            raise UserError(
                f"{path} is a HEIC picture: pip install pillow-heif, or convert it to JPEG"
            ) from None
        raise UserError(f"{path} is not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path} is too large: at most {MAX_PIXELS:,} pixels") from None
    except OSError as error:
        raise UserError(file_error(path, error)) from None
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{path} is not an image: {one_line(error)}") from None
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UserError(
                f"{path} is too large: {width} x {height}, at most {MAX_PIXELS:,} pixels"
            )
        try:
            image.load()
        except (OSError, ValueError, SyntaxError, EOFError, MemoryError, RuntimeError) as error:
            raise UserError(f"{path} is truncated or damaged: {one_line(error)}") from None
        yield image


def read_image(path: ImageFile, *, to_srgb: bool = False) -> UInt8[np.ndarray, "h w 3"]:
    """A photo as RGB bytes, upright by its EXIF orientation; transparency is laid on white.

    With ``to_srgb`` colours of another profile are converted; otherwise the bytes are those of the
    file, see :func:`read_profile`. A profile that cannot be read counts as sRGB. Raises UserError
    for what is not a readable image of at least 16 px and 100 million pixels.
    """
    with open_image(path) as opened:
        if opened.mode == "F":
            raise UserError(f"{path} holds floating-point numbers: save it with 8 or 16 bits")
        image = ImageOps.exif_transpose(opened)
        if to_srgb:
            image = _in_srgb(image)
        if image.mode in ("I;16", "I;16B", "I;16L", "I"):
            grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
            image = Image.fromarray(grey)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    if min(height, width) < MIN_SIDE:
        raise UserError(f"{path} is too small: {width} x {height}, at least {MIN_SIDE} px a side")
    return pixels


def read_profile(path: str | os.PathLike) -> bytes | None:
    """The ICC profile in which the bytes of ``read_image`` are meant; None: sRGB, or not known."""
    with Image.open(path) as image:
        return image.info.get("icc_profile") if image.mode in ("RGB", "RGBA") else None


def _in_srgb(image: Image.Image) -> Image.Image:
    """The picture in sRGB, or as it is without a profile that could be followed."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode in ("P", "PA", "LA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        return ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            outputMode="RGBA" if image.mode == "RGBA" else "RGB",
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


@functools.cache
def _register_heif() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _is_heic(path: ImageFile) -> bool:
    if isinstance(path, ImageBytes):
        head = path.getvalue()[:12]
    else:
        with open(path, "rb") as file:
            head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC


def one_line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def file_error(path: ImageFile, error: OSError) -> str:
    """What to tell a person when ``path`` could not be opened."""
    if isinstance(error, FileNotFoundError):
        return f"no such file: {path}"
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder: name a file"
    return f"{path} cannot be read: {error.strerror or one_line(error)}"


def takes_raw_pixels(names: Sequence[str]) -> bool:
    """Whether an ONNX face network takes 0..255 and scales them itself, by its first nodes' names.

    insightface's rule for its two kinds of ArcFace files: there one begins with Sub (_minus in
    MXNet's), and one with Mul (_mul).
    """
    return all(
        any(name.startswith(beginnings) for name in names)
        for beginnings in (("Sub", "_minus"), ("Mul", "_mul"))
    )
