"""Correction of the mismatch between sampler and learner, by importance sampling.

The sampler's programs round otherwise than the learner's, and a quantised one has another policy:
its log-probability log μ of a token differs from the learner's log π_old of the same weights. The
surrogate of a token is multiplied by an estimate of `w = π_old / μ`:

| name | weight | |
|---|---|---|
| token_truncate | `clip(w_t, low, high)` of each token | TIS |
| token_mask | `w_t` within [low, high], else 0 | IcePop, arXiv 2510.18855 |
| sequence_truncate | `clip(Π w_t, low, high)` of the response | TIS |
| sequence_mask | `Π w_t` within [low, high], else 0 | MIS |
| geometric_mask | `w_t`; 0 for a response whose `(Π w_t)^(1/T)` is outside [low, high] | MIS |

TIS: https://fengyao.notion.site/off-policy-rl. MIS, masked importance sampling: TRL's default.

Deviations, numbered:
 1. In "geometric_mask" the tokens that are kept have their own weight, without a bound: the mask
    bounds their mean.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from emor3_jax.rl.surrogates.tokens import Metrics, Tokens, lengths

CORRECTIONS = (
    *("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"),
)
"""Names of the correction in the config."""


@dataclass(frozen=True)
class Correction:
    """A weight for each token, from the log-probabilities of learner and sampler.

    Attributes:
      kind: one of `CORRECTIONS`.
      low, high: bounds of the weight, or of what is masked.
    """

    kind: str
    low: float = 0.0
    high: float = 2.0

    def __call__(self, t: Tokens) -> tuple[jax.Array, Metrics]:
        """Returns the weights, float32[B, G, T] or [B, G, 1], and the share of tokens masked.

        Args:
          t: `old`, recomputed by the learner, and `sampler` are read; no gradient flows.
        """
        t.require(frozenset({"old", "sampler"}))
        used = t.weights > 0
        gap = jnp.where(used, jnp.clip(t.old - t.sampler, -20.0, 20.0), 0.0)
        gap = jax.lax.stop_gradient(gap)
        level, action = self.kind.split("_")
        total = gap.sum(axis=-1, keepdims=True)
        measured = {"token": gap, "sequence": total, "geometric": total / lengths(t)}[level]
        measured = jnp.exp(jnp.clip(measured, -20.0, 20.0))
        if action == "truncate":
            return jnp.clip(measured, self.low, self.high), {}
        kept = (measured >= self.low) & (measured <= self.high)
        weight = jnp.exp(gap) if level == "geometric" else measured
        masked = jnp.sum(t.weights * jnp.broadcast_to(~kept, used.shape))
        return jnp.where(kept, weight, 0.0), {"correction_masked": masked}


def mismatch(old: jax.Array, sampler: jax.Array, mask: jax.Array) -> Metrics:
    """Returns how far the sampler is from the learner, over the tokens of a step.

    Args:
      old: float32[B, G, T], log-probabilities by the learner, of the policy that sampled.
      sampler: float32[B, G, T], as recorded by the sampler.
      mask: bool[B, G, T], the response tokens.

    Returns:
      float32[] each: `sampler_gap` and `sampler_gap_max`, mean and largest difference of two
      log-probabilities in nats, and `sampler_ess`, the effective sample size as a share of the
      tokens, `(Σ w)² / (N Σ w²)` of their weights `w`.
    """
    gap = jnp.where(mask, old - sampler, 0.0)
    count = jnp.maximum(jnp.sum(mask), 1)
    weight = jnp.where(mask, jnp.exp(jnp.clip(gap, -20.0, 20.0)), 0.0)
    squares = jnp.maximum(jnp.sum(weight**2), 1e-9)
    return {
        "sampler_gap": jnp.sum(jnp.abs(gap)) / count,
        "sampler_gap_max": jnp.max(jnp.abs(gap)),
        "sampler_ess": jnp.sum(weight) ** 2 / (count * squares),
    }
