"""The adapter's controls: caps, AdaIN-mean and regions do what they promise, and only that."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fact_jax.models.adapter import FaceAdapter, FaceControls
from fact_jax.regions import region_masks
from fact_jax.utils.errors import UserError
from tests.fact_jax.tiny import normal

pytestmark = pytest.mark.heavy

DIM, HEADS, FACE_DIM, PEOPLE, TOKENS = 8, 2, 6, 2, 3
X = 2 * normal(1, 2, 6, DIM) + 0.5
FACE = normal(2, 2, PEOPLE * TOKENS, FACE_DIM)
# By token: of the first alone, of both, of the second alone, of nobody.
REGIONS = jnp.asarray(
    [[[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]], [[0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 1]]], bool
)


@pytest.fixture(scope="module")
def adapter() -> FaceAdapter:
    made = FaceAdapter(DIM, HEADS, FACE_DIM, rngs=nnx.Rngs(0))
    made.alpha_attn[...], made.alpha_dense[...] = jnp.asarray(1.0), jnp.asarray(-0.7)
    return made


def run(adapter, face=FACE, x=X, scale=1.0, **controls):
    adapted, increment = adapter(x, adapter.keys(face), scale, FaceControls(**controls))
    if x.dtype == jnp.float32:
        np.testing.assert_allclose(x + increment, adapted, atol=1e-6)
    return np.asarray(adapted), np.asarray(increment)


def test_nothing_asked_is_the_plain_adapter(adapter):
    plain = adapter(X, adapter.keys(FACE))
    for one, other in zip(run(adapter), plain, strict=True):
        np.testing.assert_array_equal(one, other)


def test_cap_by_hand(adapter):
    """Each sample by its own lengths; an increment within the cap is not touched."""
    _, plain = run(adapter)
    ratio = np.linalg.norm(plain, axis=(1, 2)) / np.linalg.norm(X, axis=(1, 2))
    cap = float(ratio.mean())
    assert ratio.min() < cap < ratio.max()
    _, capped = run(adapter, cap=cap)
    within, beyond = ratio.argmin(), ratio.argmax()
    np.testing.assert_array_equal(capped[within], plain[within])
    expected = plain[beyond] * cap * np.linalg.norm(X[beyond]) / np.linalg.norm(plain[beyond])
    np.testing.assert_allclose(capped[beyond], expected, atol=1e-6)


def test_a_parallel_adapter_asks_the_face_alone(adapter):
    """softmax over the face's keys, by hand; the feed-forward adds nothing."""
    _, increment = run(adapter, scale=0.5, parallel=True)
    heads = lambda a: np.asarray(a).reshape(*a.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)  # noqa: E731
    keys, values = map(heads, adapter.keys(FACE))
    queries = heads(adapter.attn.to_q(adapter.norm1(X)))
    scores = queries @ keys.swapaxes(2, 3) / (DIM // HEADS) ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    seen = (weights / weights.sum(-1, keepdims=True)) @ values
    mixed = adapter.attn.to_out[0](jnp.asarray(seen.transpose(0, 2, 1, 3).reshape(X.shape)))
    np.testing.assert_allclose(increment, 0.5 * np.tanh(1.0) * mixed, atol=1e-5)


def test_gradients_of_gates_and_biases_are_summed_in_float32(adapter):
    """In 16 bits a sum over thousands of tokens stops growing when it is 256 times its terms."""
    half = nnx.clone(adapter)
    nnx.update(half, nnx.map_state(lambda _, a: a.astype(jnp.bfloat16), nnx.state(half)))
    graph, state = nnx.split(half)
    x, face = X.astype(jnp.bfloat16), FACE.astype(jnp.bfloat16)

    def total(state):
        adapter = nnx.merge(graph, state)
        return adapter(x, adapter.keys(face))[0].astype(jnp.float32).sum()

    gradient = jax.grad(total)
    sums = re.findall(r":(\w+)\[([\d,]*)\] = reduce_sum", str(jax.make_jaxpr(gradient)(state)))
    small = {dtype for dtype, shape in sums if shape in ("", f"{DIM}", f"{8 * DIM}")}
    assert small == {"f32"}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient(state))} == {jnp.dtype(jnp.bfloat16)}


