"""How the trained part starts: fresh or from a file; the resampler whitened, and trained alone.

The tokens of a face encoder are mostly the same for everybody: what differs between photos is a
tenth of what differs between positions (measured on the miniature: a standard deviation of 0.11
against 0.98 overall). A random projection hands that proportion on, and training settles on
ignoring the face before it has found it. So the resampler's projection starts whitened (after
Kessy et al. 2018, arXiv 1512.00809): what varies between photos and what varies between positions
come in with the same weight.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from fact_convert import attach_adapter, load_adapter
from fact_convert.models.adapter import check_blocks
from fact_convert.rules.key_tables import ADAPTER_INFIX
from fact_convert.weights import abstract_state, add_state, dump_some
from fact_jax.models.adapter import FaceAdapter
from fact_jax.models.resampler import Resampler, ResamplerConfig
from fact_jax.models.unet import UNet
from fact_jax.utils.errors import UserError
from fact_train.engine.partition import merge, split_by_paths, split_module

_FLOOR = 1e-3  # of the largest variance: directions below it are noise, not to be blown up
_BATCH, _RATE, _WARMUP = 64, 2e-3, 0.02
_EMBEDDING_FLOOR = 1e-2
"""Of the largest variance: directions of the embedding below it are left out."""
_UNSEEN = 8
"""One in so many photos, the last ones, is only looked at in the end."""


def new_adapters(
    unet: UNet, face_dim: int, rngs: nnx.Rngs, *, zero_projections: bool, gate: float
) -> dict:
    """Arrays of fresh adapters for every transformer block, nested by their paths in the UNet.

    They add exactly nothing before the first update: by gates of 0, or with ``zero_projections`` by
    output projections of 0 behind gates of ``gate``.
    """
    tree: dict = {}
    for path, block in unet.transformer_blocks():
        adapter = FaceAdapter(block.norm1.num_features, block.attn1.heads, face_dim, rngs=rngs)
        if zero_projections:
            adapter.alpha_attn[...] = adapter.alpha_dense[...] = jnp.asarray(gate)
            for layer in (adapter.attn.to_out[0], adapter.ff.net[2]):
                layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
        node = tree
        for part in path.split("."):
            node = node.setdefault(int(part) if part.isdigit() else part, {})
        node["face"] = split_module(adapter).arrays
    return tree


def read_adapters(
    unet: UNet, file: str, resampler: ResamplerConfig, fresh: Callable[[], dict]
) -> tuple[dict, dict, Resampler, int, list[str]]:
    """From an adapter file: arrays of the adapters, of the base, the resampler, and its step.

    And the blocks for which the file has no adapter, as where the base has grown: they take that
    of ``fresh()``, as :func:`new_adapters` gives them. A file that does not say after how many
    steps it was written counts as none. UserError if its resampler or a block is of another size,
    or it has a block that the base lacks.
    """
    adapter = load_adapter(file)
    if adapter.resampler.config != resampler:
        raise UserError(
            f"{file} has a resampler of another size ({adapter.resampler.config}) than "
            f"options.resampler ({resampler}): set options.resampler to it"
        )
    lacking = [path for path in unet.config.block_channels() if path not in adapter.blocks]
    if not lacking:
        adapted = attach_adapter(unet, adapter)
    else:
        check_blocks(adapter.blocks, unet.config.block_channels(), file, some=True)
        config = dataclasses.replace(unet.config, face_dim=adapter.face_dim)
        graph, _ = abstract_state("unet", config)
        started = nnx.merge(graph, merge(split_module(unet).arrays, fresh()))
        state = dump_some(started, lambda key: ADAPTER_INFIX in key) | adapter.state()
        adapted = add_state(unet, state, config)
    step = adapter.metadata.get("step")
    step = step if isinstance(step, int) else 0
    adapters, base = split_by_paths(split_module(adapted).arrays, ["(^|/)face/"])
    return adapters, base, adapter.resampler, step, lacking


def whitened_resampler(
    config: ResamplerConfig, tokens: Float[np.ndarray, "n t e"], rngs: nnx.Rngs
) -> Resampler:
    """A fresh resampler whose input projection sees such tokens whitened."""
    resampler = Resampler(config, rngs=rngs)
    matrix, bias = whitening(tokens)
    kernel = resampler.proj_in.kernel[...]
    resampler.proj_in.kernel[...], resampler.proj_in.bias[...] = matrix @ kernel, bias @ kernel
    return resampler


def whitening(
    tokens: Float[np.ndarray, "n t e"],
) -> tuple[Float[np.ndarray, "e e"], Float[np.ndarray, " e"]]:
    """Matrix and bias that map tokens to about unit variance, half by photo and half by position.

    Positions are told apart within the span of their mean tokens; photos outside of it (so the
    encoder must be wider than it has tokens).
    """
    mean = tokens.mean(axis=(0, 1), dtype=np.float64)
    positions = tokens.mean(axis=0, dtype=np.float64) - mean
    deviations = (tokens - mean - positions).reshape(-1, tokens.shape[-1])
    _, sizes, span = np.linalg.svd(positions, full_matrices=False)
    span = span[sizes > 0]  # of a single token there are no positions
    outside = deviations - deviations @ span.T @ span
    matrix = _inverse_root(positions) + _inverse_root(outside)
    return matrix.astype(np.float32), (-mean @ matrix).astype(np.float32)


def _inverse_root(rows: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "e e"]:
    """C^(-1/2) of the rows' second moment C on the space they span, 0 outside of it."""
    variances, directions = np.linalg.eigh(rows.T @ rows / len(rows))
    kept = variances > _FLOOR * variances.max()
    return (directions[:, kept] / np.sqrt(variances[kept])) @ directions[:, kept].T


