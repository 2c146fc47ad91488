"""docs/weights.md from the rule tables: ``python -m fact_convert.docs > docs/weights.md``."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from fact_convert.rules.key_tables import TABLES, Table
from fact_convert.rules.layer_transforms import LayerTransform
from fact_convert.rules.ldm import (
    EMA,
    IGNORED,
    PREFIXES,
    UNET_ENDS,
    UNET_RESNET,
    VAE_ATTENTION,
    VAE_ENDS,
    VAE_RESNET,
)

_PLACE = re.compile(
    r"((encoder|decoder)\.)?((down|up)_blocks\.\{i\}|mid_block)\.|(encoder|decoder)\."
)
_COMMAND = "python -m fact_convert.docs > docs/weights.md"
_MODELS = {
    "adapter": "The trained part of FACT in the UNet, as files hold it beside the resampler.",
    "unet": "The UNet of a base, with its adapter if it has one.",
    "vae": "The autoencoder of a base.",
    "clip_text": "The text encoder of a base.",
    "transface": "The face encoder.",
    "resampler": "From the face encoder's tokens to face tokens; trained with the adapter.",
    "controlnet": "A ControlNet for a base.",
}
_LAYER_TRANSFORMS = {
    "linear": "`weight` (out, in) is our `kernel` (in, out)",
    "conv": "`weight` (out, in, h, w) is our `kernel` (h, w, in, out)",
    "pointwise": "as linear or as conv of 1 x 1, whichever a file has",
    "norm": "`weight` is our `scale`",
    "batchnorm": "`weight` is our `scale`; `running_mean` and `running_var` are `mean` and `var`",
    "embed": "`weight` is our `embedding`",
    "raw": "the tensor itself",
}


def page() -> str:
    """The whole page."""
    layers = {rule.layer.name: rule.layer for table in TABLES.values() for rule in table.rules}
    parts = [
        "# Weights: what every key means",
        "Made from the tables in `converters/fact_convert/rules/key_tables.py` and "
        f"`converters/fact_convert/rules/ldm.py` by `{_COMMAND}`; a test holds it fresh.",
        "Names are those of PyTorch files (diffusers, transformers, the released FACT) on the "
        "left and of our modules on the right. `{i}` stands for a number, the same on both sides. "
        "A key that is in no table is an error, and so is a weight that is missing.",
        "## Sorts of layers",
        _grid(("sort", "tensors", "from one to the other"), map(_sort, layers.values())),
        *(text for kind, table in TABLES.items() for text in _model(kind, table)),
        *_original(),
    ]
    return "\n\n".join(parts) + "\n"


def _sort(layer: LayerTransform) -> tuple[str, str, str]:
    names = ", ".join(f"`{each.torch}`" for each in layer.parameters if each.torch)
    return layer.name, names or "one", _LAYER_TRANSFORMS[layer.name]


def _model(kind: str, table: Table) -> list[str]:
    prefixes = [f"`{prefix}`" if prefix else "nothing" for prefix in table.prefixes]
    parts = [f"## {kind}", _MODELS[kind]]
    if table.prefixes != ("",):
        before = f"Before every key stands {' or '.join(prefixes)}; we write {prefixes[0]}."
        parts.append(before)
    for places, rows in _sections(table).items():
        parts.append(f"In {', '.join(f'`{place}`' for place in places)}:" if places else "At top:")
        parts.append(_grid(("file", "module", "sort", ""), rows))
    if table.ignored:
        ignored = [(f"`{entry.torch}`", entry.reason) for entry in table.ignored]
        parts += ["Carry no weight; kept aside and given back:", _grid(("key", "why"), ignored)]
    return parts


def _sections(table: Table) -> dict[tuple[str, ...], list[tuple[str, str, str, str]]]:
    """Table rows grouped by the blocks that they occur in."""
    places: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    seen: set[str] = set()
    for rule in table.rules:
        note = "another name, read only" if rule.jax in seen else ""
        note = "a second copy, which wins" if rule.overrides else note
        seen.add(rule.jax)
        place = match[0] if (match := _PLACE.match(rule.torch)) else ""
        torch, ours = (name.removeprefix(place) for name in (rule.torch, rule.jax))
        row = (f"`{torch}`", "the same" if ours == torch else f"`{ours}`", rule.layer.name, note)
        places[row].append(place.rstrip("."))
    found = defaultdict(list)
    for row, where in places.items():
        found[tuple(filter(None, where))].append(row)
    return found


def _original() -> list[str]:
    """Bases in one file, whose names differ from diffusers' and not only from ours."""
    blocks = (
        ("`input_blocks.{n}.0`", "`down_blocks.{i}.resnets.{j}`", "n = 1 + i (l + 1) + j"),
        ("`input_blocks.{n}.1`", "`down_blocks.{i}.attentions.{j}`", "the same"),
        ("`input_blocks.{n}.0.op`", "`down_blocks.{i}.downsamplers.0.conv`", "n = (i + 1)(l + 1)"),
        ("`middle_block.{0, 1, 2}`", "`mid_block.{resnets.0, attentions.0, resnets.1}`", ""),
        ("`output_blocks.{n}.0`", "`up_blocks.{i}.resnets.{j}`", "n = i (l + 1) + j"),
        ("`output_blocks.{n}.1`", "`up_blocks.{i}.attentions.{j}`", "the same"),
        (
            "`output_blocks.{n}.{1 or 2}.conv`",
            "`up_blocks.{i}.upsamplers.0.conv`",
            "n = i (l + 1) + l; after the attention if there is one",
        ),
    )
    levels = (
        ("`encoder.down.{i}.block.{j}`", "`encoder.down_blocks.{i}.resnets.{j}`"),
        ("`encoder.down.{i}.downsample.conv`", "`encoder.down_blocks.{i}.downsamplers.0.conv`"),
        ("`decoder.up.{n}.block.{j}`", "`decoder.up_blocks.{i}.resnets.{j}`, n + i = levels - 1"),
        ("`decoder.up.{n}.upsample.conv`", "`decoder.up_blocks.{i}.upsamplers.0.conv`"),
        ("`*.mid.block_{1, 2}`", "`*.mid_block.resnets.{0, 1}`"),
        ("`*.mid.attn_1`", "`*.mid_block.attentions.0`"),
    )
    prefixes = ((f"`{prefix}`", kind) for kind, prefix in PREFIXES.items())
    return [
        "## Bases in one file, in the original layout",
        "`model.safetensors` and `model.ckpt` as most community bases are shared. Read and "
        "written; the names on the right are those of the tables above. A VAE alone has no "
        f"prefix. Running averages (`{EMA}*`) take their parameters' places unless "
        "`--weights params` is given.",
        _grid(("prefix", "model"), prefixes),
        "UNet, with l residual blocks a level:",
        _grid(("file", "diffusers", ""), blocks),
        _grid(("file", "diffusers"), _code(UNET_ENDS)),
        "In its residual blocks:",
        _grid(("file", "diffusers"), _code(UNET_RESNET)),
        "VAE:",
        _grid(("file", "diffusers"), levels),
        _grid(("file", "diffusers"), _code(VAE_ENDS)),
        "In its residual blocks:",
        _grid(("file", "diffusers"), _code(VAE_RESNET)),
        "In its attention, whose matrices are 1 x 1 convolutions here:",
        _grid(("file", "diffusers"), _code(VAE_ATTENTION)),
        "Left out, with a line that says so:",
        _grid(("key", "why"), ((f"`{entry.torch}`", entry.reason) for entry in IGNORED)),
    ]


def _code(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"`{a}`", f"`{b}`") for a, b in pairs]


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
