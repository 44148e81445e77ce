"""The optimizer step: micro-batches, clipping, the guard, frozen parameters."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from emor3_jax.rl.update import (
    TrainState,
    add_gradients,
    apply_gradients,
    combine,
    make_optimizer,
    partition,
)


@pytest.fixture
def params():
    return {"visual": {"w": jnp.float32([1.0, -2.0])}, "model": {"w": jnp.float32([[3.0], [0.5]])}}


def ones(params):
    return jax.tree.map(jnp.ones_like, params)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 12])
def test_any_cut_gives_the_same_gradient(params, count):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(12, 2)), jnp.float32)
    weight = jnp.asarray(rng.uniform(size=12), jnp.float32)
    weight /= weight.sum()

    def loss(params, batch):
        x, weight = batch
        out = jnp.tanh(x * params["visual"]["w"]) @ params["model"]["w"]
        return jnp.sum(weight * out[:, 0] ** 2), {"seen": jnp.sum(weight)}

    whole, _ = jax.grad(loss, has_aux=True)(params, (x, weight))
    micro = jax.tree.map(lambda a: a.reshape(count, 12 // count, *a.shape[1:]), (x, weight))
    grads, seen = jax.tree.map(jnp.zeros_like, params), 0.0
    for i in range(count):
        part = jax.tree.map(lambda a, i=i: a[i], micro)
        grads, metrics = add_gradients(loss, grads, params, part)
        seen += metrics["seen"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grads, whole)
    assert seen == pytest.approx(1.0)


def test_first_step_by_hand(params):
    """Adam's first step is the sign of the gradient; decay is decoupled and on every parameter."""
    optimizer = make_optimizer(0.1, weight_decay=0.01, max_grad_norm=1.0)
    state = TrainState.create(params, optimizer)
    grads = {"visual": {"w": jnp.float32([3.0, -4.0])}, "model": {"w": jnp.zeros((2, 1))}}
    state, metrics = apply_gradients(state, grads, optimizer)
    assert metrics["grad_norm"] == pytest.approx(5.0) and metrics["skipped"] == 0
    assert state.updates == 1
    np.testing.assert_allclose(
        state.params["visual"]["w"], [1 - 0.1 - 0.001, -2 + 0.1 + 0.002], rtol=1e-5
    )
    np.testing.assert_allclose(state.params["model"]["w"], [[3 - 0.003], [0.5 - 0.0005]], rtol=1e-5)
    # The gradient that Adam saw had norm 1: (0.6, -0.8).
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (2,)]
    np.testing.assert_allclose(moments[0], [0.06, -0.08], rtol=1e-5)


def test_a_small_gradient_is_not_scaled(params):
    optimizer = make_optimizer(0.1, max_grad_norm=1.0)
    state = TrainState.create(params, optimizer)
    grads = jax.tree.map(lambda x: x * 0.1, ones(params))
    state, _ = apply_gradients(state, grads, optimizer)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (2,)]
    np.testing.assert_allclose(moments[0], [0.01, 0.01], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(params, bad):
    optimizer = make_optimizer(lambda count: 0.1 / (count + 1))
    state = TrainState.create(params, optimizer)
    state, _ = apply_gradients(state, ones(params), optimizer)
    grads = ones(params)
    grads["visual"]["w"] = grads["visual"]["w"].at[1].set(bad)
    step = jax.jit(lambda s, g: apply_gradients(s, g, optimizer))
    after, metrics = step(state, grads)
    assert metrics["skipped"] == 1 and not np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after, state)
    # And training goes on from there.
    after, metrics = step(after, ones(params))
    assert metrics["skipped"] == 0 and after.updates == 2
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))


def test_frozen_parameters_stay(params):
    optimizer = make_optimizer(0.1, frozen=lambda path: path[0].key == "visual")
    state = TrainState.create(params, optimizer)
    for _ in range(2):
        state, _ = apply_gradients(state, ones(params), optimizer)
    np.testing.assert_array_equal(state.params["visual"]["w"], params["visual"]["w"])
    assert np.all(state.params["model"]["w"] < params["model"]["w"])


