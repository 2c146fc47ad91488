"""Photo -> points, head mask, aligned crop: the same code for training and inference."""

from fact_jax.face.align import ARCFACE_TEMPLATE, CROP_SIZE, align_batch, align_face
from fact_jax.face.images import read_image, read_profile
from fact_jax.face.landmarks import (
    ASTRONAUT_POINTS,
    Face,
    can_find_faces,
    checked_face,
    detect_faces,
    find_face,
    find_face_in,
    find_faces,
    read_sidecar,
)
from fact_jax.face.mask import area_weights, face_mask, head_mask, resize_area
from fact_jax.face.photo import PreparedFace, limit_side, prepare_photo
from fact_jax.face.visualization import draw_face

__all__ = [
    "ARCFACE_TEMPLATE",
    "ASTRONAUT_POINTS",
    "CROP_SIZE",
    "Face",
    "PreparedFace",
    "align_batch",
    "align_face",
    "area_weights",
    "can_find_faces",
    "checked_face",
    "detect_faces",
    "draw_face",
    "face_mask",
    "find_face",
    "find_face_in",
    "find_faces",
    "head_mask",
    "limit_side",
    "prepare_photo",
    "read_image",
    "read_profile",
    "read_sidecar",
    "resize_area",
]
