"""LoRA files and folders of every layout to layers, checked before anything is used."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fact_convert.io.lazy_tensor import State, Tensor
from fact_convert.io.weight_files import read_file
from fact_convert.lora.layers import ALGORITHMS, Layer, missing_parts, product_shape, rank_of
from fact_convert.lora.names import LORA_PARTS, find_weight, layout_of, module_path
from fact_convert.lora.peft_config import CONFIG_NAME, FILE_STEMS, PeftConfig, read_peft_configs
from fact_convert.mapping import Difference, is_float
from fact_jax.utils.errors import UserError

_KEY = re.compile(
    r"(?P<layer>.+?)(?:"
    r"[._]lora(?:_linear_layer)?[._](?P<lora>down|up|mid|A|B)(?:\.\w+)?\.weight"
    r"|\.(?P<lycoris>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.\w+)?"
    r"|\.(?P<magnitude>dora_scale|lora_magnitude_vector)(?:\.\w+){0,2}"
    r"|(?:[._]lora)?\.(?P<number>alpha|scalar))"
)
_PARTS = {"A": "down", "B": "up"}
_BESIDE = ("alpha", "scalar", "dora_scale", "lora_magnitude_vector")
_OTHER_SORTS = {
    r"\.oft_": "OFT",
    r"\.on_input$": "IA3",
    r"\.diff(_b)?$": "a full difference of weights",
    r"\.[wb]_norm$": "a change of norms",
    r"\.lora_embedding_[AB]": "a LoRA of token embeddings",
    r"\.lora_E\b": "AdaLoRA",
}
"""Relatives of LoRA that are not merged here, by what stands in their keys."""
_SDXL = re.compile(r"lora_te2_|text_encoder_2\.|label_emb|add_embedding|transformer_blocks.[1-9]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA; ``metadata`` is what its file says of itself.

    ``settings`` are peft's by kind of model, empty where there are none, and ``alpha_dtype`` is
    that of stored alphas, if they all have one.
    """

    path: Path
    layers: tuple[Layer, ...]
    metadata: Mapping[str, str]
    settings: Mapping[str, PeftConfig] = dataclasses.field(default_factory=dict)
    alpha_dtype: str | None = None

    @property
    def algorithm(self) -> str:
        """One word for all of it, as LoRA, LoHa or DoRA."""
        names = {layer.algorithm for layer in self.layers}
        dora = any(layer.magnitude is not None for layer in self.layers)
        if dora and names == {"LoRA"}:
            return "DoRA"
        return " + ".join(sorted(names)) + (" with DoRA" if dora else "")


def read_lora(path: str | os.PathLike) -> Lora:
    """Read a LoRA file, or a folder as peft and diffusers save them.

    A folder may hold one in ``unet`` and one in ``text_encoder``. A file of peft's needs the
    ``adapter_config.json`` beside it, which says its strength. Raises one UserError with every
    key that belongs to no layer of Stable Diffusion 1.5, with tensors that do not fit each other
    or are not finite, and says so if the file is for SDXL or is another sort of change.
    """
    path = Path(path)
    files = lora_files(path) if path.is_dir() else [path]
    if not files:
        stems = ", no ".join(f"{stem}.safetensors" for stem in FILE_STEMS)
        raise UserError(f"{path}: no {stems}")
    found = [_read(file) for file in files]
    both = {(layer.kind, layer.key) for lora in found for layer in lora.layers}
    if len(both) != sum(len(lora.layers) for lora in found):
        raise UserError(f"{path}: two of its files change the same weight")
    settings = {kind: said for lora in found for kind, said in lora.settings.items()}
    dtypes = {lora.alpha_dtype for lora in found}
    return Lora(
        path=path,
        layers=tuple(layer for lora in found for layer in lora.layers),
        metadata={k: v for lora in found for k, v in lora.metadata.items()},
        settings=settings,
        alpha_dtype=dtypes.pop() if len(dtypes) == 1 else None,
    )


def is_lora(keys: Iterable[str]) -> bool:
    """Whether some of a file's keys are those of a LoRA or LyCORIS, for whatever model."""
    matches = (_KEY.fullmatch(key) for key in keys)
    return any(match and (match["lora"] or match["lycoris"]) for match in matches)


def lora_files(folder: Path) -> list[Path]:
    """The LoRA files of a folder as peft and diffusers have them, none of another folder."""
    homes = [folder / part for part in LORA_PARTS.values() if (folder / part).is_dir()]
    found = [file for home in (folder, *homes) if (file := _file_in(home))]
    # What a folder holds beside its parts' own folders is all of it.
    return found[:1] if found and found[0].parent == folder else found


def _file_in(folder: Path) -> Path | None:
    names = (f"{stem}.{end}" for stem in FILE_STEMS for end in ("safetensors", "bin"))
    return next((folder / name for name in names if (folder / name).exists()), None)


def _read(file: Path) -> Lora:
    state, text = read_file(file)
    _refuse_other_sorts(file, state)
    difference = Difference()
    groups = _grouped(state, difference)
    settings = _settings(file, text, groups)
    layers: dict[tuple[str, str], Layer] = {}
    for name, found in groups.items():
        place = find_weight(name)
        if place is None:
            difference.unexpected.append(name)
        elif place in layers:
            difference.other.append(f"{name}: a second change of {place[1]}")
        elif layer := _layer(name, place, found, settings[place[0]], difference):
            layers[place] = layer
    difference.raise_if_any(f"{file}: not a LoRA for Stable Diffusion 1.5")
    if not layers:
        raise UserError(f"{file}: holds no LoRA")
    stored = {found["alpha"].dtype.name for found in groups.values() if "alpha" in found}
    return Lora(
        path=file,
        layers=tuple(layers.values()),
        metadata=text,
        settings={kind: settings[kind] for kind, _ in layers if settings[kind].values},
        alpha_dtype=stored.pop() if len(stored) == 1 else None,
    )


