"""Single-file checkpoints of Stable Diffusion 1.x in the original layout (LDM).

The tensors are those of a diffusers folder under other names (``rules.ldm``).
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import numpy as np

from fact_convert.io.lazy_tensor import State, Tensor
from fact_convert.mapping import is_known
from fact_convert.models.pipeline import MOST_STEPS
from fact_convert.rules.key_tables import TABLES
from fact_convert.rules.ldm import EMA, IGNORED, PREFIXES, controlnet_pairs, unet_pairs, vae_pairs
from fact_jax.diffusion.noise_schedules import BETA_SCHEDULES, NoiseSchedule, alphas_cumprod_numpy
from fact_jax.utils.errors import UserError, listed

PREDICTION = "modelspec.prediction_type"
"""Where a file's metadata says what its UNet predicts, as other programs write it too."""
_TEXT_WORDS = ("embeddings", "encoder", "final_layer_norm")
OTHER_NOISE = "a noise schedule that is NOT one of those known here: give --config with its own"


def is_ldm(keys: Iterable[str]) -> bool:
    """Whether a file of these keys is in this layout: a whole base, or one of its models alone."""
    keys = set(keys)
    return _bare_kind(keys) is not None or any(
        key.startswith(tuple(PREFIXES.values())) for key in keys
    )


def _bare_kind(keys: Iterable[str]) -> str | None:
    """The kind of a model that is shared alone, without a prefix."""
    if "encoder.mid.block_1.norm1.weight" in keys:
        return "vae"
    if "input_blocks.0.0.weight" in keys:
        return "controlnet" if "zero_convs.0.0.weight" in keys else "unet"
    return None


def read_ldm(state: State, weights: str) -> tuple[dict[str, State], dict[str, list[str]]]:
    """The models in such a file by kind, with diffusers' names, and what was left out, by reason.

    ``weights`` is ``ema`` (running averages, where there are any) or ``params``. Keys that no rule
    knows are kept under the kind ``unknown``.
    """
    left: dict[str, list[str]] = defaultdict(list)
    raw = _take_ema(state, weights, left)
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    bare_kind = _bare_kind(raw)
    for key, array in raw.items():
        if reason := _why_ignored(key):
            odd = key == "alphas_cumprod" and _schedule_of(array) is None
            left[OTHER_NOISE if odd else reason].append(key)
            continue
        kind = next((kind for kind, start in PREFIXES.items() if key.startswith(start)), None)
        parts[kind or bare_kind or "unknown"][key] = array
    unknown = parts.pop("unknown", {})
    states: dict[str, dict[str, Tensor]] = {kind: {} for kind in PREFIXES if kind in parts}
    for kind, found in states.items():
        bare = {key.removeprefix(PREFIXES[kind]): key for key in parts[kind]}
        names = _Names(kind, bare)
        for short, key in bare.items():
            name = names.to_diffusers(short)
            if name is None or name in found or not is_known(kind, name, TABLES[kind].prefixes[0]):
                unknown[key] = parts[kind][key]
            else:
                found[name] = _as_matrix(kind, name, parts[kind][key])
    return {**states, **({"unknown": unknown} if unknown else {})}, dict(left)


def write_ldm(states: Mapping[str, State]) -> State:
    """One flat state in this layout. UserError for kinds and keys that have no name in it."""
    flat: dict[str, Tensor] = {}
    odd = []
    for kind, state in states.items():
        names = _Names(kind, state) if kind in PREFIXES else None
        for key, array in state.items():
            name = names.to_ldm(key) if names else None
            if name is None or PREFIXES[kind] + name in flat:
                odd.append(key)
            else:
                flat[PREFIXES[kind] + name] = _as_convolution(kind, key, array)
    if odd:
        raise UserError(f"{len(odd)} tensors have no place in the original layout ({listed(odd)})")
    return flat


def _take_ema(state: State, weights: str, left: dict[str, list[str]]) -> State:
    """The state without its running averages: put in their parameters' places, or left out."""
    averages = {k: a for k, a in state.items() if k.startswith(EMA) and not _why_ignored(k)}
    plain = {key: array for key, array in state.items() if key not in averages}
    if not averages:
        return plain
    # An average is called as its parameter is, without the first word and without dots.
    partners = {
        key: EMA + key.removeprefix("model.").replace(".", "")
        for key in plain
        if key.startswith(PREFIXES["unet"]) or _bare_kind(plain) is not None
    }
    for key, average in partners.items():
        if average in averages and weights == "ema":
            plain[key] = averages[average]
            left["the running average is taken instead"].append(key)
        elif average in averages:
            left["the running average of the parameters"].append(average)
    orphans = set(averages) - set(partners.values())
    return plain | {key: array for key, array in averages.items() if key in orphans}


