"""Estimates of the KL, its sum over a response, and the controller of its coefficient, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.rl import kl

LOG2 = np.log(2)


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        # Of a token that the policy likes twice as much as the reference, and half as much.
        ("k1", LOG2, -LOG2),
        ("k2", LOG2**2 / 2, LOG2**2 / 2),
        ("k3", LOG2 - 0.5, 1 - LOG2),
        ("abs", LOG2, LOG2),
    ],
)
def test_estimates_by_hand(name, up, down):
    logprobs = jnp.float32([-1.0, -2.0, -3.0])
    reference = logprobs - jnp.float32([LOG2, -LOG2, 0.0])
    np.testing.assert_allclose(kl.ESTIMATES[name](logprobs, reference), [up, down, 0], atol=1e-6)


def test_estimates_agree_with_the_divergence_in_the_mean():
    """Over the policy's own distribution k1 and k3 are the KL; k2 is it to second order."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=6)
    policy = jax.nn.log_softmax(jnp.float32(logits))
    reference = jax.nn.log_softmax(jnp.float32(logits + 0.05 * rng.normal(size=6)))
    p = jnp.exp(policy)
    exact = jnp.sum(p * (policy - reference))
    for name, tolerance in (("k1", 1e-6), ("k3", 1e-6), ("k2", 2e-2 * float(exact))):
        found = jnp.sum(p * kl.ESTIMATES[name](policy, reference))
        assert found == pytest.approx(float(exact), abs=tolerance)


def test_the_gradient_of_k1_knows_nothing_of_the_reference():
    slopes = {
        name: [jax.grad(kl.ESTIMATES[name])(jnp.float32(-1.0), jnp.float32(r)) for r in (-3, 1)]
        for name in kl.ESTIMATES
    }
    assert slopes["k1"] == [1, 1]
    assert slopes["abs"] == [1, -1]
    assert slopes["k2"] == [2, -2]
    np.testing.assert_allclose(slopes["k3"], [1 - np.exp(-2), 1 - np.exp(2)], rtol=1e-5)


def test_penalty_of_a_response_is_its_sum():
    logprobs = jnp.float32([[[-1.0, -2.0, 9.0], [-1.0, 9.0, 9.0]]])
    reference = jnp.float32([[[-1.5, -1.0, 0.0], [-3.0, 0.0, 0.0]]])
    mask = jnp.asarray([[[1, 1, 0], [1, 0, 0]]], bool)
    each, mean = kl.penalty("k1", logprobs, reference, mask)
    np.testing.assert_allclose(each, [[0.5 - 1.0, 2.0]])
    assert mean == pytest.approx(0.5)
    each, mean = kl.penalty("abs", logprobs, reference, mask)
    np.testing.assert_allclose(each, [[1.5, 2.0]])
    assert mean == pytest.approx(3.5 / 3)


@pytest.mark.parametrize(
    ("seen", "factor"),
    [
        (0.1, 1.0),
        # 10 % over the target, 30 of 300 responses: a hundredth.
        (0.11, 1.01),
        # Held to a fifth.
        (9.0, 1.02),
        (0.0, 0.98),
    ],
)
def test_controller_by_hand(seen, factor):
    found = kl.adapt(0.5, jnp.float32(seen), target=0.1, responses=30, horizon=300.0)
    assert found == pytest.approx(0.5 * factor, rel=1e-5)


def test_a_step_without_tokens_or_with_nan_leaves_the_coefficient():
    how = {"target": 0.1, "responses": 30, "horizon": 300.0}
    assert float(kl.adapt(0.5, jnp.float32(0), jnp.float32(0), **how)) == 0.5
    assert float(kl.adapt(0.5, jnp.float32(jnp.nan), jnp.float32(1), **how)) == 0.5
