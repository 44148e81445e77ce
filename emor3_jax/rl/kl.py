"""KL divergence from the reference: estimators, reward penalty, adaptive coefficient.

With `d = log policy - log reference` of a sampled token:

| name | estimate | |
|---|---|---|
| k1 | `d` | unbiased, of either sign |
| k2 | `d² / 2` | biased, its gradient is that of the KL |
| k3 | `exp(-d) + d - 1` | unbiased, never negative; the release's "low_var_kl" |
| abs | `|d|` | |

k1 to k3: http://joschu.net/blog/kl-approx.html.

Deviations, numbered:
 1. k3 alone is clamped, as in the release: `d` to ±20, the estimate to ±10.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

Estimate = Callable[[jax.Array, jax.Array], jax.Array]


def k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Returns `log policy - log reference` of each token, float32[...].

    Its gradient does not depend on the reference: useful in the reward, not in the loss.

    Args:
      logprobs, ref_logprobs: float32[...], of the sampled tokens.
    """
    return logprobs - ref_logprobs


def k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Returns half the squared difference of each token, float32[...]; arguments as of `k1`."""
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Returns `exp(d) - d - 1` with `d = ref - policy` of each token, float32[...].

    As the release clamps it ("low_var_kl"): `d` to ±20 and the result to ±10. Arguments as of `k1`.
    """
    difference = jnp.clip(ref_logprobs - logprobs, -20.0, 20.0)
    return jnp.clip(jnp.exp(difference) - difference - 1.0, -10.0, 10.0)


def absolute(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Returns the absolute difference of each token, float32[...]; arguments as of `k1`."""
    return jnp.abs(logprobs - ref_logprobs)


ESTIMATES: dict[str, Estimate] = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}
"""Name in the config → estimate."""


def penalty(
    name: str, logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns each response's KL, summed over its tokens, and the mean over all tokens.

    RLOO and REINFORCE++ subtract the sum times the coefficient from a response's reward
    (arXiv 2402.14740, 2501.03262).

    Args:
      name: one of `ESTIMATES`.
      logprobs: float32[B, G, T], under the policy that sampled.
      ref_logprobs: float32[B, G, T], under the reference.
      mask: bool[B, G, T], the response tokens.

    Returns:
      float32[B, G] and float32[].
    """
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    each = jnp.where(mask, ESTIMATES[name](logprobs, ref_logprobs), 0.0).sum(axis=-1)
    return each, each.sum() / jnp.maximum(mask.sum(), 1)


def adapt(
    coefficient: jax.Array | float,
    kl: jax.Array,
    counted: jax.Array | float = 1.0,
    *,
    target: float,
    responses: int,
    horizon: float,
) -> jax.Array:
    """Returns the coefficient of the next step, adapted towards a target KL.

    `β (1 + clip(KL / target - 1, ±0.2) · responses / horizon)` (arXiv 1909.08593, section 2.2).

    Args:
      coefficient: β of this step.
      kl: float32[], mean over the tokens of this step; of NaN the coefficient stays as it is.
      counted: float32[], 0 if no token of this step counted: the coefficient stays too.
      target: target KL in nats per token, above 0.
      responses: number of responses of this step.
      horizon: number of responses over which an error of 20 % or more changes the coefficient by
        20 %.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    # A coefficient that is NaN once would spoil every later update.
    error = jnp.where((counted > 0) & ~jnp.isnan(kl), error, 0.0)
    return coefficient * (1.0 + error * responses / horizon)
