"""The clipped policy loss with a KL penalty, as pure functions of per-token arrays.

The ratio of token t of response i, with `d` the difference of policy and old policy in the
logarithm, and `p_i`, `q_i` the geometric means of their probabilities over the response:

| name | ratio | paper |
|---|---|---|
| token | `exp(d_t)` | GRPO, arXiv 2402.03300 |
| sequence | `exp(mean of d over the response) = p_i / q_i` | GSPO, arXiv 2507.18071 |
| group | `p_i / (Σ q_j² / Σ q_j)`, summed over the group | GEPO, arXiv 2508.17850 |

How tokens are averaged, every token of weight 1 / N:

| name | N | paper |
|---|---|---|
| token | tokens of the batch | DAPO, arXiv 2503.14476 |
| seq | tokens of the response, times responses of the batch | GRPO |
| constant | T, the most tokens of any response, times responses | Dr. GRPO, arXiv 2503.20783 |

Deviations, numbered:
 1. The release averages over each micro-batch and then over micro-batches, so a token of a short
    micro-batch weighs more. Here a token's weight is fixed over the whole update batch before it
    is cut into micro-batches (`token_weights`), so any micro-batch size gives the same gradient.
 2. Clip fractions are told apart by cause: `clip_fraction_low` counts ratios under `1 - clip_low`,
    `clip_fraction_high` ratios over `1 + clip_high`, each where the clip binds, and
    `clip_fraction_dual` tokens held by the dual clip.
 3. The group's ratio is that of the paper's listing; its denominator is an expectation over the
    responses to one prompt, in logarithms so that small probabilities do not vanish.
 4. A response that is left out (DAPO's masking of truncated ones) counts neither among the tokens
    nor among the responses of a mean; the constant mean counts it, being constant.
"""

import math

import chex
import jax
import jax.numpy as jnp

from emor3_jax.rl import kl as kls

RATIOS = ("token", "sequence", "group")
"""Names of the ratio in the config."""

MEANS = ("token", "seq", "constant")
"""Names of the mean in the config."""


def token_weights(mask: jax.Array, mean: str = "token", *, limit: int | None = None) -> jax.Array:
    """Returns the weight of each token in the loss.

    Args:
      mask: bool[B, G, T], the tokens that count, the end-of-sequence token included.
      mean: "token" (every token of the batch alike), "seq" (mean within each response first), or
        "constant" (a token's weight depends on nothing, so that no length is favoured).
      limit: for "constant", the most tokens that a response may have; None is T.

    Returns:
      float32[B, G, T]; the weights sum to 1 over the batch, of "constant" to at most 1.

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
    if mean == "constant":
        b, g, t = mask.shape
        return mask / (b * g * (limit or t))
    raise ValueError(f"mean={mean!r}: must be one of {', '.join(MEANS)}")


def imitation_loss(logprobs: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the negative log-likelihood of given responses, float32[].

    Args:
      logprobs: float32[B, G, T], under the policy.
      weights: float32[B, G, T] from `token_weights`, 0 where there is no token.
    """
    chex.assert_equal_shape([logprobs, weights])
    return -jnp.sum(jnp.where(weights > 0, weights * logprobs, 0.0))


