"""Opens weights of any supported format and layout, which is detected."""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fact_convert.io.file_types import FAMILIES_KNOWN, foreign_family, foreign_pipeline_family
from fact_convert.io.hub import local_folder
from fact_convert.io.json_io import json_in, read_json
from fact_convert.io.lazy_tensor import State, Tensor
from fact_convert.io.weight_files import file_format, part_variants, read_file, read_weights
from fact_convert.lora import is_lora, lora_files
from fact_convert.mapping import (
    infer_kind,
    is_ignored,
    is_known,
    key_prefix,
    map_jax_path,
    map_torch_key,
)
from fact_convert.models.adapter import (
    check_adapter,
    check_plain,
    pop_dim_head,
    read_metadata,
    split_state,
)
from fact_convert.models.diffusers_folder import read_configs, read_scheduler
from fact_convert.models.pipeline import PARTS, SMALL_FILES, read_schedule_config
from fact_convert.models.single_file import (
    is_ldm,
    read_ldm,
    read_schedule,
)
from fact_convert.models.tokenizer import AddedToken, read_added_tokens
from fact_convert.models.training_checkpoint import (
    find_checkpoint,
    read_checkpoint,
    to_torch,
)
from fact_convert.models.validation import check_all
from fact_convert.rules.key_tables import RESAMPLER_PREFIX
from fact_convert.rules.layer_transforms import POINTWISE
from fact_jax.utils.errors import UserError, error_context, listed

ADAPTER_PARTS = {"adapter", "resampler"}
BASE_PARTS = {"unet", "vae", "clip_text"}
_KNOWN_PARTS = {*PARTS, "tokenizer", "scheduler"}
ADDED_TOKENS = "added_tokens"
CONFIGS, PIPELINE = "configs", "pipeline"
"""Where our files' metadata has the models' configurations, and the pipeline's class and scheduler.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Opened weights: flat PyTorch state dicts by kind of model.

    ``format`` is how it is stored. ``metadata`` is what it says of itself: for an adapter file its
    metadata, for a checkpoint of the trainer its ``meta`` and the step. ``configs`` are the
    peers' configurations by kind, where it has them; ``scheduler`` is diffusers' configuration of
    a base's scheduler and ``pipeline_class`` the name of its pipeline, if anything says them.
    ``left_out`` are keys that carry no weight of these models, by the reason. ``notes`` are lines
    that a person has to read: what had to be guessed, or is lost, joins them as it is noticed.
    ``also`` are other files that have gone into the weights.
    """

    path: Path
    format: str
    states: Mapping[str, State]
    metadata: Mapping[str, object]
    configs: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)
    scheduler: Mapping | None = None
    pipeline_class: str | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    also: tuple[Path, ...] = ()

    @property
    def kind(self) -> str:
        """One word for all of it."""
        if set(self.states) == ADAPTER_PARTS:
            return "adapter"
        return "pipeline" if set(self.states) == BASE_PARTS else " + ".join(self.states)

    def tensors(self) -> State:
        """Every tensor that carries weight, by a name and in a shape that all formats share."""
        canonical_states = {
            part: state if part == "unknown" else canonical(part, state, matrices=True)
            for part, state in self.states.items()
        }
        return {
            f"{part}/{key}": a
            for part, state in canonical_states.items()
            for key, a in state.items()
        }


def canonical(kind: str, state: State, *, matrices: bool = False) -> State:
    """The state dict under canonical names, without prefix and without ignored keys.

    With ``matrices``, a weight that files hold as a matrix or as a 1 x 1 convolution is a matrix.
    """
    prefix = key_prefix(kind, state)
    found: dict[str, Tensor] = {}
    for key, array in state.items():
        mapping = map_torch_key(kind, key, prefix)
        if mapping is None:
            if not is_ignored(kind, key, prefix):
                found[key] = array
            continue
        # The second copy of a weight that a file holds has a name of its own.
        name = key.removeprefix(prefix)
        if not mapping.overrides:
            name = map_jax_path(kind, mapping.jax, "")[0].torch
        pointwise = mapping.transform is POINTWISE.parameters[0] and array.shape[2:] == (1, 1)
        if matrices and pointwise and array.ndim == 4:
            array = array.reshape(array.shape[:2])
        found[name] = array
    return found


def open_weights(
    path: str | os.PathLike, *, variant: str | None = None, weights: str = "ema"
) -> Weights:
    """Open a diffusers folder, a model folder, a checkpoint of the trainer, or a weight file.

    A diffusers folder may also be a name on the Hub. ``weights`` picks the running average
    (``ema``) or the parameters (``params``) of a checkpoint. Tensors that no rule knows are kept
    under the kind ``unknown``. Raises UserError for what is not readable.
    """
    opened = _open(Path(path), variant, weights)
    if not any(opened.states.values()):
        raise UserError(f"{opened.path}: holds no tensors")
    return opened


