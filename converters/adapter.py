"""The trained part of FACT as a file: adapters and resampler, released ``.ckpt`` or our own.

Our file is safetensors with the released names (``local_fac_prj.*`` and
``<block>.attn2.processor.*``) and metadata that says what it is and what it fits.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from converters.readers import State, read_file, stored_as
from converters.rules import ADAPTER_MARK, RESAMPLER_PREFIX
from converters.weights import add_state, dump_some, dump_state, load_state, read_config
from converters.writers import write_safetensors
from fact_jax.errors import UserError, listed
from fact_jax.models.resampler import Resampler, ResamplerConfig
from fact_jax.models.unet import UNet

FORMAT, VERSION = "fact-adapter", "1"
RELEASED_DIM_HEAD = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """A trained adapter, not yet attached to a base.

    ``blocks`` holds for every transformer block (by its path in the UNet) the released adapter's
    own keys and tensors in the PyTorch layout. ``metadata`` is what the file says of itself:
    format, version, config (a dict), step.
    """

    blocks: Mapping[str, State]
    resampler: Resampler
    metadata: Mapping[str, object]

    @property
    def face_dim(self) -> int:
        """Width of a face token."""
        return self.resampler.config.output_dim

    def state(self) -> State:
        """All blocks' tensors as one flat dict with the released names."""
        return {
            f"{path}{ADAPTER_MARK}{key}": array
            for path, block in self.blocks.items()
            for key, array in block.items()
        }


def load_adapter(path: str | os.PathLike, *, resampler_config=None, dtype=jnp.float32) -> Adapter:
    """Read an adapter file of either format; the resampler's parameters are of ``dtype``.

    ``resampler_config`` is only needed for a ``.ckpt`` whose heads are not 64 wide: such files do
    not say. Raises UserError for anything else than a whole adapter file.
    """
    state, text = read_file(path)
    metadata = read_metadata(text, path)
    resampler, blocks = split_state(state, path)
    if resampler_config is None:
        resampler_config = metadata.get("config", {}).get("resampler")
    try:
        config = read_config("resampler", resampler_config or infer_resampler(resampler))
        module = load_state("resampler", resampler, config, dtype=dtype)
    except UserError as err:
        raise UserError(f"{path}: {err}") from err
    adapter = Adapter(blocks=blocks, resampler=module, metadata=metadata)
    for name, block in blocks.items():
        linear = block.get("linear.weight")
        if linear is None or linear.ndim != 2 or linear.shape[1] != adapter.face_dim:
            raise UserError(
                f"{path}: {name}{ADAPTER_MARK}linear.weight does not take face tokens of width "
                f"{adapter.face_dim}, which its resampler gives"
            )
    return adapter


def split_state(state: State, source: str | os.PathLike) -> tuple[State, dict[str, State]]:
    """The resampler's tensors, and the adapters' by block and own key."""
    resampler, blocks, unexpected = {}, {}, []
    for key, array in state.items():
        block, mark, own = key.partition(ADAPTER_MARK)
        if key.startswith(RESAMPLER_PREFIX):
            resampler[key.removeprefix(RESAMPLER_PREFIX)] = array
        elif mark:
            blocks.setdefault(block, {})[own] = array
        else:
            unexpected.append(key)
    if not resampler or not blocks:
        raise UserError(
            f"{source}: not a FACT adapter: no {RESAMPLER_PREFIX}* or no *{ADAPTER_MARK}* in it"
        )
    if unexpected:
        raise UserError(f"{source}: {len(unexpected)} unexpected ({listed(unexpected)})")
    return resampler, blocks


def read_metadata(text: Mapping[str, str], source: str | os.PathLike) -> dict[str, object]:
    """The metadata of our file with its JSON parts read; empty for files that have none."""
    if "format" in text and text["format"] not in (FORMAT, "pt"):
        raise UserError(f"{source}: says that it is {text['format']!r}, {FORMAT!r} was wanted")
    if text.get("version", VERSION) != VERSION:
        raise UserError(
            f"{source}: version {text['version']} of the format; this program knows {VERSION}"
        )
    metadata: dict[str, object] = dict(text)
    for key in ("config", "step"):
        try:
            metadata |= {key: json.loads(text[key])} if key in text else {}
        except ValueError as err:
            raise UserError(f"{source}: metadata {key!r} is not JSON ({err})") from err
    if not isinstance(metadata.get("config", {}), dict):
        raise UserError(f"{source}: metadata 'config' is not an object")
    return metadata


