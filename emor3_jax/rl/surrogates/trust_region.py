"""Trust regions of probabilities: a token counts unless its probability has moved too far.

The ratio of a rare token is large where hardly any probability has moved, and that of a frequent
one small where much has. DPPO (arXiv 2602.04879) therefore masks by an estimate of the divergence
between the policy and the one that sampled, which needs the sampled token alone ("binary").

| name | class | a token of a good response is left out if |
|---|---|---|
| dppo_tv | `DppoTv` | `π - μ > clip_high` |
| dppo_kl | `DppoKl` | `π > μ`, and the KL of "this token or another" is over `clip_high` |
| ipo | `Ipo` | `π - μ > clip_high` or `π - μ < -clip_low` |

and of a bad one with the signs changed and `clip_low`. μ is the sampler's probability.

Deviations, numbered:
 1. The mask of IPO does not look at the sign of the advantage, as prime-rl's before DPPO's.
 2. The ratio is bounded by `clip_dual`, for which the authors' program has 20.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from emor3_jax.rl.surrogates.tokens import Metrics, Tokens, log_ratio


@dataclass(frozen=True)
class DppoTv:
    """`-stop_gradient(min(r, clip_dual)) A log π` of the tokens within the trust region.

    Attributes:
      clip_low, clip_high: how far a probability may fall for a bad response and rise for a good
        one.
      clip_dual: upper bound on the ratio.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old", "sampler", "advantages"})
    fields: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high", "clip_dual")
    per_token: ClassVar[bool] = True

    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float = 20.0

    def conflict(self, mean: str) -> str | None:
        """See `Surrogate.conflict`."""
        return None

    def outside(self, policy: jax.Array, sampler: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns where a token has fallen and where it has risen too far, bool[B, G, T] each.

        Args:
          policy, sampler: float32[B, G, T], log-probabilities.
        """
        moved = jnp.exp(policy) - jnp.exp(sampler)
        return moved < -self.clip_low, moved > self.clip_high

    def left_out(self, t: Tokens) -> tuple[jax.Array, jax.Array]:
        """Returns the tokens to leave out since they fell, and since they rose, bool[B, G, T]."""
        used, good = t.weights > 0, t.advantages[..., None] > 0
        low, high = self.outside(jnp.where(used, t.logprobs, 0.0), jnp.where(used, t.sampler, 0.0))
        return low & ~good, high & good

    def __call__(self, t: Tokens) -> tuple[jax.Array, Metrics]:
        """Returns the loss per token, float32[B, G, T], and the shares that are left out."""
        t.require(self.needs)
        low, high = (jax.lax.stop_gradient(x) for x in self.left_out(t))
        weight = jnp.minimum(jnp.exp(jax.lax.stop_gradient(log_ratio(t))), self.clip_dual)
        logprobs = jnp.where((t.weights > 0) & ~(low | high), t.logprobs, 0.0)
        return -weight * t.advantages[..., None] * logprobs, {
            "clip_fraction_low": jnp.sum(t.weights * low),
            "clip_fraction_high": jnp.sum(t.weights * high),
        }


@dataclass(frozen=True)
class DppoKl(DppoTv):
    """As `DppoTv`, by the KL divergence in nats instead of the difference of probabilities."""

    def outside(self, policy: jax.Array, sampler: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `DppoTv.outside`."""
        p, q = jnp.exp(policy), jnp.exp(sampler)
        # Kept over 0, so that a token of probability 1 has a divergence.
        others = jnp.log((1.0 - q + 1e-8) / (1.0 - p + 1e-8))
        divergence = q * (sampler - policy) + (1.0 - q) * others
        return (p < q) & (divergence > self.clip_low), (p > q) & (divergence > self.clip_high)


@dataclass(frozen=True)
class Ipo(DppoTv):
    """As `DppoTv`, but tokens of good and bad responses alike are left out on both sides."""

    def left_out(self, t: Tokens) -> tuple[jax.Array, jax.Array]:
        """See `DppoTv.left_out`."""
        used = t.weights > 0
        return self.outside(jnp.where(used, t.logprobs, 0.0), jnp.where(used, t.sampler, 0.0))