def _grouped(state: State, difference: Difference) -> dict[str, dict[str, Tensor]]:
    """The tensors by the layer's name and by what they are of it."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, array in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            difference.unexpected.append(key)
            continue
        part = _PARTS.get(match["lora"], match["lora"]) or match["lycoris"] or match["number"]
        part = part or match["magnitude"]
        found = groups.setdefault(match["layer"], {})
        if part in found:
            difference.other.append(f"{key}: a second {part} of {match['layer']}")
        found[part] = array
    return groups


def _settings(file: Path, text: Mapping[str, str], groups: Mapping) -> dict[str, PeftConfig]:
    """peft's settings; UserError where the file needs them to say its strength and has none."""
    bare = [name for name, found in groups.items() if "alpha" not in found]
    peft = any(layout_of(name) == "peft" for name in bare)
    settings = read_peft_configs(file, text, peft=peft)
    silent = not any(each.values for each in settings.values())
    if silent and (peft or (bare and file.stem == FILE_STEMS[0])):
        raise UserError(
            f"{file}: a LoRA of peft's, but no {CONFIG_NAME} stands beside it, which says its "
            "alpha and thereby its strength"
        )
    return settings


def _refuse_other_sorts(file: Path, state: State) -> None:
    for key in state:
        for mark, name in _OTHER_SORTS.items():
            if re.search(mark, key):
                raise UserError(
                    f"{file}: is {name} ({key}), which is not merged here: only LoRA, LoHa, LoKr "
                    "and DoRA are"
                )
    wide = [k for k, a in state.items() if "attn2" in k and "to_k" in k and a.shape[1:2] == (2048,)]
    if marks := wide or [key for key in state if _SDXL.search(key)]:
        raise UserError(
            f"{file}: is a LoRA for SDXL ({marks[0]}), the base is Stable Diffusion 1.5"
        )


def _layer(
    name: str,
    place: tuple[str, str],
    found: State,
    settings: PeftConfig,
    difference: Difference,
) -> Layer | None:
    """One layer, if its parts fit each other; else a line in ``difference``."""
    parts = {part: array for part, array in found.items() if part not in _BESIDE}
    sorts = {part.partition("_")[0] for part in parts} & {"hada", "lokr"}
    algorithm = {"hada": "LoHa", "lokr": "LoKr"}.get(next(iter(sorts), ""), "LoRA")
    if len(sorts) > 1 or (sorts and parts.keys() & {"down", "up", "mid"}):
        difference.other.append(f"{name}: parts of two algorithms ({', '.join(parts)})")
        return None
    lacking = missing_parts(algorithm, parts)
    magnitude = found.get("dora_scale", found.get("lora_magnitude_vector"))
    lacking += ["lora_magnitude_vector"] if settings.dora and magnitude is None else []
    if lacking:
        difference.missing += [f"{part} of {name}" for part in lacking]
        return None
    numbers = {part: array for part, array in found.items() if part not in ("alpha", "scalar")}
    if odd := _unusable(numbers):
        difference.other.append(f"{name}: {odd}")
        return None
    shapes = {part: array.shape for part, array in parts.items()}
    axis = _magnitude_axis(magnitude, "dora_scale" in found)
    if product_shape(algorithm, shapes) is None or axis is None:
        listed = ", ".join(f"{part} {array.shape}" for part, array in found.items())
        difference.misshapen.append(f"{name}: {listed}")
        return None
    module, rank = module_path(name, place[1]), rank_of(algorithm, shapes)
    said = settings.rank(module)
    if None not in (said, rank) and said != rank:
        difference.misshapen.append(f"{name}: is of rank {rank}, {settings.where} says {said}")
        return None
    layer = ALGORITHMS[algorithm](
        kind=place[0],
        key=place[1],
        parts=parts,
        alpha=_number(found.get("alpha"), settings.alpha(module, algorithm, rank)),
        rank=said if rank is None else rank,
        scalar=_number(found.get("scalar"), 1.0),
        magnitude=None if magnitude is None else np.asarray(magnitude).reshape(-1),
        axis=axis,
    )
    for label in ("alpha", "scalar"):
        if not math.isfinite(number := getattr(layer, label)):
            difference.other.append(f"{name}: {label} is {number}")
            return None
    return layer


def _unusable(arrays: State) -> str | None:
    for part, array in arrays.items():
        if not is_float(array.dtype):
            return f"{array.dtype}, wanted floating point"
        if not np.isfinite(np.asarray(array, np.float32)).all():
            return f"{part} holds NaN or infinity"
    return None


def _magnitude_axis(magnitude: Tensor | None, lycoris: bool) -> int | None:
    """Which axis of the weight DoRA's magnitudes belong to, None if they are of a wrong shape.

    peft has them for the outputs, as (n,) or (1, n, 1, 1); LyCORIS as (n, 1, ...) for the outputs
    or as (1, n, ...) for the inputs.
    """
    if magnitude is None:
        return 0
    long = [axis for axis, size in enumerate(magnitude.shape) if size != 1]
    if magnitude.ndim == 0 or len(long) > 1 or any(axis > 1 for axis in long):
        return None
    return 1 if lycoris and long == [1] else 0


def _number(stored: Tensor | None, otherwise: float) -> float:
    if stored is None:
        return otherwise
    return float(stored.item()) if stored.size == 1 else math.nan