def _open(path: Path, variant: str | None, weights: str) -> Weights:
    if not path.exists() and file_format(path) is None:
        path = local_folder(path, SMALL_FILES, variant)
    if not path.is_dir():
        return _open_file(path, weights)
    if (path / "model_index.json").exists():
        return _open_pipeline(path, variant)
    if find_checkpoint(path) is not None:
        flat, meta = read_checkpoint(path, weights)
        _refuse_comparisons(path, meta)
        states = to_torch(flat, meta.get("kept", {}))
        configs = meta.get(CONFIGS)
        configs = configs if isinstance(configs, Mapping) else {}
        opened = Weights(
            path=path, format="checkpoint", states=states, metadata=meta, configs=configs
        )
        return _with_pipeline(opened, meta.get(PIPELINE))
    for stem, legacy in (("model", "pytorch_model"), 2 * ("diffusion_pytorch_model",)):
        if any(path.glob(f"{stem}*.safetensors")) or any(path.glob(f"{legacy}*.bin")):
            state = read_weights(path, stem, variant)
            _refuse_others(path, state)
            states = split_kinds(state)
            config = read_json(path / "config.json") if (path / "config.json").exists() else {}
            configs = {kind: config for kind in states if config}
            return Weights(
                path=path, format="folder", states=states, metadata=config, configs=configs
            )
    if files := lora_files(path):
        return _open_lora(path, files)
    raise UserError(
        f"{path}: no weights that are known here: no model_index.json, no checkpoint of the "
        "trainer, no model.safetensors"
    )


def _open_lora(path: Path, files: Sequence[Path]) -> Weights:
    """A folder that peft or diffusers saved a LoRA in; ``fact_convert.lora`` reads its layers."""
    state: dict[str, Tensor] = {}
    text: dict[str, str] = {}
    for own, said in map(read_file, files):
        state |= own
        text |= said
    return Weights(path=path, format="LoRA folder", states={"unknown": state}, metadata=text)


def _open_file(path: Path, weights: str) -> Weights:
    state, text = read_file(path)
    stored = "safetensors" if file_format(path) == "safetensors" else "PyTorch pickle"
    _refuse_others(path, state)
    configs, pipeline = (json_in(text, name, path) for name in (CONFIGS, PIPELINE))
    if is_ldm(state):
        states, left_out = read_ldm(state, weights)
        opened = Weights(
            path=path,
            format=f"original layout, {stored}",
            states=states,
            metadata=text,
            configs=configs,
            left_out=left_out,
        )
        return _with_pipeline(opened, pipeline or {"scheduler": read_schedule(state, text)})
    state, said = pop_dim_head(state, path)
    states = split_kinds(state)
    own = read_metadata(text, path) if ADAPTER_PARTS & set(states) else text
    metadata = {**own, **said}
    return Weights(path=path, format=stored, states=states, metadata=metadata, configs=configs)


def _refuse_comparisons(path: Path, meta: Mapping[str, object]) -> None:
    """UserError for a training's checkpoint whose adapter is another than FACT's."""
    trained = config if isinstance(config := meta.get("config"), Mapping) else {}
    form = trained.get("options.form", "sequential")
    said = _trained_with(trained).get("resampler")
    check_plain({} if form == "sequential" else {"form": form}, said, path)


def _with_pipeline(weights: Weights, said: object) -> Weights:
    """The weights with the scheduler and pipeline class that our own metadata says."""
    said = said if isinstance(said, Mapping) else {}
    scheduler, name = said.get("scheduler"), said.get("class")
    return dataclasses.replace(
        weights,
        scheduler=scheduler if isinstance(scheduler, Mapping) else None,
        pipeline_class=name if isinstance(name, str) else None,
    )


def pipeline_said(weights: Weights) -> dict[str, object]:
    """Scheduler and pipeline class for metadata; inverse of :func:`_with_pipeline`."""
    said = {"class": weights.pipeline_class, "scheduler": weights.scheduler}
    return {name: value for name, value in said.items() if value is not None}


def _refuse_others(path: Path, state: State) -> None:
    if family := foreign_family(state):
        raise UserError(f"{path}: this is {family}: {FAMILIES_KNOWN}")


def _open_pipeline(path: Path, variant: str | None) -> Weights:
    index = read_json(path / "model_index.json")
    if family := foreign_pipeline_family(index.get("_class_name")):
        raise UserError(f"{path}: this is {family}: {FAMILIES_KNOWN}")
    variants, notes = part_variants(path, {part: PARTS[part][1] for part in PARTS}, variant)
    states = {
        kind: read_weights(path / part, stem, variants[part])
        for part, (kind, stem) in PARTS.items()
    }
    for part, (kind, _) in PARTS.items():
        _refuse_others(path / part, states[kind])
    others = [
        name
        for name, said in index.items()
        if isinstance(said, list) and said[0:1] not in ([None], []) and name not in _KNOWN_PARTS
    ]
    opened = Weights(
        path=path,
        format="diffusers",
        states=states,
        metadata=index,
        configs=read_configs(path),
        left_out={"parts of a pipeline that are no weights of ours": others} if others else {},
        notes=notes,
    )
    said = {"class": index.get("_class_name"), "scheduler": read_scheduler(path)}
    return _with_pipeline(opened, said)