def log_ratio(
    logprobs: jax.Array, old_logprobs: jax.Array, used: jax.Array, ratio: str = "token"
) -> jax.Array:
    """Returns the logarithm of the ratio that each token's advantage is weighed by.

    Args:
      logprobs: float32[B, G, T], under the policy that is being updated.
      old_logprobs: float32[B, G, T], under the policy that sampled.
      used: bool[B, G, T], the tokens that count; whole groups.
      ratio: "token", "sequence" or "group", see the module.

    Returns:
      float32[B, G, T]; float32[B, G, 1], the same for all tokens, of "sequence" and "group".

    Raises:
      ValueError: if `ratio` is unknown.
    """
    # A padded position holds no probability: its difference is set to 0 before any exp.
    difference = jnp.where(used, jnp.clip(logprobs - old_logprobs, -20.0, 20.0), 0.0)
    if ratio == "token":
        return difference
    lengths = jnp.maximum(used.sum(axis=-1, keepdims=True), 1)
    if ratio == "sequence":
        return difference.sum(axis=-1, keepdims=True) / lengths
    if ratio == "group":
        old = jnp.where(used, old_logprobs, 0.0).sum(axis=-1, keepdims=True) / lengths
        among = jnp.where(used.any(axis=-1, keepdims=True), old, -jnp.inf)
        # A group none of whose responses counts has no expectation, nor any weight.
        among = jnp.where(used.any(axis=(1, 2), keepdims=True), among, 0.0)
        expected = jax.nn.logsumexp(2 * among, axis=1, keepdims=True)
        expected -= jax.nn.logsumexp(among, axis=1, keepdims=True)
        return difference.sum(axis=-1, keepdims=True) / lengths + old - expected
    raise ValueError(f"ratio={ratio!r}: must be one of {', '.join(RATIOS)}")


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    weights: jax.Array,
    *,
    ref_logprobs: jax.Array | None = None,
    ratio: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    clip_dual: float = 3.0,
    kl: str = "k3",
    kl_coef: jax.Array | float = 1e-2,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss of a batch of responses and what to log about it.

    Per token, with ratio `r` and advantage `A`: `max(-A r, -A clip(r, 1 - low, 1 + high))`, for
    `A < 0` at most `-A * clip_dual`; plus `kl_coef` times the KL estimate (paper: the
    group-relative objective; release: `compute_policy_loss`, `compute_kl`).

    Args:
      logprobs: float32[B, G, T], under the policy that is being updated.
      old_logprobs: float32[B, G, T], under the policy that sampled.
      advantages: float32[B, G].
      weights: float32[B, G, T] from `token_weights`, 0 where there is no token. For a micro-batch
        pass its part of the whole batch's weights: losses and metrics then add up.
      ref_logprobs: float32[B, G, T], under the reference; None leaves the KL term out.
      ratio: see `log_ratio`.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      clip_dual: bound on the ratio for negative advantages, over 1 (arXiv 1912.09729); infinite is
        none.
      kl: which estimate of the KL, of `kl.ESTIMATES`.
      kl_coef: weight of the KL term.

    Returns:
      The loss, float32[], and metrics (weighted sums, float32[]): `loss`, `kl`,
      `clip_fraction_low`, `clip_fraction_high`, `clip_fraction_dual`.
    """
    chex.assert_equal_shape([logprobs, old_logprobs, weights])
    chex.assert_shape(advantages, logprobs.shape[:2])
    used = weights > 0
    r = jnp.exp(log_ratio(logprobs, old_logprobs, used, ratio))
    advantage = advantages[..., None]
    plain = -advantage * r
    clipped = -advantage * jnp.clip(r, 1.0 - clip_low, 1.0 + clip_high)
    per_token = upper = jnp.maximum(plain, clipped)
    held = jnp.zeros_like(upper, bool)
    if math.isfinite(clip_dual):
        bound = -advantage * clip_dual
        per_token = jnp.where(advantage < 0, jnp.minimum(upper, bound), upper)
        held = (advantage < 0) & (upper > bound)
    binds = plain < clipped
    metrics = {
        "clip_fraction_low": jnp.sum(weights * (binds & (r < 1.0))),
        "clip_fraction_high": jnp.sum(weights * (binds & (r > 1.0))),
        "clip_fraction_dual": jnp.sum(weights * held),
    }
    if ref_logprobs is None:
        metrics["kl"] = jnp.zeros(())
    else:
        estimate = jnp.where(used, kls.ESTIMATES[kl](logprobs, ref_logprobs), 0.0)
        per_token = per_token + kl_coef * estimate
        metrics["kl"] = jnp.sum(weights * estimate)
    loss = jnp.sum(weights * per_token)
    return loss, {"loss": loss, **metrics}
