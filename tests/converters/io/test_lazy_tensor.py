"""Arrays that are read when wanted, copies in C order, threads, hashes of contents."""

import errno
import hashlib
import json
import os
import threading
import time

import ml_dtypes
import numpy as np
import pytest

from fact_convert.io.hashing import content_hash
from fact_convert.io.lazy_tensor import LazyTensor, cast, contiguous, release
from fact_convert.io.parallel import thread_map
from fact_convert.io.safetensors_io import read_safetensors, write_safetensors
from fact_convert.io.torch_io import write_torch_file
from fact_convert.models.training_checkpoint import provenance
from fact_convert.rules.layer_transforms import CONV, LINEAR, POINTWISE
from fact_jax.utils.errors import UserError


def lazy(array, reads=None):
    def read():
        if reads is not None:
            reads.append(1)
        return array

    return LazyTensor(array.shape, array.dtype, read)


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_facts_need_no_reading():
    reads = []
    found = lazy(numbers(3, 4, 5), reads).transpose(2, 0, 1)[None].reshape(5, 12).T.astype("f2")
    assert (found.shape, found.ndim, found.size, len(found)) == ((12, 5), 2, 60, 12)
    assert (found.dtype, found.nbytes) == (np.float16, 120)
    assert reads == []
    wanted = numbers(3, 4, 5).transpose(2, 0, 1)[None].reshape(5, 12).T.astype("f2")
    assert np.array_equal(np.asarray(found), wanted)
    assert found.tolist() == wanted.tolist()
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("leaf", "shape", "ndim"),
    [
        (LINEAR.parameters[0], (6, 4), 2),
        (CONV.parameters[0], (6, 4, 3, 2), 4),
        (POINTWISE.parameters[0], (6, 4, 1, 1), 2),
        (POINTWISE.parameters[0], (6, 4), 4),
        (LINEAR.parameters[1], (6,), 1),
    ],
)
def test_the_rules_turn_what_is_not_read(leaf, shape, ndim):
    array, reads = numbers(*shape), []
    there = leaf.to_jax(lazy(array, reads), ndim)
    back = leaf.to_torch(there, array.ndim)
    assert (back.shape, reads) == (shape, [])
    assert np.array_equal(np.asarray(there), leaf.to_jax(array, ndim))
    assert np.array_equal(np.asarray(back), array)


def test_a_source_that_gives_something_else():
    with pytest.raises(ValueError, match=r"float32 \(2,\), not float32 \(3,\)"):
        np.asarray(LazyTensor((3,), np.dtype("f4"), lambda: numbers(2)))


def test_a_huge_size_does_not_wrap():
    assert LazyTensor((2**40, 2**40), np.dtype("f4"), None).nbytes == 2**82


def test_rounding_waits():
    array = numbers(3)
    assert cast(array, array.dtype, "a") is array
    half = cast(array, np.dtype(ml_dtypes.bfloat16), "a")
    assert isinstance(half, LazyTensor)
    assert np.array_equal(np.asarray(half), array.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((5, 33), (1, 0)),
        ((7, 40, 3, 2), (2, 3, 1, 0)),
        ((3, 2, 40, 7), (3, 2, 0, 1)),
        ((0, 3), (1, 0)),
        ((), ()),
    ],
)
def test_copies_in_c_order(shape, axes):
    view = numbers(*shape).transpose(axes)
    for source in (view, lazy(view)):
        copied = contiguous(source, np.dtype("f2"))
        assert copied.flags.c_contiguous
        assert np.array_equal(copied, view.astype("f2"))


def test_released_memory_is_read_again(tmp_path):
    state = {"a": numbers(300, 200)}
    write_safetensors(tmp_path / "x.safetensors", state, {})
    found = read_safetensors(tmp_path / "x.safetensors")[0]["a"]
    for view in (found, found.T, found[3:], found.reshape(-1)):
        release(view)
        assert np.array_equal(found, state["a"])
    release(numbers(3))


