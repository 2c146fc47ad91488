"""peft's settings of a LoRA: what they say of its strength, and what they ask that is not done."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path

from fact_convert.io.json_io import json_in, read_json
from fact_convert.lora.names import LORA_PARTS
from fact_jax.utils.errors import UserError

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers' files hold the settings, as JSON with the part's name before each."""
KOHYA_METADATA_KEY = "peft_settings"
"""The same in kohya's layout: beside alphas diffusers refuses the other."""
CONFIG_NAME = "adapter_config.json"
FILE_STEMS = ("adapter_model", "pytorch_lora_weights")
"""What peft and diffusers call the file of a LoRA in a folder."""
_ALPHA = 8
"""peft's default for ``lora_alpha`` and ``alpha``."""
_TYPES = ("LORA", "LOHA", "LOKR")
_LARGEST = 1e9
"""Bound on ranks and alphas, which JSON may have of any size."""
_BASE_CHANGED = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations that take something out of the base; without that base the LoRA is wrong."""
_BASE_KEPT = ("gaussian", "eva", "orthogonal", "mica", "lycoris")
_REFUSED = {
    "modules_to_save": "it replaces whole layers",
    "target_parameters": "it changes parameters that are no layer's weight",
    "trainable_token_indices": "it changes the token embeddings",
    "layer_replication": "its model has other layers than the base",
    "lora_bias": "it changes biases",
    "alora_invocation_tokens": "it acts on some tokens only",
    "arrow_config": "it chooses among several LoRAs for every token",
    "use_bdlora": "its matrices are block-diagonal",
    "use_qalora": "its inputs are pooled",
    "kasa_config": "it changes the base's singular values",
    "monteclora_config": "its weights are drawn at random",
}
_MOST_QUANTIFIERS, _MOST_PATTERNS, _LONGEST = 3, 1000, 300
"""Bounds on regular expressions that a file brings: matching must not take for ever."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What ``where`` says of the layers of one kind of model; empty if nothing does."""

    where: str
    values: Mapping[str, object]

    def alpha(self, module: str, algorithm: str, rank: int | None) -> float:
        """Alpha of a module, such that alpha / rank is the factor; NaN if it is no number."""
        if not self.values:
            return float(1 if rank is None else rank)
        default = self.values.get("lora_alpha" if algorithm == "LoRA" else "alpha", _ALPHA)
        alpha = self._pattern_value("alpha_pattern", module, default)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            return math.nan
        if abs(alpha) > _LARGEST:
            return math.inf
        stabilised = algorithm == "LoRA" and self.values.get("use_rslora")
        return alpha * (math.sqrt(rank) if rank and stabilised else 1.0)

    def rank(self, module: str) -> int | None:
        """The rank that a module is said to have, if that is said; UserError for a strange one."""
        rank = self._pattern_value("rank_pattern", module, self.values.get("r"))
        if rank is not None and not (type(rank) is int and 1 <= rank < _LARGEST):
            raise UserError(f"{self.where}: a rank of {str(rank)[:20]!a}")
        return rank

    @property
    def dora(self) -> bool:
        """Whether every layer has DoRA's magnitudes."""
        return bool(self.values.get("use_dora"))

    def _pattern_value(self, name: str, module: str, default: object) -> object:
        """The value of the first pattern that fits, as peft's ``get_pattern_key`` finds it."""
        patterns = self.values.get(name) or {}
        if not isinstance(patterns, Mapping):
            raise UserError(f"{self.where}: {name} is not an object")
        if len(patterns) > _MOST_PATTERNS:
            raise UserError(f"{self.where}: {name} has {len(patterns)} patterns, too many")
        for pattern, value in patterns.items():
            if _compiled(self.where, name, pattern).match(module):
                return value
        return default


@functools.lru_cache(maxsize=2 * _MOST_PATTERNS)
def _compiled(where: str, name: str, pattern: str) -> re.Pattern:
    # Runs of digits in a name are short, and groups that are not captured repeat nothing.
    counted = re.sub(r"\(\?:|\\d\+|\[0-9\]\+|\\.", "", pattern)
    costly = len(re.findall(r"[*+?{]", counted)) > _MOST_QUANTIFIERS
    if costly or len(pattern) > _LONGEST or re.search(r"\)[*+{]", counted):
        raise UserError(f"{where}: {name} has a pattern too costly to match: {pattern!a}")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as err:
        raise UserError(f"{where}: {name} has no regular expression: {pattern!a} ({err})") from err


def read_peft_configs(
    file: Path, metadata: Mapping[str, str], *, peft: bool
) -> dict[str, PeftConfig]:
    """The settings of each kind of model, from a file's metadata or from what stands beside it.

    ``peft`` says that the file is in peft's layout, which has them in ``adapter_config.json``.
    Raises UserError for settings whose LoRA cannot be merged, by name.
    """
    where, values, beside = str(file), {}, file.parent / CONFIG_NAME
    if key := next((k for k in (METADATA_KEY, KOHYA_METADATA_KEY) if k in metadata), None):
        where, values = f"{file}: {key}", json_in(metadata, key, file)
    elif beside.exists() and (peft or file.stem == FILE_STEMS[0]):
        where, values = str(beside), read_json(beside)
    found = {
        kind: PeftConfig(where=where, values=_settings_of(values, kind)) for kind in LORA_PARTS
    }
    for settings in found.values():
        _check(settings)
    return found


def _settings_of(values: Mapping[str, object], kind: str) -> dict[str, object]:
    """What is said of one kind of model; of a file for one model nothing has a prefix."""
    prefixes = {k: f"{part}." for k, part in LORA_PARTS.items()}
    if not any(name.startswith(tuple(prefixes.values())) for name in values):
        return dict(values)
    prefix = prefixes[kind]
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _check(settings: PeftConfig) -> None:
    where, values = settings.where, settings.values
    if (sort := values.get("peft_type")) not in (None, *_TYPES):
        raise UserError(f"{where}: peft_type {sort!a} is not merged here, only {', '.join(_TYPES)}")
    start = values.get("init_lora_weights", values.get("init_weights"))
    name = str(start).lower()
    if name.startswith(_BASE_CHANGED):
        raise UserError(
            f"{where}: init_lora_weights {start!a} changed the base too, so the LoRA alone does "
            "not make the trained model; save it with peft's "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    if not (start is None or isinstance(start, bool) or name in _BASE_KEPT):
        raise UserError(f"{where}: init_lora_weights {start!a} is not known here")
    if values.get("bias") not in (None, "none"):
        raise UserError(f"{where}: bias {values['bias']!a} is not merged here: it changes biases")
    for setting, reason in _REFUSED.items():
        if values.get(setting):
            raise UserError(f"{where}: {setting} is not merged here: {reason}")