def read_schedule(state: State, text: Mapping[str, str]) -> dict | None:
    """The scheduler's settings that a file in this layout tells; None if it is the usual one.

    What the UNet predicts stands in the metadata (``modelspec.prediction_type``) or in the key
    ``v_pred`` that other programs know too; the noise in ``alphas_cumprod``.
    """
    schedule = NoiseSchedule.sd15()
    if "alphas_cumprod" in state:
        schedule = _schedule_of(state["alphas_cumprod"]) or schedule
    said = text.get(PREDICTION, "epsilon")
    if "v_pred" in state or said in ("v", "v_prediction"):
        schedule = dataclasses.replace(schedule, prediction_type="v_prediction")
    return None if schedule == NoiseSchedule.sd15() else schedule.to_dict()


def schedule_tensors(schedule: NoiseSchedule) -> State:
    """Keys for a file in this layout that tell how its schedule differs from the usual one."""
    usual, abar = (alphas_cumprod_numpy(each) for each in (NoiseSchedule.sd15(), schedule))
    found = {} if np.array_equal(abar, usual) else {"alphas_cumprod": abar}
    if schedule.prediction_type == "v_prediction":
        found["v_pred"] = np.zeros(0, np.float32)
    return found


def prediction_texts(schedule: NoiseSchedule) -> dict[str, str]:
    """What the UNet predicts, for a file's metadata, if it is not the noise as usual."""
    return {PREDICTION: "v"} if schedule.prediction_type != "epsilon" else {}


def _schedule_of(abar: Tensor) -> NoiseSchedule | None:
    """The noise schedule with this ``alphas_cumprod``, its betas rounded to three digits."""
    held = np.asarray(abar).astype(np.float64)
    if held.ndim != 1 or not 2 <= held.size <= MOST_STEPS or not (held > 0).all():
        return None
    usual = NoiseSchedule.sd15()
    ends = [1 - held[0], 1 - held[-1] / held[-2]]
    start, end = (float(f"{value:.3g}") for value in ends)
    for kind in BETA_SCHEDULES if 0 < start < 1 and 0 < end < 1 else ():
        found = dataclasses.replace(
            usual,
            num_train_timesteps=held.size,
            beta_schedule=kind,
            beta_start=start,
            beta_end=end,
        )
        if np.allclose(alphas_cumprod_numpy(found), held, rtol=1e-2, atol=0):
            return found
    return None


def _why_ignored(key: str) -> str | None:
    return next((entry.reason for entry in IGNORED if fnmatchcase(key, entry.torch)), None)


class _Names:
    """LDM's and diffusers' names of the layers of one model."""

    def __init__(self, kind: str, keys: Iterable[str]):
        self._text = kind == "clip_text"
        pairs = {"unet": unet_pairs, "vae": vae_pairs, "controlnet": controlnet_pairs}.get(kind)
        found = pairs(set(keys)) if pairs else []
        self._down = dict(found)
        self._up = {ours: ldm for ldm, ours in found}

    def to_diffusers(self, key: str) -> str | None:
        return _text_name(key) if self._text else _replaced(key, self._down)

    def to_ldm(self, key: str) -> str | None:
        return _text_name(key) if self._text else _replaced(key, self._up)


def _text_name(key: str) -> str | None:
    """CLIP's text model has one naming; some files of either layout lack its first word."""
    bare = key.removeprefix("text_model.")
    return f"text_model.{bare}" if bare.split(".")[0] in _TEXT_WORDS else None


def _replaced(key: str, names: Mapping[str, str]) -> str | None:
    """The key with its longest known beginning in the other layout."""
    parts = key.split(".")
    for end in range(len(parts), -1, -1):
        start = ".".join(parts[:end])
        if start in names:
            return ".".join(filter(None, (names[start], *parts[end:])))
    return None


def _as_matrix(kind: str, key: str, array: Tensor) -> Tensor:
    """The VAE's attention is held as 1 x 1 convolutions here, as matrices in diffusers."""
    pointwise = array.ndim == 4 and array.shape[2:] == (1, 1)
    return array.reshape(array.shape[:2]) if pointwise and _is_pixel(kind, key) else array


def _as_convolution(kind: str, key: str, array: Tensor) -> Tensor:
    matrix = array.ndim == 2
    return array.reshape(*array.shape, 1, 1) if matrix and _is_pixel(kind, key) else array


def _is_pixel(kind: str, key: str) -> bool:
    return kind == "vae" and ".attentions." in key
