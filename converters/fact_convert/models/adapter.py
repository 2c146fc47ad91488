"""The trained part of FACT as a file: adapters and resampler, released ``.ckpt`` or our own.

Our file is safetensors with the released names (``local_fac_prj.*`` and
``<block>.attn2.processor.*``) and metadata that says what it is and what it fits.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fact_convert.io.lazy_tensor import State, Tensor
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.weight_files import file_format, read_file
from fact_convert.models.validation import check_fits, resampler_shape
from fact_convert.rules.key_tables import ADAPTER_INFIX, RESAMPLER_PREFIX
from fact_convert.weights import add_state, dump_some, dump_state, load_state, read_config
from fact_jax.models.resampler import VARIATIONS, Resampler, ResamplerConfig
from fact_jax.models.unet import UNet
from fact_jax.utils.errors import UserError, error_context, listed

FORMAT, VERSION = "fact-adapter", "1"
DIM_HEAD_KEY = "fact_jax.resampler.dim_head"
"""In our pickles of other than released size; the released code passes over keys of other names."""

PARALLEL, COUPLED = "parallel", "coupled"
FORMS = {PARALLEL: "a parallel adapter", COUPLED: "an adapter with cross-attention of its own"}
COUPLED_INFIX = f"{ADAPTER_INFIX}text."
"""Where a coupled adapter's file has its block's text cross-attention, ``attn2`` in the base."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """A trained adapter, not yet attached to a base.

    ``blocks`` holds for every transformer block (by its path in the UNet) the released adapter's
    own keys and tensors in the PyTorch layout. ``metadata`` is what the file says of itself:
    format, version, config (a dict), step. ``text`` is a coupled one's cross-attention, under the
    base's names.
    """

    blocks: Mapping[str, State]
    resampler: Resampler
    metadata: Mapping[str, object]
    text: State

    @property
    def face_dim(self) -> int:
        """Width of a face token."""
        return self.resampler.config.output_dim

    def state(self) -> State:
        """All blocks' tensors as one flat dict with the released names."""
        return _joined(self.blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """An adapter's file, opened (memory maps) and checked, by what is in it.

    ``resampler`` and ``blocks``: :func:`split_state`; ``text``: :class:`Adapter`.
    """

    path: Path
    metadata: dict[str, object]
    resampler: State
    blocks: Mapping[str, State]
    config: ResamplerConfig
    text: State

    def state(self) -> State:
        """All tensors as one flat dict with the released names."""
        own = {RESAMPLER_PREFIX + key: array for key, array in self.resampler.items()}
        return {**own, **_joined(self.blocks)}


def form_of(metadata: Mapping[str, object]) -> object:
    """Which of :data:`FORMS` the adapter is of; None: FACT's.

    Parallel: see ``fact_jax.models.adapter.FaceControls``. Coupled: the base's text cross-attention
    learned with it, and is in its file.
    """
    return metadata.get("form")


def check_plain(
    metadata: Mapping[str, object], resampler: object, source: str | os.PathLike
) -> None:
    """UserError for an adapter of a comparison; ``resampler``: its configuration, if said."""
    form, found = form_of(metadata), None
    if form is not None:
        found = FORMS.get(str(form), f"an adapter of the form {form!s:.40}")
    elif isinstance(resampler, Mapping):
        said = {name: resampler[name] for name in VARIATIONS if name in resampler}
        with error_context(source):
            found = read_config("resampler", said).variation
    if found is not None:
        raise UserError(
            f"{source}: {found}, of a comparison: only fact-infer's JAX backend (--backend flax) "
            "draws it"
        )


def read_adapter(
    path: str | os.PathLike, resampler_config=None, *, variations: bool = False
) -> AdapterFile:
    """Open an adapter file of either format without reading its tensors.

    One of a comparison is refused unless ``variations`` says that it is known what to do with it.
    Raises UserError for anything else than a whole adapter, and for one that does not say how wide
    a head of its resampler is, unless ``resampler_config`` says it or the file is of the released
    size: then the released heads are taken, which is logged.
    """
    path = Path(path)
    state, text = read_file(path)
    state, said = pop_dim_head(state, path)
    metadata = read_metadata(text, path, variations=True) | said
    coupled = [key for key in state if COUPLED_INFIX in key and form_of(metadata) == COUPLED]
    own = {key.replace(COUPLED_INFIX, ".attn2."): state[key] for key in coupled}
    resampler, blocks = split_state({k: state[k] for k in state if k not in coupled}, path)
    with error_context(path):
        config, note = resampler_config, None
        if config is None:
            config, note = find_resampler_config(resampler, metadata)
        config = read_config("resampler", config, resampler)
        check_adapter(resampler, blocks, config)
    if not variations:
        check_plain(metadata, config.to_dict(), path)
    if note:
        log.warning("note: %s: %s", path, note)
    return AdapterFile(
        path=path, metadata=metadata, resampler=resampler, blocks=blocks, config=config, text=own
    )


def load_adapter(
    path: str | os.PathLike, *, resampler_config=None, dtype=jnp.float32, variations: bool = False
) -> Adapter:
    """Read an adapter file of either format; the resampler's parameters are of ``dtype``.

    ``resampler_config`` is only needed for a ``.ckpt`` of another size than the released one that
    another program wrote: such files do not say how wide heads are. Raises UserError for anything
    else than a whole adapter file.
    """
    file = read_adapter(path, resampler_config, variations=variations)
    module = load_state("resampler", file.resampler, file.config, dtype=dtype)
    return Adapter(blocks=file.blocks, resampler=module, metadata=file.metadata, text=file.text)


def _joined(blocks: Mapping[str, State]) -> State:
    return {
        f"{path}{ADAPTER_INFIX}{key}": array
        for path, block in blocks.items()
        for key, array in block.items()
    }


def check_adapter(resampler: State, blocks: Mapping[str, State], config=None) -> None:
    """UserError unless both parts of an adapter are whole and fit each other; nothing is read.

    ``config`` is the resampler's configuration, where it is known.
    """
    check_fits("resampler", resampler, config)
    face_dim = read_config("resampler", config or resampler_shape(resampler), resampler).output_dim
    for name, block in blocks.items():
        linear = block.get("linear.weight")
        if linear is not None and (linear.ndim != 2 or linear.shape[1] != face_dim):
            raise UserError(
                f"{name}{ADAPTER_INFIX}linear.weight does not take face tokens of width "
                f"{face_dim}, which its resampler gives"
            )
    check_fits("adapter", _joined(blocks))


def split_state(state: State, source: str | os.PathLike) -> tuple[State, Mapping[str, State]]:
    """The resampler's tensors, and the adapters' by block and own key."""
    resampler: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = {}
    unexpected = []
    for key, array in state.items():
        block, mark, own = key.partition(ADAPTER_INFIX)
        if key.startswith(RESAMPLER_PREFIX):
            resampler[key.removeprefix(RESAMPLER_PREFIX)] = array
        elif mark:
            blocks.setdefault(block, {})[own] = array
        else:
            unexpected.append(key)
    if not resampler or not blocks:
        raise UserError(
            f"{source}: not a FACT adapter: no {RESAMPLER_PREFIX}* or no *{ADAPTER_INFIX}* in it"
        )
    if unexpected:
        raise UserError(f"{source}: {len(unexpected)} unexpected ({listed(unexpected)})")
    return resampler, blocks


def read_metadata(
    text: Mapping[str, str], source: str | os.PathLike, *, variations: bool = False
) -> dict[str, object]:
    """The metadata of our file with its JSON parts read; empty for files that have none.

    UserError for an adapter of a comparison, unless ``variations`` takes them.
    """
    if "format" in text and text["format"] not in (FORMAT, "pt"):
        raise UserError(f"{source}: says that it is {text['format']!r}, {FORMAT!r} was wanted")
    if text.get("version", VERSION) != VERSION:
        raise UserError(
            f"{source}: version {text['version']} of the format; this program knows {VERSION}"
        )
    metadata: dict[str, object] = {k: value for k, value in text.items() if k != "dim_head"}
    for key in ("config", "step"):
        try:
            metadata |= {key: json.loads(text[key])} if key in text else {}
        except ValueError as err:
            raise UserError(f"{source}: metadata {key!r} is not JSON ({err})") from err
    if not isinstance(metadata.get("config", {}), dict):
        raise UserError(f"{source}: metadata 'config' is not an object")
    if not variations:
        said = metadata.get("config")
        check_plain(metadata, said.get("resampler") if isinstance(said, dict) else None, source)
    return metadata


def pop_dim_head(state: State, source: str | os.PathLike) -> tuple[State, dict[str, int]]:
    """The state without :data:`DIM_HEAD_KEY`, and what it says as metadata (``dim_head``)."""
    if DIM_HEAD_KEY not in state:
        return state, {}
    said = state[DIM_HEAD_KEY]
    width = np.asarray(said).item() if said.size == 1 and said.dtype.kind in "iu" else 0
    if width < 1:
        raise UserError(f"{source}: {DIM_HEAD_KEY} is not the width of a head")
    rest = {key: array for key, array in state.items() if key != DIM_HEAD_KEY}
    return rest, {"dim_head": width}


def add_dim_head(state: State, config: ResamplerConfig) -> State:
    """An adapter state for a pickle, with :data:`DIM_HEAD_KEY` in place of metadata.

    Released files need no side key, and get none: they are recognised by their size.
    """
    own = {k.removeprefix(RESAMPLER_PREFIX): a for k, a in state.items() if RESAMPLER_PREFIX in k}
    shape = resampler_shape(own)
    if _is_released(shape) and config == ResamplerConfig.sd15():
        return state
    return {**state, DIM_HEAD_KEY: np.array(config.dim_head, np.int64)}


def find_resampler_config(
    state: State, metadata: Mapping[str, object], dim_head: int | None = None
) -> tuple[Mapping[str, object], str | None]:
    """A resampler's configuration, and a note if part of it was assumed.

    It is what the metadata says (our file's ``config`` or the ``dim_head`` of a side key), else it
    follows from the tensors and ``dim_head``. Raises UserError where nothing tells the heads, or
    two things tell different ones.
    """
    config = metadata.get("config")
    said = config.get("resampler") if isinstance(config, Mapping) else None
    known = said.get("dim_head") if isinstance(said, Mapping) else metadata.get("dim_head")
    if dim_head is not None and known not in (None, dim_head):
        raise UserError(f"it says that a head of its resampler is {known} wide, not {dim_head}")
    if said is not None:
        return said, None
    width = dim_head if known is None else known
    if width is None:
        return infer_resampler(state)
    shape = resampler_shape(state)
    if not isinstance(width, int) or width < 1 or shape["dim_head"] % width:
        raise UserError(
            f"its heads cannot be {width!s:.40} wide: its resampler has {shape['dim_head']} "
            "channels for all of them"
        )
    return {**shape, "dim_head": width, "heads": shape["dim_head"] // width}, None


def infer_resampler(state: State) -> tuple[dict[str, int], str]:
    """A resampler's configuration from its tensors, and a note on what is assumed.

    Their shapes do not tell the heads: UserError unless these are those of the released one.
    """
    shape, released = resampler_shape(state), ResamplerConfig.sd15()
    if not _is_released(shape):
        raise UserError(
            f"does not say how wide a head of its resampler is ({shape['dim_head']} channels for "
            f"all heads, {shape['dim']} wide: not of the released size, whose heads are "
            f"{released.dim_head} wide): give --dim-head to fact-convert, and use what it writes"
        )
    heads = {"dim_head": released.dim_head, "heads": released.heads}
    note = (
        "resampler: dim_head {dim_head} taken ({heads} heads), as in the released one of its size"
    )
    return {**shape, **heads}, note.format(**heads)


def _is_released(shape: Mapping[str, int]) -> bool:
    released = ResamplerConfig.sd15()
    return shape == {
        **released.to_dict(),
        "dim_head": released.dim_head * released.heads,
        "heads": 1,
    }


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
    return add_state(unet, {**adapter.state(), **adapter.text}, config)


def check_blocks(
    adapters: Mapping[str, State],
    widths: Mapping[str, int],
    adapter: str | os.PathLike = "this adapter",
    base: str = "this UNet",
    some: bool = False,
) -> None:
    """UserError unless adapters fit a UNet's blocks of these channels, all or only ``some``."""
    made_for = {path: len(state.get("linear.bias", ())) for path, state in adapters.items()}
    if not (made_for.items() <= widths.items() if some else made_for == dict(widths)):
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
    blocks = dump_some(unet, lambda key: ADAPTER_INFIX in key)
    if form_of(metadata or {}) == COUPLED:
        text = dump_some(unet, lambda key: ".attn2." in key and ADAPTER_INFIX not in key)
        blocks |= {key.replace(".attn2.", COUPLED_INFIX): array for key, array in text.items()}
    own = {k.removeprefix(RESAMPLER_PREFIX): v for k, v in dump_state(resampler).items()}
    state = blocks | {RESAMPLER_PREFIX + key: array for key, array in own.items()}
    write_adapter(path, state, model_configs(unet.config.to_dict(), resampler.config), metadata)


def model_configs(unet_config: Mapping, resampler: ResamplerConfig) -> dict[str, object]:
    """The UNet and resampler configuration for an adapter's metadata."""
    keys = ("block_out_channels", "cross_attention_dim", "attention_head_dim")
    return {
        "unet": {key: unet_config[key] for key in keys if key in unet_config},
        "resampler": resampler.to_dict(),
    }


def write_adapter(
    path: str | os.PathLike,
    state: State,
    config: Mapping[str, object],
    metadata: Mapping[str, object] | None = None,
    *,
    replace: bool = True,
) -> None:
    """Write a flat adapter state with released names as our adapter file."""
    if file_format(path) != "safetensors":
        raise UserError(f"{path}: an adapter file ends in .safetensors")
    own = {"format": FORMAT, "version": VERSION, "config": dict(config)}
    texts = as_texts({**(metadata or {}), **own})
    write_safetensors(path, state, texts, replace=replace)


def as_texts(metadata: Mapping[str, object]) -> dict[str, str]:
    """Metadata as safetensors has it: what is not text is written as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in metadata.items()
    }
