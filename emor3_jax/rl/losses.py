"""The clipped policy loss with a KL penalty, as pure functions of per-token arrays.

Deviations, numbered:
 1. The release averages over each micro-batch and then over micro-batches, so a token of a short
    micro-batch weighs more. Here a token's weight is fixed over the whole update batch before it
    is cut into micro-batches (`token_weights`), so any micro-batch size gives the same gradient.
 2. Clip fractions are told apart by cause: `clip_fraction_low` counts ratios under `1 - clip_low`,
    `clip_fraction_high` ratios over `1 + clip_high`, each where the clip binds, and
    `clip_fraction_dual` tokens held by the dual clip.
"""

import chex
import jax
import jax.numpy as jnp


def token_weights(mask: jax.Array, mean: str = "token") -> jax.Array:
    """Returns the weight of each token in the loss; the weights sum to 1 over the batch.

    Args:
      mask: bool[B, G, T], the response tokens, the end-of-sequence token included.
      mean: "token" (every token of the batch alike) or "seq" (mean within each response first).

    Returns:
      float32[B, G, T].

    Raises:
      ValueError: if `mean` is unknown.
    """
    chex.assert_rank(mask, 3)
    mask = mask.astype(jnp.float32)
    if mean == "token":
        return mask / jnp.maximum(mask.sum(), 1.0)
    if mean == "seq":
        lengths = mask.sum(axis=-1, keepdims=True)
        responses = jnp.maximum((lengths > 0).sum(), 1)
        return mask / jnp.maximum(lengths, 1.0) / responses
    raise ValueError(f"mean={mean!r}: must be 'token' or 'seq'")


def low_variance_kl(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Returns the k3 estimate of KL(policy ‖ reference) of each token (release: "low_var_kl").

    `exp(d) - d - 1` with `d = ref - policy` clamped to ±20 and the result to ±10
    (http://joschu.net/blog/kl-approx.html).

    Args:
      logprobs, ref_logprobs: float32[...], of the sampled tokens.
    """
    difference = jnp.clip(ref_logprobs - logprobs, -20.0, 20.0)
    return jnp.clip(jnp.exp(difference) - difference - 1.0, -10.0, 10.0)


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    weights: jax.Array,
    *,
    ref_logprobs: jax.Array | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    clip_dual: float = 3.0,
    kl_coef: float = 1e-2,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss of a batch of responses and what to log about it.

    Per token, with ratio `r = exp(logp - old)` and advantage `A`: `max(-A r, -A clip(r, 1 - low,
    1 + high))`, for `A < 0` at most `-A * clip_dual`; plus `kl_coef` times `low_variance_kl`
    (paper: the group-relative objective; release: `compute_policy_loss`, `compute_kl`).

    Args:
      logprobs: float32[B, G, T], under the policy that is being updated.
      old_logprobs: float32[B, G, T], under the policy that sampled.
      advantages: float32[B, G].
      weights: float32[B, G, T] from `token_weights`, 0 where there is no token. For a micro-batch
        pass its part of the whole batch's weights: losses and metrics then add up.
      ref_logprobs: float32[B, G, T], under the reference; None leaves the KL term out.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      clip_dual: bound on the ratio for negative advantages, over 1.
      kl_coef: weight of the KL term.

    Returns:
      The loss, float32[], and metrics (weighted sums, float32[]): `loss`, `kl`,
      `clip_fraction_low`, `clip_fraction_high`, `clip_fraction_dual`.
    """
    chex.assert_equal_shape([logprobs, old_logprobs, weights])
    chex.assert_shape(advantages, logprobs.shape[:2])
    used = weights > 0
    # A padded position holds no probability: its difference is set to 0 before any exp.
    difference = jnp.where(used, jnp.clip(logprobs - old_logprobs, -20.0, 20.0), 0.0)
    ratio = jnp.exp(difference)
    advantage = advantages[..., None]
    plain = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    upper = jnp.maximum(plain, clipped)
    bound = -advantage * clip_dual
    per_token = jnp.where(advantage < 0, jnp.minimum(upper, bound), upper)
    binds = plain < clipped
    metrics = {
        "clip_fraction_low": jnp.sum(weights * (binds & (ratio < 1.0))),
        "clip_fraction_high": jnp.sum(weights * (binds & (ratio > 1.0))),
        "clip_fraction_dual": jnp.sum(weights * ((advantage < 0) & (upper > bound))),
    }
    if ref_logprobs is None:
        metrics["kl"] = jnp.zeros(())
    else:
        kl = jnp.where(used, low_variance_kl(logprobs, ref_logprobs), 0.0)
        per_token = per_token + kl_coef * kl
        metrics["kl"] = jnp.sum(weights * kl)
    loss = jnp.sum(weights * per_token)
    return loss, {"loss": loss, **metrics}