def test_frozen_parameters_need_no_gradient_and_have_no_moments(params):
    def frozen(path: tuple) -> bool:
        return path[0].key == "visual"

    trained, held = partition(params, frozen)
    assert trained["visual"]["w"] is None and held["model"]["w"] is None
    jax.tree.map(np.testing.assert_array_equal, combine(trained, held), params)
    assert combine(*partition(params, None)) == params
    optimizer = make_optimizer(0.1, max_grad_norm=1.0, frozen=frozen)
    state = TrainState.create(params, optimizer)
    assert {x.shape for x in jax.tree.leaves(state.opt_state)} == {(2, 1), ()}
    grads = {"visual": {"w": None}, "model": {"w": jnp.float32([[3.0], [4.0]])}}
    after, metrics = apply_gradients(state, grads, optimizer)
    assert metrics["grad_norm"] == pytest.approx(5.0)
    np.testing.assert_array_equal(after.params["visual"]["w"], params["visual"]["w"])
    # The same as with any gradient of the frozen ones, but for the norm.
    full = grads | {"visual": {"w": jnp.float32([12.0, 0.0])}}
    other, metrics = apply_gradients(state, full, optimizer)
    assert metrics["grad_norm"] == pytest.approx(13.0)
    jax.tree.map(np.testing.assert_array_equal, after, other)


def test_a_first_moment_in_bfloat16_by_hand():
    optimizer = make_optimizer(0.1, weight_decay=0.0, mu_dtype="bfloat16")
    state = TrainState.create({"w": jnp.float32([1.0])}, optimizer)
    # Rounded once kept, and 9/10 of it once more.
    first = np.float32(0.03).astype(ml_dtypes.bfloat16)
    second = (0.1 * 0.2 + np.float32(first * ml_dtypes.bfloat16(0.9))) / (1 - 0.9**2)
    size = np.sqrt((0.001 * 0.2**2 + 0.999 * 0.001 * 0.3**2) / (1 - 0.999**2))
    for gradient, wanted in ((0.3, 0.9), (0.2, 0.9 - 0.1 * second / size)):
        state, _ = apply_gradients(state, {"w": jnp.float32([gradient])}, optimizer)
        assert state.params["w"][0] == pytest.approx(wanted, rel=1e-5)
    kinds = {x.dtype for x in jax.tree.leaves(state.opt_state) if x.shape}
    assert kinds == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    # It moves the parameter by a percent of its step at most.
    assert second == pytest.approx((0.1 * 0.2 + 0.9 * 0.03) / (1 - 0.9**2), rel=0.01)


def test_a_second_moment_in_bfloat16_would_not_decay():
    """So it stays in float32: a tenth of a percent is less than half the last bit."""
    adam, gradient = optax.scale_by_adam(b2=0.999), jnp.zeros(1)
    for dtype, left in ((jnp.float32, 0.999**100), (jnp.bfloat16, 1.0)):
        state = adam.init(gradient)._replace(nu=jnp.ones(1, dtype))
        for _ in range(100):
            _, state = adam.update(gradient, state)
        assert state.nu.dtype == dtype and state.nu[0] == pytest.approx(left, rel=1e-4)


def test_rates_of_groups_by_hand(params):
    """The first step is the rate times the sign of the gradient, decay scaled alike."""
    optimizer = make_optimizer(
        0.1, weight_decay=0.01, rate_of=lambda path: 0.5 if path[0].key == "visual" else 2.0
    )
    state, _ = apply_gradients(TrainState.create(params, optimizer), ones(params), optimizer)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, params)
    np.testing.assert_allclose(moved["visual"]["w"], [-0.05 - 0.0005, -0.05 + 0.001], rtol=1e-4)
    np.testing.assert_allclose(moved["model"]["w"], [[-0.2 - 0.006], [-0.2 - 0.001]], rtol=1e-4)