def infer_resampler(state: State, dim_head: int = RELEASED_DIM_HEAD) -> dict[str, int]:
    """A resampler's configuration from its tensors' shapes and the width of a head."""
    try:
        inner = state["layers.0.0.to_q.weight"].shape[0]
        _, queries, dim = state["latents"].shape
        found = {
            "dim": dim,
            "num_queries": queries,
            "embedding_dim": state["proj_in.weight"].shape[1],
        }
        found |= {"output_dim": state["proj_out.weight"].shape[0]}
    except (KeyError, ValueError, IndexError) as err:
        raise UserError(f"the resampler in it is not whole ({err})") from err
    if inner % dim_head:
        raise UserError(
            f"its heads cannot be {dim_head} wide as the released ones are ({inner} channels); "
            "give the resampler's configuration"
        )
    layers = [int(m[1]) for key in state if (m := re.match(r"layers\.(\d+)\.", key))]
    return found | {"depth": max(layers) + 1, "dim_head": dim_head, "heads": inner // dim_head}


def attach_adapter(unet: UNet, adapter: Adapter) -> UNet:
    """A UNet with the adapter in it; the base's parameters are shared, ``unet`` stays as it is.

    Where a released file holds its own copy of the base's ``norm2`` and it differs, it wins, and
    this is said. Raises UserError if the adapter was made for another sort of base, or if there
    is one in ``unet`` already.
    """
    if unet.config.face_dim is not None:
        raise UserError("this UNet has an adapter already: attach the other one to its base")
    check_blocks(
        adapter.blocks,
        {path: block.norm2.num_features for path, block in unet.transformer_blocks()},
    )
    config = dataclasses.replace(unet.config, face_dim=adapter.face_dim)
    return add_state(unet, adapter.state(), config)


def check_blocks(
    adapters: Mapping[str, State],
    widths: Mapping[str, int],
    adapter: str | os.PathLike = "this adapter",
    base: str = "this UNet",
) -> None:
    """UserError if adapters, by their blocks, do not fit a UNet's blocks of these channels."""
    made_for = {path: len(state.get("linear.bias", ())) for path, state in adapters.items()}
    if widths != made_for:
        raise UserError(
            f"{adapter} is for another base model: it was made for {_listed(made_for)}, {base} has "
            f"{_listed(widths)}"
        )


def _listed(widths: Mapping[str, int]) -> str:
    return f"{len(widths)} transformer blocks of channels {listed(map(str, widths.values()))}"


def save_adapter(
    unet: UNet,
    resampler: Resampler,
    path: str | os.PathLike,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write the adapters of ``unet`` and the resampler to ``path`` (``.safetensors``).

    ``metadata`` adds to what the file says of itself, as ``{"step": 1000, "encoder": hash}``;
    what is not text is written as JSON.
    """
    if unet.config.face_dim is None:
        raise UserError("this UNet has no adapter to save")
    blocks = dump_some(unet, lambda key: ADAPTER_MARK in key)
    own = {k.removeprefix(RESAMPLER_PREFIX): v for k, v in dump_state(resampler).items()}
    state = blocks | {RESAMPLER_PREFIX + key: array for key, array in own.items()}
    write_adapter(path, state, describe(unet.config.to_dict(), resampler.config), metadata)


def describe(unet_config: Mapping, resampler: ResamplerConfig) -> dict[str, object]:
    """What an adapter's metadata says about the models that it belongs to."""
    keys = ("block_out_channels", "cross_attention_dim", "attention_head_dim")
    return {
        "unet": {key: unet_config[key] for key in keys if key in unet_config},
        "resampler": resampler.to_dict(),
    }


def write_adapter(
    path: str | os.PathLike,
    state: Mapping[str, np.ndarray],
    config: Mapping[str, object],
    metadata: Mapping[str, object] | None = None,
    wrote: Callable[[int], None] | None = None,
    *,
    replace: bool = True,
) -> None:
    """Write a flat adapter state with released names as our adapter file."""
    if stored_as(path) != "safetensors":
        raise UserError(f"{path}: an adapter file ends in .safetensors")
    own = {"format": FORMAT, "version": VERSION, "config": dict(config)}
    texts = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in ((metadata or {}) | own).items()
    }
    write_safetensors(path, state, texts, wrote, replace=replace)