def test_a_cap_is_measured_in_float32(adapter):
    """The sum of squares of a block's tokens is beyond what float16 holds."""
    half, x = nnx.clone(adapter), (200 * X).astype(jnp.float16)
    nnx.update(half, nnx.map_state(lambda _, a: a.astype(jnp.float16), nnx.state(half)))
    _, plain = run(half, FACE.astype(jnp.float16), x)
    _, capped = run(half, FACE.astype(jnp.float16), x, cap=1.0)
    np.testing.assert_array_equal(capped, plain)
    assert np.abs(plain).max() > 0
    silent, _ = run(half, FACE.astype(jnp.float16), x, scale=0.0, cap=1e-3)
    np.testing.assert_array_equal(silent, x)


def test_adain_by_hand(adapter):
    """Keys and values of each person's tokens get the mean of the visual tokens' own."""
    own = adapter.attn.keys_values(adapter.norm1(X))
    moved = []
    for face, visual in zip(adapter.keys(FACE), own, strict=True):
        people = np.asarray(face).reshape(2, PEOPLE, TOKENS, DIM)
        people = people - people.mean(2, keepdims=True) + np.asarray(visual).mean(1)[:, None, None]
        moved.append(jnp.asarray(people.reshape(face.shape)))
    everywhere = {6: jnp.ones_like(REGIONS)}
    expected = adapter(X, tuple(moved))[0]
    ours, _ = run(adapter, adain=True, regions=everywhere)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    # Of one person the mean is that of all tokens.
    together, _ = run(adapter, adain=True)
    assert np.abs(together - ours).max() > 1e-3
    assert np.abs(run(adapter)[0] - ours).max() > 1e-2


def test_outside_all_regions_nothing_changes(adapter):
    adapted, increment = run(adapter, regions={6: REGIONS}, cap=0.2, adain=True)
    inside = np.asarray(REGIONS.any(1))
    assert inside.any(1).all()
    assert not inside.all()
    assert adapted[~inside].tobytes() == np.asarray(X)[~inside].tobytes()
    assert not increment[~inside].any()
    assert np.abs(increment[inside]).max() > 0.1


def test_everyone_is_seen_in_their_own_region_alone(adapter):
    """Another second person is another picture in their region, to the last bit nowhere else."""
    other = FACE.at[:, TOKENS:].set(normal(3, 2, TOKENS, FACE_DIM))
    ours, theirs = (run(adapter, face, regions={6: REGIONS})[0] for face in (FACE, other))
    second = np.asarray(REGIONS[:, 1])
    assert ours[~second].tobytes() == theirs[~second].tobytes()
    assert (np.abs(ours - theirs).max(-1) > 1e-3)[second].all()
    # Who is alone in a token is drawn there as if nobody else were in the picture.
    first = np.asarray(REGIONS[:, 0]) & ~second
    alone, _ = run(adapter, FACE[:, :TOKENS])
    np.testing.assert_allclose(ours[first], alone[first], atol=1e-5)
    # Where both may be, both are.
    both = np.asarray(REGIONS.all(1))
    np.testing.assert_allclose(ours[both], run(adapter)[0][both], atol=1e-5)


def test_regions_by_hand():
    """5 x 3 tokens and their half, 3 x 2, of masks twice as fine."""
    masks = np.zeros((1, 2, 10, 6), np.float32)
    masks[0, 0, :4, :2] = 1.0  # two tokens high, one wide
    masks[0, 1, :, 3:] = 1.0  # from the middle of the second column
    masks[0, 1, 0, :] = 0.9
    found = region_masks(masks, (5, 3), 2)
    assert list(found) == [15, 6]
    first = np.zeros((5, 3), bool)
    first[:2, 0] = True
    second = np.zeros((5, 3), bool)
    second[:, 2] = True
    second[0, 1] = True  # (0.9 + 0.9 + 0 + 1) / 4
    np.testing.assert_array_equal(found[15], [[first.ravel(), second.ravel()]])
    # Cells of 10/3 x 3: the first fills 10/3 x 2 of one, and 2/3 x 2 of the one below it.
    np.testing.assert_array_equal(
        found[6], [[[True, False, False, False, False, False], [False, True] * 3]]
    )


def test_a_region_without_a_place():
    masks = np.zeros((2, 3, 8, 8), np.float32)
    masks[:, :2] = 1.0
    masks[0, 2] = 1.0
    masks[1, 2, 0, 0] = 1.0
    with pytest.raises(UserError, match="region 3 has no place in the picture"):
        region_masks(masks, (4, 4), 2)
