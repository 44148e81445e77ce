"""A surrogate's loss of a single token, and its slope."""

import jax
import jax.numpy as jnp

from emor3_jax.rl.surrogates import Surrogate, Tokens


def one_token(
    surrogate: Surrogate, ratio: float, advantage: float, old: float = 0.5
) -> tuple[float, float, dict]:
    """Returns loss, its derivative by the log-probability, and metrics.

    Args:
      surrogate: to call.
      ratio: of the policy's probability over the old one.
      advantage: of the response.
      old: probability under the policy that sampled.
    """
    before = jnp.log(jnp.full((1, 1, 1), old))

    def loss(logprobs: jax.Array) -> tuple[jax.Array, dict]:
        tokens = Tokens(
            logprobs,
            old=before,
            sampler=before,
            advantages=jnp.full((1, 1), advantage),
            weights=jnp.ones((1, 1, 1)),
        )
        value, metrics = surrogate(tokens)
        return value.sum(), metrics

    logprobs = jnp.log(jnp.full((1, 1, 1), old * ratio))
    (value, metrics), slope = jax.value_and_grad(loss, has_aux=True)(logprobs)
    return float(value), float(slope.sum()), {name: float(x) for name, x in metrics.items()}
