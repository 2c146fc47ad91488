"""``fact-convert inspect`` and ``verify``: summary and comparison of weights."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from fact_convert.cli.adapters import adapter_config
from fact_convert.cli.opening import Weights, added_tokens, check_complete, step_of, unknown_keys
from fact_convert.io.hashing import CONTENT, content_hash
from fact_convert.io.lazy_tensor import State
from fact_convert.lora import is_lora, read_lora
from fact_convert.mapping import infer_kind, key_prefix
from fact_convert.models.pipeline import read_schedule_config
from fact_convert.models.training_checkpoint import file_sums
from fact_convert.models.validation import check_fits, encoder_shape, strip_prefix
from fact_convert.rules.key_tables import ADAPTER_INFIX
from fact_convert.weights import read_config
from fact_jax.utils.errors import UserError

_HIDDEN = {"added_tokens", "checksums", "kept", "step", "configs", CONTENT}
_BASES = {
    ((320, 640, 1280, 1280), 768): "Stable Diffusion 1.x",
    ((320, 640, 1280, 1280), 1024): "Stable Diffusion 2.x",
    ((64, 128, 192), 64): "the miniature",
}
"""Families of bases, by the channels of their levels and the width of their text tokens."""
_ENCODERS = {
    (256, 12): "TransFace-T",
    (512, 12): "TransFace-S",
    (512, 24): "TransFace-B",
    (768, 24): "TransFace-L",
}
_ROWS = 1 << 22


def summary(weights: Weights, *, sums: bool = False) -> dict[str, object]:
    """The summary that ``fact-convert inspect`` prints, as plain data.

    ``hash`` does not depend on the format; ``content`` is what a file carries of itself. With
    ``sums`` also a SHA-256 of every part, as ``hash`` is worked out, and of every weight file.
    """
    parts: dict[str, dict[str, object]] = {}
    dtypes, total = set(), 0
    for part, state in weights.states.items():
        own = sorted({array.dtype.name for array in state.values()})
        count = sum(array.size for array in state.values())
        parts[part] = {"tensors": len(state), "parameters": count, "dtypes": own}
        repeated = sum(f"{ADAPTER_INFIX}ln." in key for key in state)
        if repeated:
            parts[part]["copies of the base's norm2"] = repeated
        dtypes |= set(own)
        total += count
    tensors = weights.tensors()
    for part in parts if sums else ():
        prefix = f"{part}/"
        parts[part]["sha256"] = content_hash(
            {k: a for k, a in tensors.items() if k.startswith(prefix)}
        )
    found: dict[str, object] = {
        "path": str(weights.path),
        "kind": weights.kind,
        "format": weights.format,
        "base": base_of(weights),
        "dtype": " + ".join(sorted(dtypes)),
        "parameters": total,
        "parts": parts,
        "step": step_of(weights),
        "hash": content_hash(tensors),
        "content": weights.metadata.get(CONTENT),
        "files": file_sums(weights.path) if sums else None,
        "left out": dict(weights.left_out),
        "notes": list(weights.notes) or None,
        "added tokens": [token.content for token in added_tokens(weights)] or None,
    }
    unknown = unknown_keys(weights)
    if set(weights.states) == {"unknown"} and is_lora(weights.states["unknown"]):
        found |= {"parts": {"lora": parts["unknown"]}, **_about_lora(weights)}
    elif unknown:
        strange = "unknown" in weights.states
        found["unknown keys"] = {
            f"nearest to {kind}" if strange and kind != "unknown" else kind: keys
            for kind, keys in unknown.items()
        }
        found["difference"] = nearest(weights.states["unknown"]) if strange else None
    else:
        try:
            check_complete(weights)
        except UserError as err:
            found["difference"] = str(err)
    found["metadata"] = {k: v for k, v in weights.metadata.items() if k not in _HIDDEN}
    return {key: value for key, value in found.items() if value not in (None, {})}


def nearest(state: State) -> str:
    """How a state differs from the kind of model that knows the most of its keys, in one line."""
    kind, share = infer_kind(state)
    if kind is None:
        return "no kind of model here has keys like these"
    try:
        check_fits(kind, state)
    except UserError as err:
        return f"{share:.0%} of the keys are those of a {kind}; {err}"
    return f"{share:.0%} of the keys are those of a {kind}"


def _about_lora(weights: Weights) -> dict[str, object]:
    """Algorithm, layers, ranks and alphas of a LoRA, or why it fits no supported base."""
    try:
        lora = read_lora(weights.path)
    except UserError as err:
        return {"kind": "LoRA", "difference": str(err)}
    layers = lora.layers
    widths = {x.shape[1] for x in layers if x.key.endswith(("attn2.to_k.weight", "fc1.weight"))}
    return {
        "kind": lora.algorithm,
        "base": "for Stable Diffusion 1.x" if widths == {768} else None,
        "layers": {kind: sum(x.kind == kind for x in layers) for kind in ("unet", "clip_text")},
        "ranks": sorted({layer.rank for layer in layers if layer.rank is not None}),
        "alphas": sorted({layer.alpha for layer in layers}),
    }


def base_of(weights: Weights) -> str | None:
    """The family of base models that these weights are or fit, if it is known."""
    states = weights.states
    try:
        if "unet" in states:
            return _base_of_unet(states["unet"])
        if "adapter" in states:
            return _base_of_adapter(states["adapter"])
        if "transface" in states:
            config = encoder_shape(strip_prefix("transface", states["transface"]))
            return _ENCODERS.get((config["embed_dim"], config["depth"]))
    except (UserError, ValueError, IndexError):
        return None
    return None


def _base_of_unet(state: State) -> str | None:
    prefix = key_prefix("unet", state)
    widths: list[int] = []
    while (key := f"{prefix}down_blocks.{len(widths)}.resnets.0.conv1.weight") in state:
        widths.append(state[key].shape[0])
    text = next((a.shape[1] for k, a in state.items() if k.endswith("attn2.to_k.weight")), 0)
    name = _BASES.get((tuple(widths), text))
    first = state.get(f"{prefix}conv_in.weight")
    inpaint = first is not None and first.shape[1] == 9
    return f"{name}, inpainting" if name and inpaint else name


def _base_of_adapter(state: State) -> str | None:
    """The block of a level has as many channels as the level."""
    mark = f"{ADAPTER_INFIX}linear.weight"
    found = {
        int(key.split(".")[1]): array.shape[0]
        for key, array in state.items()
        if key.startswith("down_blocks.") and key.endswith(mark)
    }
    widths = tuple(found[level] for level in sorted(found))
    for (channels, _), name in _BASES.items():
        # The last level of Stable Diffusion has no attention, and the miniature's first.
        if widths in (channels, channels[:-1], channels[1:]):
            return f"for {name}" if name == "the miniature" else "for Stable Diffusion 1.x"
    return None


def compare(one: Weights, other: Weights, tolerance: float) -> list[str]:
    """A line for every tensor that only one has or that differs by more than ``tolerance``.

    Precisions may differ: numbers are compared. NaN equals NaN. Raises UserError for weights that
    are equal but not whole, as everything that writes them does.
    """
    first, second = one.tensors(), other.tensors()
    lines = [f"only in {one.path}: {key}" for key in _only(first, second)]
    lines += [f"only in {other.path}: {key}" for key in _only(second, first)]
    for key in first.keys() & second.keys():
        a, b = first[key], second[key]
        if a.shape != b.shape:
            lines.append(f"{key}: {a.shape} against {b.shape}")
        elif found := _difference(np.asarray(a), np.asarray(b), tolerance):
            lines.append(f"{key}: largest difference {found[0]:.3g}, {found[1]} of {a.size}")
    if not lines:  # equal, but are they models?
        for weights in (one, other):
            check_complete(weights)
    return sorted(lines)


def differing_settings(one: Weights, other: Weights) -> Iterator[tuple[str, list[str]]]:
    """What both say of themselves and say otherwise: a model, scheduler or class, and its settings.

    Of settings that make no sense in ``one``, why they make none.
    """
    ours, others = _configs(one), _configs(other)
    pairs = {kind: (ours[kind], others[kind]) for kind in sorted(ours.keys() & others.keys())}
    if one.scheduler is not None and other.scheduler is not None:
        pairs["scheduler"] = one.scheduler, other.scheduler
    for name, (own, theirs) in pairs.items():
        try:
            differing = _differing(*(_read_settings(name, said) for said in (own, theirs)))
        except UserError as err:
            differing = [str(err)]
        if own != theirs and differing:
            yield name, differing
    a, b = one.pipeline_class, other.pipeline_class
    if None not in (a, b) and a != b:
        yield "class", [f"{b}, not {a}"]


def _read_settings(name: str, said: Mapping):
    return read_schedule_config(said) if name == "scheduler" else read_config(name, said)


def _configs(weights: Weights) -> dict[str, Mapping]:
    """The configurations that weights say, by kind; of an adapter that of its resampler."""
    found = dict(weights.configs)
    with contextlib.suppress(UserError):  # weights that are not whole are told elsewhere
        if "resampler" in weights.states:
            said = adapter_config(weights, None, guess=False)
            found |= {"resampler": said["resampler"]} if said else {}
    return found


def _differing(own, other) -> list[str]:
    names = [field.name for field in dataclasses.fields(own)]
    pairs = {name: (getattr(own, name), getattr(other, name)) for name in names}
    return [f"{name} {b}, not {a}" for name, (a, b) in pairs.items() if a != b]


def _only(own: Mapping[str, object], other: Mapping[str, object]) -> Iterator[str]:
    """What ``other`` lacks: tensors, or whole parts (what stands before the slash)."""
    theirs = {key.partition("/")[0] for key in other}
    parts: dict[str, list[str]] = {}
    for key in own:
        if key not in other:
            parts.setdefault(key.partition("/")[0], []).append(key)
    for part, keys in parts.items():
        if part in theirs:
            yield from keys
        else:
            yield f"{part}, {len(keys)} tensors"


def _difference(a: np.ndarray, b: np.ndarray, tolerance: float) -> tuple[float, int] | None:
    """The largest difference and how many are too large, or None; a few rows at a time."""
    a, b = np.atleast_1d(a), np.atleast_1d(b)
    count = max(1, _ROWS * len(a) // max(1, a.size))
    largest, far = 0.0, 0
    for start in range(0, len(a), count):
        x, y = (array[start : start + count].astype(np.float64) for array in (a, b))
        with np.errstate(invalid="ignore"):
            apart = np.abs(x - y)
            wrong = ~((apart <= tolerance) | (x == y) | (np.isnan(x) & np.isnan(y)))
        if wrong.any():
            far += int(wrong.sum())
            largest = max(largest, float(np.nanmax(apart[wrong], initial=0)))
    return (largest, far) if far else None
