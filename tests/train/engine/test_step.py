"""One step: by hand, skipped, in bfloat16, with running statistics."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_jax.sharding import make_mesh
from fact_train.config import EMAConfig, OptimizerConfig, TrainConfig
from fact_train.engine.state import make_optimizer, make_state
from fact_train.engine.step import GPU_OPTIONS, TrainStep, compiler_options


class Linear:
    """loss = sum(weight * x), so that the gradient is x; the noise of the step is a metric."""

    def loss(self, trainable, frozen, batch, *, step, keys):
        self.dtypes = {k: v.dtype for k, v in (trainable | frozen).items()}
        loss = jnp.sum(trainable["weight"] * batch["x"]).astype(jnp.float32)
        loss += jnp.sum(trainable["bias"] * frozen["scale"]).astype(jnp.float32)
        return loss, {"noise": jax.random.normal(keys[0]), "seen": step}


class Counting(Linear):
    def loss(self, trainable, frozen, batch, **kwargs):
        loss, metrics = super().loss(trainable, frozen, batch, **kwargs)
        return loss, metrics | {"aux": batch["x"].mean()}

    def state_update(self, trainable, aux):
        return trainable | {"mean": 0.5 * trainable["mean"] + 0.5 * aux}


CONFIG = TrainConfig(
    task="toy",
    steps=10,
    batch_size=1,
    optimizer=OptimizerConfig(learning_rate=0.5, weight_decay=0.1, clip_norm=1e9),
    ema=EMAConfig(decay=0.75, warmup=False),
    options=None,
)
X = np.array([[1.0, -2.0]], np.float32)


def start(task, config=CONFIG, **extra):
    params = {"weight": jnp.array([[4.0, 8.0]]), "bias": jnp.array([1.0]), **extra}
    optimizer = make_optimizer(config.optimizer)
    state = make_state(params, optimizer, config.ema)
    step = TrainStep(task, optimizer, config, make_mesh(config.mesh))
    return step, state, {"scale": jnp.array([3.0])}


def test_a_step_by_hand():
    step, state, frozen = start(Linear())
    state, metrics = step(state, frozen, {"x": X})
    # w - lr (sign(g) + decay w), and no decay for the bias; Adam's bias correction is good to 1e-5
    np.testing.assert_allclose(state.params["weight"], [[3.3, 8.1]], rtol=1e-5)
    np.testing.assert_allclose(state.params["bias"], [0.5], rtol=1e-5)
    np.testing.assert_allclose(state.ema["weight"], [[3.825, 8.025]], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 4.0 - 16.0 + 3.0, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], np.sqrt(1 + 4 + 9), rtol=1e-5)
    assert metrics["learning_rate"] == 0.5
    assert int(state.step) == 1
    assert float(frozen["scale"][0]) == 3.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_skipped_and_counted(value):
    step, state, frozen = start(Linear())
    state, _ = step(state, frozen, {"x": X})
    before = jax.device_get(state)
    for count in (1, 2):
        state, metrics = step(state, frozen, {"x": X * value})
        assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == count
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(state, name))
    assert int(state.step) == 3
    state, metrics = step(state, frozen, {"x": X})
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (2, 0)
    assert not np.array_equal(before.params["weight"], state.params["weight"])


class Poisoning(Linear):
    """Finite loss and gradient, but what the task makes of its weights is no number."""

    def state_update(self, trainable, aux):
        return trainable | {"mean": trainable["mean"] * jnp.nan}


@pytest.mark.parametrize("rate", [0.5, 3e38])
def test_new_weights_that_are_not_finite_are_not_taken(rate):
    """A task's own statistics, and an update whose product with the rate is beyond float32."""
    optimizer = dataclasses.replace(CONFIG.optimizer, learning_rate=rate)
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    task, extra = (Poisoning(), {"mean": jnp.ones(())}) if rate == 0.5 else (Linear(), {})
    step, state, frozen = start(task, config, **extra)
    before = jax.device_get(state)
    state, metrics = step(state, frozen, {"x": X})
    assert np.isfinite(metrics["gradient_norm"])
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 1)
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(state, name))


