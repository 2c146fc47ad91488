"""Networks that only evaluation uses: identity embeddings, facial features, and a parser.

``IdentityNet`` is a convolutional network (the generator's condition comes from a transformer)
trained on people of the ``judge`` split; ``FaceFeatureNet`` measures eyes, brows and mouth in the
same crops; ``AttributeNet`` finds the five points, the head and face masks, the captioned
attributes and the colours of skin and hair in a whole picture.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from safetensors.numpy import load_file, save_file

from fact_jax.portraits.identity import Identity
from fact_jax.portraits.scene import BACKGROUNDS, EXPRESSIONS, GLASSES, PATTERNS, SHIRTS
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write

ATTRIBUTES = {
    "expression": EXPRESSIONS,
    "glasses": GLASSES,
    "shirt": SHIRTS,
    "background": BACKGROUNDS,
    "pattern": PATTERNS,
}
FACE_FEATURES = (
    *("iris", "lips"),
    *("brow_thickness", "brow_tilt", "brow_height", "mouth_width", "lip_fullness"),
)
"""Fields of ``Identity``: two colours, and numbers."""
CROP = 48
"""Side of the aligned crops that the recogniser sees."""
_WIDTHS = (24, 48, 64, 96)


class Stage(nnx.Module):
    """Halve the picture: strided convolution, normalisation, ReLU, and a residual convolution."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.down = nnx.Conv(inputs, outputs, (3, 3), strides=(2, 2), rngs=rngs)
        self.norm = nnx.GroupNorm(outputs, num_groups=8, rngs=rngs)
        self.conv = nnx.Conv(outputs, outputs, (3, 3), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        x = jax.nn.relu(self.norm(self.down(x)))
        return x + jax.nn.relu(self.conv(x))


def _stages(rngs: nnx.Rngs) -> nnx.List:
    inputs = (3, *_WIDTHS[:-1])
    return nnx.List([Stage(i, o, rngs=rngs) for i, o in zip(inputs, _WIDTHS, strict=True)])


class IdentityNet(nnx.Module):
    """Aligned crops (48 x 48, [-1, 1], background blanked) to identity embeddings."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stages = _stages(rngs)
        self.head = nnx.Linear(_WIDTHS[-1] * (CROP // 16) ** 2, 128, use_bias=False, rngs=rngs)
        # Centres the embeddings: without it what all faces share drowns what tells them apart.
        self.centre = nnx.BatchNorm(
            128, use_running_average=True, momentum=0.9, use_bias=False, use_scale=False, rngs=rngs
        )

    def __call__(self, crops: Float[Array, "b s s 3"]) -> Float[Array, "b k"]:
        """Embeddings (not normalised); ``train()`` makes the batch's own mean the centre."""
        for stage in self.stages:
            crops = stage(crops)
        return self.centre(self.head(crops.reshape(crops.shape[0], -1)))


def face_features(people: Identity) -> Float[np.ndarray, "n 11"]:
    """The true ``FACE_FEATURES``, colours as three numbers each."""
    columns = [np.asarray(getattr(people, name)) for name in FACE_FEATURES]
    return np.concatenate([one.reshape(len(one), -1) for one in columns], axis=1)


class FaceFeatureNet(nnx.Module):
    """Aligned crops as ``IdentityNet`` takes them to ``face_features``."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stages = _stages(rngs)
        self.head = nnx.Linear(_WIDTHS[-1] * (CROP // 16) ** 2, 11, rngs=rngs)
        # Training sets them to those over its people, and goes on from there.
        self.mean, self.deviation = nnx.Param(jnp.zeros(11)), nnx.Param(jnp.ones(11))

    def __call__(self, crops: Float[Array, "b s s 3"]) -> Float[Array, "b 11"]:
        for stage in self.stages:
            crops = stage(crops)
        found = self.head(crops.reshape(crops.shape[0], -1))
        return self.mean[...] + self.deviation[...] * found


class AttributeNet(nnx.Module):
    """Whole pictures (64 x 64, [-1, 1]) to points, masks, attributes and colours."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stages = _stages(rngs)
        coarse = _WIDTHS[-1] * 16
        self.points = nnx.Linear(coarse, 10, rngs=rngs)
        self.colours = nnx.Linear(coarse, 6, rngs=rngs)
        self.attributes = nnx.Dict(
            {
                name: nnx.Linear(coarse, len(values), rngs=rngs)
                for name, values in ATTRIBUTES.items()
            }
        )
        # Masks come from 16 x 16 features that know the whole through the coarse ones.
        self.context = nnx.Linear(coarse, _WIDTHS[1], rngs=rngs)
        self.masks = nnx.Conv(_WIDTHS[1], 2 * 16, (3, 3), rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> dict[str, Array]:
        """``points`` (b, 5, 2) pixels; ``head``, ``face`` (b, 64, 64) logits; ``skin``, ``hair``
        (b, 3) in about [0, 1]; and for each attribute its logits."""
        x, features = images, []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        flat = x.reshape(x.shape[0], -1)
        b, fine = len(flat), features[1]
        masks = self.masks(jax.nn.relu(fine + self.context(flat)[:, None, None]))
        # Each 16 x 16 cell holds its 4 x 4 pixels of both masks.
        masks = masks.reshape(b, 16, 16, 4, 4, 2).transpose(0, 1, 3, 2, 4, 5).reshape(b, 64, 64, 2)
        colours = self.colours(flat)
        return {
            "points": 32.0 + 16.0 * self.points(flat).reshape(b, 5, 2),
            "head": masks[..., 0],
            "face": masks[..., 1],
            "skin": colours[:, :3],
            "hair": colours[:, 3:],
            **{name: layer(flat) for name, layer in self.attributes.items()},
        }


MetricNetwork = IdentityNet | FaceFeatureNet | AttributeNet


def save_network(module: MetricNetwork, path: Path) -> None:
    """Write a network's weights in half precision as safetensors, keyed by their paths.

    UserError for a number that half precision does not hold.
    """
    with np.errstate(over="ignore"):
        arrays = {
            ".".join(map(str, key)): np.ascontiguousarray(value[...], np.float16)
            for key, value in nnx.to_flat_state(nnx.state(module))
        }
    if wrong := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise UserError(f"{path}: not finite in half precision: {', '.join(wrong)}")
    with atomic_write(path) as temporary:
        save_file(arrays, temporary, {"fact_jax": json.dumps({"kind": type(module).__name__})})


def load_network(kind: type[MetricNetwork], path: Path) -> MetricNetwork:
    """Read a network, in float32; UserError if the file is missing or does not fit."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; it holds the {kind.__name__} that evaluation needs")
    try:
        arrays = load_file(path)
    except Exception as error:  # the library's own errors are plain exceptions
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    # Without a first draw of the weights, whose small programs take seconds to compile.
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(state))
    names = {".".join(map(str, key)): key for key in flat}
    wrong = sorted(
        name
        for name in names.keys() | arrays.keys()
        if name not in arrays or name not in names or arrays[name].shape != flat[names[name]].shape
    )
    if wrong:
        raise UserError(f"{path}: not a {kind.__name__}; these weights differ: {', '.join(wrong)}")
    for name, key in names.items():
        flat[key] = flat[key].replace(jnp.asarray(arrays[name], jnp.float32))
    return nnx.merge(graph, nnx.from_flat_state(flat))
