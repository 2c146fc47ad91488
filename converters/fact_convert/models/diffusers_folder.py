"""Folders that diffusers and transformers open: weights with their configurations beside them."""

import dataclasses
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from fact_convert.io.json_io import read_json, write_json
from fact_convert.io.lazy_tensor import State, Tensor
from fact_convert.io.output_paths import output_folder
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.torch_io import write_torch_file
from fact_convert.io.weight_files import LEGACY_STEMS, stays_inside
from fact_convert.models.inferred_configs import infer_config
from fact_convert.models.pipeline import (
    DEFAULT_CLASS,
    PARTS,
    index_of,
    pipeline_class,
    read_schedule_config,
    scheduler_config,
)
from fact_convert.models.tokenizer import AddedToken, Tokenizer, read_tokenizer, write_tokenizer
from fact_convert.models.validation import reshape_pointwise
from fact_jax.diffusion.noise_schedules import NoiseSchedule
from fact_jax.utils.errors import UserError, error_context

STEMS = {
    **dict(PARTS.values()),
    **{"transface": "model", "controlnet": "diffusion_pytorch_model"},
}
"""What the weight files of each kind are called that has folders."""
_FOLDERS = {kind: part for part, (kind, _) in PARTS.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFileOptions:
    """How a folder's weight files are named, sharded and stored.

    ``variant`` (as fp16) stands in their names, ``shard`` is how many bytes one may have, and
    ``legacy`` ones are pickles.
    """

    variant: str | None = None
    shard: int | None = None
    legacy: bool = False


def read_configs(folder: Path) -> dict[str, dict]:
    """The configurations of a pipeline folder's models by kind, as far as there are any."""
    found = {kind: folder / part / "config.json" for kind, part in _FOLDERS.items()}
    return {kind: read_json(file) for kind, file in found.items() if file.exists()}


def read_scheduler(folder: Path) -> dict | None:
    """The configuration of a pipeline folder's scheduler, if there is one."""
    file = folder / "scheduler" / "scheduler_config.json"
    return read_json(file) if file.exists() else None


def configs_beside(folder: Path, kinds: Collection[str]) -> dict[str, dict]:
    """Configurations of models of these kinds out of a pipeline's folder, or one model's own."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = {kind: config for kind, config in read_configs(folder).items() if kind in kinds}
    wanted = [kind for kind in kinds if kind in STEMS]
    if len(kinds) == 1 and wanted and not found:
        found = {kind: read_json(folder / "config.json") for kind in wanted}
    return found


def plan_pipeline(
    source: Path,
    states: Mapping[str, State],
    configs: Mapping[str, Mapping],
    beside: Path | None,
    added: Sequence[AddedToken] = (),
    *,
    scheduler: Mapping | None,
    class_name: str | None,
    notes: list[str],
) -> tuple[dict[str, Mapping], Tokenizer, Mapping, str]:
    """A pipeline folder's configurations, tokenizer, scheduler and pipeline class.

    They come from the folder ``beside``, else from ``source`` if it is a pipeline folder, else
    from the tensors; ``added`` are tokens that the text encoder learned, ``scheduler`` and
    ``class_name`` are what the source says. What is guessed joins ``notes``. Raises UserError
    where nothing says what is needed, or it does not fit.
    """
    if absent := sorted(set(_FOLDERS) - set(states)):
        raise UserError(f"{source}: not a whole base, it has no {', '.join(absent)}")
    folders = [folder for folder in (beside, source) if folder and folder.is_dir()]
    chosen = {kind: plan_model(source, kind, states[kind], configs, notes) for kind in _FOLDERS}
    text = chosen["clip_text"]
    longest, rows = text.get("max_position_embeddings", 77), text.get("vocab_size")
    tokenizers = [folder / "tokenizer" for folder in folders if (folder / "tokenizer").is_dir()]
    if not tokenizers:
        raise UserError(
            f"{source}: holds no tokenizer; give --config, a diffusers folder of this base that "
            "has one (weights are not needed in it)"
        )
    if scheduler is None:
        scheduler = scheduler_config("PNDMScheduler", NoiseSchedule.sd15())
        notes.append(
            "scheduler: nothing says the noise schedule, epsilon prediction and the betas of "
            "Stable Diffusion 1.x taken (--config)"
        )
    scheduler = {"_class_name": "DDIMScheduler", **scheduler}
    if not isinstance(scheduler["_class_name"], str):
        raise UserError(f"{source}: the _class_name of its scheduler is no name")
    with error_context(source):
        read_schedule_config(scheduler)
        name = pipeline_class(states["unet"], class_name)
    if name != (class_name or pipeline_class(states["unet"], None)):
        notes.append(f"{class_name} becomes {name}, which its parts here are enough for")
    elif class_name is None and name != DEFAULT_CLASS:
        notes.append(f"{name} taken: its UNet takes more than the latents")
    return chosen, read_tokenizer(tokenizers[0], longest, rows, added), scheduler, name


def write_pipeline(
    source: Path,
    out: Path,
    states: Mapping[str, State],
    plan: tuple[Mapping[str, Mapping], Tokenizer, Mapping, str],
    metadata: Mapping[str, str],
    *,
    files: WeightFileOptions,
    force: bool,
) -> None:
    """Write a pipeline folder of what :func:`plan_pipeline` gave, whole or not at all.

    A safety checker and its feature extractor are copied from ``source``, if that is a folder.
    """
    configs, tokenizer, scheduler, name = plan
    with output_folder(out, force=force) as folder:
        for kind, part in _FOLDERS.items():
            state = reshape_pointwise(kind, states[kind], configs[kind])
            _write_model(folder / part, kind, state, configs[kind], metadata, files)
        write_tokenizer(tokenizer, folder / "tokenizer")
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        index = index_of(scheduler["_class_name"], name) | copy_components(source, folder)
        write_json(folder / "model_index.json", index)


def plan_model(
    source: Path, kind: str, state: State, configs: Mapping[str, Mapping], notes: list[str]
) -> Mapping:
    """The configuration of one model's folder: its source's, else inferred from tensors."""
    if kind not in STEMS:
        raise UserError(f"{source}: {kind} weights have no folder, only files")
    if config := configs.get(kind):
        return config
    with error_context(source):
        config, note = infer_config(kind, state)
    notes.append(note)
    return config


def write_model(
    out: str | os.PathLike,
    kind: str,
    state: State,
    config: Mapping,
    metadata: Mapping[str, str],
    *,
    files: WeightFileOptions,
    force: bool,
) -> None:
    """Write the folder of one model, whole or not at all."""
    with output_folder(out, force=force) as folder:
        state = reshape_pointwise(kind, state, config)
        _write_model(folder, kind, state, config, metadata, files)


def _write_model(folder, kind, state, config, metadata, files) -> None:
    _write_files(folder, STEMS[kind], state, metadata, files)
    if kind == "clip_text":
        # transformers opens the file in the precision named here, whatever is stored, while
        # diffusers opens the other models in float32: they would not fit together.
        config = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": "float32"}
    write_json(folder / "config.json", config)


def _write_files(folder, stem, state, metadata, files) -> None:
    stem = LEGACY_STEMS.get(stem, stem) if files.legacy else stem
    suffix = "bin" if files.legacy else "safetensors"
    dotted = f".{files.variant}" if files.variant else ""
    shards = list(_shards(state, files.shard))
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{stem}{dotted}{of}.{suffix}"
        where |= dict.fromkeys(shard, name)
        if files.legacy:
            write_torch_file(folder / name, shard)
        else:
            write_safetensors(folder / name, shard, metadata)
    if len(shards) > 1:
        total = sum(array.nbytes for array in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(folder / f"{stem}.{suffix}.index{dotted}.json", index)


def _shards(state: State, limit: int | None) -> Iterator[State]:
    """Parts of a state that have at most so many bytes, or a single tensor."""
    shard: dict[str, Tensor] = {}
    size = 0
    for key, array in state.items():
        if shard and limit is not None and size + array.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[key] = array
        size += array.nbytes
    yield shard


COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder")


_COMPONENT_WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))


def copied_components(folder: Path) -> dict[str, list]:
    """Components that are copied unchanged: library and class by name, as in the index."""
    index = folder / "model_index.json"
    if not index.is_file():
        return {}
    said = {name: entry for name, entry in read_json(index).items() if name in COMPONENTS}
    return {
        name: entry
        for name, entry in said.items()
        if isinstance(entry, list)
        and len(entry) == 2
        and all(isinstance(text, str) for text in entry)
        and (folder / name).is_dir()
    }


def copy_components(folder: Path, out: Path) -> dict[str, object]:
    """Copy these components to another folder; returns their entries for its index."""
    found = copied_components(folder)
    for name in found:
        (out / name).mkdir()
        for file, copy in _component_files(folder / name):
            shutil.copyfile(file, out / name / copy)
    if "safety_checker" not in found:
        return dict(found)
    said = read_json(folder / "model_index.json").get("requires_safety_checker", True)
    return {**found, "requires_safety_checker": said is True}


def _component_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Configurations, and one file of weights under the ordinary name (or all of its shards)."""
    inside = [file for file in sorted(folder.iterdir()) if stays_inside(folder, file.name)]
    files = {file.name: file for file in inside if file.is_file()}
    for name, file in files.items():
        if name.endswith(".json") and ".index." not in name:
            yield file, name
    for stem, suffix in _COMPONENT_WEIGHTS:
        dotted = [name for name in files if name.startswith(f"{stem}.") and name.endswith(suffix)]
        if dotted:
            name = f"{stem}{suffix}"
            yield files[name if name in dotted else dotted[0]], name
            return
    for name, file in files.items():
        if name.endswith((".safetensors", ".bin", ".index.json")):
            yield file, name


def left_out(left: Mapping[str, list[str]], folder: Path) -> dict[str, list[str]]:
    """``left`` without the components that a folder holds as copies."""
    copied = copied_components(folder)
    rest = {reason: [key for key in keys if key not in copied] for reason, keys in left.items()}
    return {reason: keys for reason, keys in rest.items() if keys}