def split_kinds(state: State) -> dict[str, State]:
    """The tensors of one file by kind of model."""
    if resampler := {k: a for k, a in state.items() if k.startswith(RESAMPLER_PREFIX)}:
        adapter = {k: a for k, a in state.items() if k not in resampler}
        return {**({"adapter": adapter} if adapter else {}), "resampler": resampler}
    kind, share = infer_kind(state)
    return {kind if kind and share > 0.5 else "unknown": state}


def unknown_keys(weights: Weights) -> dict[str, list[str]]:
    """Keys that no rule maps, by kind."""
    found = {}
    for kind, state in weights.states.items():
        best = infer_kind(state)[0] if kind == "unknown" else kind
        prefix = key_prefix(best, state) if best else ""
        strange = kind == "unknown" and len(weights.states) > 1
        keys = [k for k in state if not best or strange or not is_known(best, k, prefix)]
        if keys:
            found["unknown" if strange or not best else best] = keys
    return found


def step_of(weights: Weights) -> int | None:
    """The training step of these weights, if it is recorded."""
    said = weights.metadata.get("step")
    if isinstance(said, int) or (isinstance(said, str) and said.isdecimal()):
        return int(said)
    folder = find_checkpoint(weights.path) if weights.format == "checkpoint" else None
    if folder is None or not folder.name.isdecimal():
        return None
    # A run that went on from trained weights counts its own steps in its folders' names.
    before = weights.metadata.get("steps_before", 0)
    if not isinstance(before, int) or before < 0:
        raise UserError(f"{weights.path}: its meta says steps_before {before!r:.40}: no number")
    return int(folder.name) + before


def check_supported(weights: Weights) -> None:
    """UserError unless these are whole models that are known here, by tensors and configurations.

    Every way to write goes through here, and what ``load_state`` refuses is refused with the same
    words. No tensor is read.
    """
    if any(is_lora(state) for state in weights.states.values()):
        raise UserError(
            f"{weights.path}: is a LoRA, which is no model: merge-lora adds it to a base, "
            "convert-lora writes it in another layout"
        )
    if unknown := unknown_keys(weights):
        keys = [key for found in unknown.values() for key in found]
        raise UserError(
            f"{weights.path}: {len(keys)} unexpected ({listed(keys)}); nearest kind: "
            f"{', '.join(unknown)}"
        )
    if weights.format == "diffusers" and weights.scheduler is None:
        raise UserError(
            f"{weights.path}: not a whole diffusers pipeline: it has no scheduler, so that nothing "
            "says what its UNet predicts; give --config, a folder that has one"
        )
    check_complete(weights)


def check_complete(weights: Weights) -> None:
    """:func:`check_supported` of the models that are known; other tensors may stand beside them."""
    states = {kind: state for kind, state in weights.states.items() if kind != "unknown"}
    with error_context(weights.path):
        if "adapter" in states:
            resampler, blocks = split_state(_joined(weights, ADAPTER_PARTS), weights.path)
            check_adapter(resampler, blocks, adapter_said(weights).get("resampler"))
        if weights.scheduler is not None:
            read_schedule_config(weights.scheduler)
    rest = {k: s for k, s in states.items() if k not in ADAPTER_PARTS or "adapter" not in states}
    check_all(weights.path, rest, weights.configs)


def _joined(weights: Weights, parts: Collection[str]) -> State:
    return {
        k: a for part, state in weights.states.items() if part in parts for k, a in state.items()
    }


def added_tokens(weights: Weights) -> list[AddedToken]:
    """Added tokens (as of textual inversion) that the text encoder has embeddings for."""
    if "clip_text" not in weights.states:
        return []
    folder = weights.path / "tokenizer"
    if weights.format == "diffusers":
        return read_added_tokens(folder) if folder.is_dir() else []
    said: Any = weights.metadata.get(ADDED_TOKENS, [])
    try:
        said = json.loads(said) if isinstance(said, str) else said
        return [AddedToken.from_dict(token) for token in said]
    except (UserError, ValueError, TypeError, RecursionError) as err:
        raise UserError(f"{weights.path}: metadata {ADDED_TOKENS!r} is damaged ({err})") from err


def adapter_said(weights: Weights) -> dict[str, object]:
    """UNet and resampler configuration that an adapter's source records; may be empty."""
    config = weights.metadata.get("config")
    config = config if isinstance(config, Mapping) else {}
    for said in (weights.metadata.get("adapter"), config, _trained_with(config)):
        if isinstance(said, Mapping) and isinstance(said.get("resampler"), Mapping):
            return {key: said[key] for key in ("unet", "resampler") if key in said}
    return {}


def _trained_with(config: Mapping[str, object]) -> dict[str, object]:
    """The resampler in the trainer's settings, which it stores by dotted names."""
    mark = "options.resampler."
    found = {k.removeprefix(mark): value for k, value in config.items() if k.startswith(mark)}
    return {"resampler": found} if found else {}
