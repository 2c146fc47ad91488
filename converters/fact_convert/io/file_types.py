"""Recognises other file formats by their first bytes and other model families by their keys.

For error messages alone.
"""

import re
from collections.abc import Mapping

_STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the weights (git lfs pull fetches them)",
    b"GGUF": "a GGUF file, whose quantised weights are not read here",
    b"PK\x03\x04": "a zip archive, as PyTorch's .ckpt and .pt are",
    b"\x1f\x8b": "packed with gzip: unpack it first",
    b"\xfd7zXZ": "packed with xz: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"\x89HDF": "an HDF5 file, as Keras has",
    b"\x93NUMPY": "an array of numpy",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
_PICKLE = re.compile(rb"\x80[\x02-\x05][^\x00]")
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
FAMILIES_KNOWN = "only Stable Diffusion 1.x is known here"
HEAD = 64
"""How many bytes :func:`file_type_of` wants."""

_KEYS = {
    r"conditioner\.embedders\.|(.*\.)?label_emb\.|(.*\.)?add_embedding\.": "SDXL",
    r"(.*\.)?joint_blocks\.\d+\.|(.*\.)?transformer_blocks\.\d+\.attn\.add_[kqv]_proj\.": "SD3",
    r"(.*\.)?double_blocks\.\d+\.|(.*\.)?single_transformer_blocks\.\d+\.": "Flux",
    r"cond_stage_model\.model\.": "Stable Diffusion 2",
    r"image_proj\.|ip_adapter\.|(.*\.)?to_k_ip\.": "an IP-Adapter",
    r"(.*\.)?motion_modules\.": "a motion module of AnimateDiff",
    r"(adapter\.)?body\.\d+\.(resnets\.|block1\.)": "a T2I-Adapter",
    r"(.*\.)?vision_model\.encoder\.": "a CLIP model for pictures",
    r"text_encoders\.": "a model with several text encoders",
    r"lora_te2_": "a LoRA for SDXL",
}
_CLASSES = {"StableDiffusionXL": "SDXL", "StableDiffusion3": "SD3", "Flux": "Flux"}
_TAESD = re.compile(r"(encoder\.|decoder\.)?(layers\.)?\d+\.(weight|conv\.[024]\.weight)")
_INVERSION = {"string_to_param", "string_to_token", "emb_params", "clip_l", "clip_g"}
_TEXT_WIDTHS = {768, 1024, 1280}


def file_type_of(head: bytes) -> str | None:
    """The format of a file that begins with these bytes; None if unknown."""
    if not head:
        return "empty"
    if head[2:9] == b"\0\0\0\0\0\0{":
        return "a safetensors file"
    if name := next((name for start, name in _STARTS.items() if head.startswith(start)), None):
        return name
    if _WEB_PAGE.match(head):
        return "a web page, not weights: the download failed, or wanted a login"
    if head.startswith(b'{"'):
        return "JSON text, not weights"
    return "a pickle, as PyTorch's .ckpt and .pt are" if _PICKLE.match(head) else None


def foreign_family(held: Mapping[str, object]) -> str | None:
    """The unsupported model family that these keys (nested ones too) belong to, or None."""
    if inversion := _inversion(held):
        return inversion
    keys = [key if hasattr(held[key], "shape") else f"{key}." for key in held]
    for pattern, name in _KEYS.items():
        regex = re.compile(pattern)
        if found := next((key for key in keys if regex.match(key)), None):
            return f"{name} ({found.rstrip('.')})"
    weights = [key for key in keys if key.endswith("weight")]
    if len(weights) > 9 and all(map(_TAESD.fullmatch, weights)):
        return "TAESD, a tiny VAE"
    return None


def foreign_pipeline_family(name: object) -> str | None:
    """The unsupported model family of a diffusers pipeline class, or None."""
    return next((f for start, f in _CLASSES.items() if str(name).startswith(start)), None)


def _inversion(held: Mapping[str, object]) -> str | None:
    """Textual inversion: a few rows of the width of a text encoder, called as the token is."""
    shapes = (getattr(value, "shape", None) for value in held.values())
    rows = all(shape and len(shape) < 3 and shape[-1] in _TEXT_WIDTHS for shape in shapes)
    plain = all("." not in key for key in held) and len(held) < 100
    if _INVERSION & set(held) or (held and plain and rows):
        return "a textual inversion: diffusers' load_textual_inversion adds it to a pipeline"
    return None
