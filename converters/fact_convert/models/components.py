"""Components of a pipeline folder that are no models here and are copied as they are.

They are the safety checker and the feature extractor that prepares pictures for it.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from fact_convert.io.reading import read_json, stays_inside

NAMES = ("safety_checker", "feature_extractor", "image_encoder")
_WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))


def copied_components(folder: Path) -> dict[str, list]:
    """What is copied of a pipeline's folder: library and class by name, as its index says them."""
    index = folder / "model_index.json"
    if not index.is_file():
        return {}
    said = {name: entry for name, entry in read_json(index).items() if name in NAMES}
    return {
        name: entry
        for name, entry in said.items()
        if isinstance(entry, list)
        and len(entry) == 2
        and all(isinstance(text, str) for text in entry)
        and (folder / name).is_dir()
    }


def copy_components(folder: Path, out: Path) -> dict[str, object]:
    """Copy them from a pipeline's folder to another; what the other's index says of them."""
    found = copied_components(folder)
    for name in found:
        (out / name).mkdir()
        for file, copy in _files(folder / name):
            shutil.copyfile(file, out / name / copy)
    if "safety_checker" not in found:
        return dict(found)
    said = read_json(folder / "model_index.json").get("requires_safety_checker", True)
    return {**found, "requires_safety_checker": said is True}


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Configurations, and one file of weights under the ordinary name (or all of its shards)."""
    inside = [file for file in sorted(folder.iterdir()) if stays_inside(folder, file.name)]
    files = {file.name: file for file in inside if file.is_file()}
    for name, file in files.items():
        if name.endswith(".json") and ".index." not in name:
            yield file, name
    for stem, suffix in _WEIGHTS:
        dotted = [name for name in files if name.startswith(f"{stem}.") and name.endswith(suffix)]
        if dotted:
            name = f"{stem}{suffix}"
            yield files[name if name in dotted else dotted[0]], name
            return
    for name, file in files.items():
        if name.endswith((".safetensors", ".bin", ".index.json")):
            yield file, name


def left_out(left: Mapping[str, list[str]], folder: Path) -> dict[str, list[str]]:
    """What is left out of a folder, of what is left out of a file."""
    copied = copied_components(folder)
    rest = {reason: [key for key in keys if key not in copied] for reason, keys in left.items()}
    return {reason: keys for reason, keys in rest.items() if keys}