def test_bfloat16_computes_in_bfloat16_on_float32_masters():
    task = Linear()
    step, state, frozen = start(task, dataclasses.replace(CONFIG, precision="bfloat16"))
    state, metrics = step(state, frozen, {"x": X})
    assert set(task.dtypes.values()) == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert metrics["loss"].dtype == jnp.float32
    # The nearest bfloat16 to 8.1 is 8.125: the master kept what it is.
    np.testing.assert_allclose(state.params["weight"], [[3.3, 8.1]], rtol=1e-5)


@pytest.mark.parametrize(
    ("precision", "expected"), [("float32", "HIGHEST"), ("tf32", "HIGH"), ("bfloat16", "DEFAULT")]
)
def test_products_are_in_the_precision(precision, expected):
    class Product(Linear):
        def loss(self, trainable, frozen, batch, **kwargs):
            product = trainable["weight"].T @ batch["x"].astype(trainable["weight"].dtype)
            return product.sum(), {}

    step, state, frozen = start(Product(), dataclasses.replace(CONFIG, precision=precision))
    text = step.lower(state, frozen, {"x": X}).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    dtype = "bf16" if precision == "bfloat16" else "f32"
    for line in products:
        assert f"precision = [{expected}, {expected}]" in line
        assert line.rstrip().endswith(f"{dtype}>")


def test_running_statistics_are_updated_and_stay_at_a_skip():
    step, state, frozen = start(Counting(), mean=jnp.zeros(()))
    state, metrics = step(state, frozen, {"x": X})
    assert float(state.params["mean"]) == -0.25
    assert "aux" not in metrics
    state, _ = step(state, frozen, {"x": X * np.nan})
    assert float(state.params["mean"]) == -0.25


def test_randomness_is_the_seed_and_the_step():
    step, state, frozen = start(Linear())
    state, first = step(state, frozen, {"x": X})
    _, second = step(state, frozen, {"x": X})
    key = jax.random.key(CONFIG.seed)
    for number, metrics in enumerate((first, second)):
        (first_sample,) = jax.random.split(jax.random.fold_in(key, number), CONFIG.batch_size)
        assert metrics["noise"] == jax.random.normal(first_sample)
        assert metrics["seen"] == number


def test_the_program_grows_with_the_parameters_and_not_with_their_square():
    """Whether all is finite is computed once, not again beside every array that it decides on."""
    many = {f"gate{i}": jnp.zeros(()) for i in range(20)}
    step, state, frozen = start(Linear(), **many)
    text = step.lower(state, frozen, {"x": X}).compile().as_text()
    assert text.count(" is-finite(") < 2 * len(jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("platform", "devices", "flags", "options"),
    [
        ("gpu", 8, "", GPU_OPTIONS),
        ("gpu", 8, "--xla_gpu_enable_latency_hiding_scheduler=false", None),
        ("gpu", 1, "", None),
        ("tpu", 8, "", None),
    ],
)
def test_options_of_the_compiler(platform, devices, flags, options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    row = np.array([types.SimpleNamespace(platform=platform)] * devices)
    assert compiler_options(types.SimpleNamespace(devices=row, size=devices)) == options


def test_seeds_share_one_program():
    texts, noises = [], []
    for seed in (1, 2**31 - 5):
        config = dataclasses.replace(CONFIG, seed=seed)
        step, state, frozen = start(Linear(), config)
        texts.append(step.lower(state, frozen, {"x": X}).as_text())
        noises.append(float(step(state, frozen, {"x": X})[1]["noise"]))
        key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), 1)[0]
        assert noises[-1] == pytest.approx(float(jax.random.normal(key)), rel=1e-6)
    assert texts[0] == texts[1]
    assert noises[0] != noises[1]
