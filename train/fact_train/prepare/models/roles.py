"""Which providers each role asks, by the settings."""

import functools
from pathlib import Path
from typing import Any

from fact_jax.face.landmarks import local_pack
from fact_jax.utils.errors import UserError
from fact_train.prepare.models import side_files
from fact_train.prepare.models.provider import Provider, describe_model, model_path
from fact_train.prepare.settings import BuildSettings

_READERS = {
    "points": side_files.read_points,
    "mask": side_files.read_mask,
    "quality": side_files.read_quality,
    "embedding": side_files.read_embedding,
    "caption": side_files.read_caption,
}
_MODELS = {
    "points": "detector",
    "mask": "parser",
    "quality": "quality",
    "embedding": "embedder",
    "caption": "captioner",
}


def model_paths(settings: BuildSettings) -> dict[str, Path]:
    """Role -> file or folder of its model, where one is named; a detector also if installed."""
    found = {}
    for role, option in _MODELS.items():
        text = getattr(settings, option)
        if text and option == "captioner":
            found[role] = Path(text).expanduser()
        elif text and option == "detector" and Path(text).expanduser().is_dir():
            found[role] = _detector_of(Path(text).expanduser())
        elif text:
            found[role] = model_path(text, option)
    if "points" not in found and (pack := local_pack()) is not None:
        found["points"] = _detector_of(pack)
    return found


def _detector_of(pack: Path) -> Path:
    """The detector of an insightface pack: the .onnx file with at least five outputs."""
    import onnx

    files = sorted(pack.rglob("*.onnx"))
    for path in files:
        if len(onnx.load(str(path), load_external_data=False).graph.output) >= 5:
            return path
    if len(files) == 1:
        return files[0]
    raise UserError(f"{pack} holds no .onnx file of a face detector")


def describe_models(settings: BuildSettings) -> dict[str, Any]:
    """Role -> name, hash and licence of its model."""
    return {role: describe_model(path) for role, path in model_paths(settings).items()}


@functools.lru_cache(maxsize=2)
def providers(settings_json: str) -> dict[str, list[Provider]]:
    """Role -> who is asked, in order; loaded once a process."""
    settings = BuildSettings.from_json(settings_json)
    found: dict[str, list[Provider]] = {
        role: [side_files.SideFiles(role, read)] for role, read in _READERS.items()
    }
    for role, path in model_paths(settings).items():
        found[role].append(_load(role, path, settings))
    return found


def _load(role: str, path: Path, settings: BuildSettings) -> Provider:
    if role == "caption":
        from fact_train.prepare.models.captioner import BlipCaptioner

        return BlipCaptioner(path, settings.provider)
    if role == "points":
        from fact_train.prepare.models.detectors import OnnxDetector

        return OnnxDetector(path, settings.provider, settings.gates.score)
    from fact_train.prepare.models import onnx_models

    kinds: dict[str, Any] = {
        "mask": onnx_models.OnnxParser,
        "quality": onnx_models.OnnxQuality,
        "embedding": onnx_models.OnnxEmbedder,
    }
    return kinds[role](path, settings.provider)