def pretrain_resampler(
    resampler: Resampler,
    tokens: Float[np.ndarray, "n t e"],
    embeddings: Float[np.ndarray, "n k"],
    steps: int,
    key: jax.Array,
    *,
    keep: float = 0.0,
) -> tuple[Resampler, float]:
    """The resampler after ``steps`` steps of its own, and the R2 of unseen photos' embeddings.

    Trained with the adapter alone it keeps what weighs most in the error, colours, and loses what
    tells faces apart (miniature/README.md). The encoder's embedding is what faces are told apart
    by, so the face tokens are trained until a linear map of them gives it: a linear probe (Alain
    and Bengio, arXiv 1610.01644) as a loss.

    ``tokens`` are what it takes of photos, sorted by person, ``embeddings`` the encoder's. The loss
    is the mean square of what a linear map of the face tokens misses of the whitened embedding,
    and ``keep`` times that by which the face tokens have moved.
    """
    part, wanted = split_module(resampler), _whitened(embeddings)
    start, seen = part.arrays, len(tokens) - len(tokens) // _UNSEEN
    config = resampler.config
    width = config.num_queries * config.output_dim
    readout = {"kernel": jnp.zeros((width, wanted.shape[1])), "bias": jnp.zeros(wanted.shape[1])}
    params: PyTree = {"resampler": start, **readout}
    rate = optax.warmup_cosine_decay_schedule(0.0, _RATE, round(_WARMUP * steps), steps)
    optimizer = optax.adamw(rate, b2=0.99, weight_decay=1e-2)

    def missed(params: PyTree, face: Float[Array, "b m o"], wanted: Float[Array, "b d"]) -> Array:
        told = face.reshape(len(face), width) @ params["kernel"] + params["bias"]
        return ((told - wanted) ** 2).mean()

    def error(params: PyTree, tokens: Float[Array, "b t e"], wanted: Float[Array, "b d"]) -> Array:
        face = part.module(params["resampler"])(tokens)
        moved = ((face - part.module(start)(tokens)) ** 2).mean() if keep else 0.0
        return missed(params, face, wanted) + keep * moved

    @jax.jit
    def update(
        params: PyTree, state: PyTree, tokens: Float[Array, "b t e"], wanted: Float[Array, "b d"]
    ) -> tuple[PyTree, PyTree]:
        changes, state = optimizer.update(jax.grad(error)(params, tokens, wanted), state, params)
        return optax.apply_updates(params, changes), state

    def rows(some: Int[np.ndarray, " b"]) -> tuple[Float[np.ndarray, "b t e"], np.ndarray]:
        return tokens[some].astype(np.float32), wanted[some]

    state = optimizer.init(params)
    for step in range(steps):
        some = jax.random.randint(jax.random.fold_in(key, step), (_BATCH,), 0, seen)
        params, state = update(params, state, *rows(np.asarray(some)))
    unseen, told = rows(np.arange(seen, len(tokens)))
    face = jax.jit(part.module(params["resampler"]).__call__)(unseen)
    r2 = 1 - float(missed(params, face, told)) / float((told**2).mean())
    return part.module(params["resampler"]), r2


def _whitened(embeddings: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n d"]:
    """Their principal components of unit variance, those that vary."""
    centred = embeddings - embeddings.mean(0, dtype=np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    kept = variances > _EMBEDDING_FLOOR * variances[-1]
    return (centred @ (directions[:, kept] / np.sqrt(variances[kept]))).astype(np.float32)