def test_threads_keep_the_order_and_stop_at_an_error():
    assert list(thread_map(lambda n: n * n, range(20))) == [n * n for n in range(20)]
    begun, gate = [], threading.Event()

    def work(number):
        begun.append(number)
        gate.wait(10)
        if number == 0:
            raise OSError("disk full")
        time.sleep(0.001)
        return number

    results = thread_map(work, range(1000))
    gate.set()
    with pytest.raises(OSError, match="disk full"):
        next(results)
    assert len(begun) < 1000


def test_every_tensor_is_read_once(tmp_path):
    reads = []
    state = {"a": lazy(numbers(3, 4), reads).T, "b": lazy(numbers(5), reads)}
    write_safetensors(tmp_path / "x.safetensors", state, {})
    write_torch_file(tmp_path / "x.ckpt", state)
    assert len(reads) == 4


def test_the_hash_is_of_what_is_held():
    one, two = numbers(2, 3), numbers(4).astype(ml_dtypes.bfloat16)
    line = "{} {} {} " + "{}\n"
    text = line.format("a", "float32", "[2, 3]", hashlib.sha256(one.tobytes()).hexdigest())
    text += line.format("b", "bfloat16", "[4]", hashlib.sha256(two.tobytes()).hexdigest())
    known = hashlib.sha256(text.encode()).hexdigest()
    turned = np.asfortranarray(one)
    for state in ({"a": one, "b": two}, {"b": lazy(two), "a": turned}):
        assert content_hash(state) == known
    for state in (
        {"a": one, "c": two},
        {"a": one.reshape(3, 2), "b": two},
        {"a": one, "b": two.astype("f4")},
        {"a": one + 1, "b": two},
        {"a": one},
    ):
        assert content_hash(state) != known


def test_the_hash_joins_the_metadata(tmp_path):
    state = {"a": numbers(2, 3), "b": numbers(3, 2).T, "ü": np.array(True)}
    write_safetensors(tmp_path / "x.safetensors", state, {"ü": "ä"})
    _, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"ü": "ä", "content": content_hash(state)}


def test_where_weights_came_from(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": numbers(3)}, {})
    (tmp_path / "m").mkdir()
    write_safetensors(tmp_path / "m" / "unet" / "model.safetensors", {"b": numbers(3)}, {})
    found = provenance([tmp_path / "x.safetensors", tmp_path / "m"])
    assert set(found) == {"software", "sources"}
    assert found["software"].startswith("fact-jax ")
    assert json.loads(found["sources"]) == [
        hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
        for file in ("x.safetensors", "m/unet/model.safetensors")
    ]


@pytest.mark.parametrize(
    ("number", "hint"), [(1e6, "bfloat16"), (3.4e38, "float32"), (1e300, "float64")]
)
def test_the_precision_that_holds_a_number_is_named(number, hint):
    with pytest.raises(UserError, match=f"too large for float16; {hint} holds them"):
        np.asarray(cast(np.array([1, number]), np.dtype("float16"), "x"))


def test_a_system_without_uncached_writes(tmp_path, monkeypatch):
    """An older Linux refuses the flag of pwritev, macOS any flag."""
    plain, refused = os.pwritev, []

    def pwritev(descriptor, buffers, offset, flags=0):
        if flags:
            refused.append(flags)
            raise errors[len(refused) % 2]
        return plain(descriptor, buffers, offset)

    errors = OSError(errno.EOPNOTSUPP, "Operation not supported"), NotImplementedError()
    monkeypatch.setattr(os, "pwritev", pwritev)
    state = {"a": numbers(3, 4), "b": numbers(5)}
    write_safetensors(tmp_path / "x.safetensors", state, {})
    found, _ = read_safetensors(tmp_path / "x.safetensors")
    assert len(refused) == 2
    assert all(np.array_equal(found[key], state[key]) for key in state)
