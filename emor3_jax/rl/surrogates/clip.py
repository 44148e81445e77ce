"""PPO's clipped surrogate, with a ratio for each token."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from emor3_jax.rl.surrogates.tokens import Metrics, Tokens, log_ratio


@dataclass(frozen=True)
class Clip:
    """PPO's clipped surrogate with a ratio per token (GRPO, arXiv 2402.03300).

    With ratio `r` and advantage `A`: `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`, and at
    most `-A * clip_dual` where `A < 0` (release: `compute_policy_loss`).

    Attributes:
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      clip_dual: upper bound on the ratio for negative advantages, above 1 (arXiv 1912.09729);
        infinite disables it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old", "advantages"})
    fields: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high", "clip_dual")
    per_token: ClassVar[bool] = True

    clip_low: float = 0.2
    clip_high: float = 0.3
    clip_dual: float = 3.0

    def conflict(self, mean: str) -> str | None:
        """See `Surrogate.conflict`."""
        return None

    def log_ratio(self, t: Tokens) -> jax.Array:
        """Returns the logarithm of the ratio, float32[B, G, T] or [B, G, 1] (one per response)."""
        return log_ratio(t)

    def __call__(self, t: Tokens) -> tuple[jax.Array, Metrics]:
        """Returns the loss per token, float32[B, G, T] or [B, G, 1], and the clip fractions."""
        t.require(self.needs)
        r = jnp.exp(self.log_ratio(t))
        advantage = t.advantages[..., None]
        plain = -advantage * r
        clipped = -advantage * jnp.clip(r, 1.0 - self.clip_low, 1.0 + self.clip_high)
        per_token = upper = jnp.maximum(plain, clipped)
        bounded = jnp.zeros_like(upper, bool)
        if math.isfinite(self.clip_dual):
            bound = -advantage * self.clip_dual
            per_token = jnp.where(advantage < 0, jnp.minimum(upper, bound), upper)
            bounded = (advantage < 0) & (upper > bound)
        active = plain < clipped
        return per_token, {
            "clip_fraction_low": jnp.sum(t.weights * (active & (r < 1.0))),
            "clip_fraction_high": jnp.sum(t.weights * (active & (r > 1.0))),
            "clip_fraction_dual": jnp.sum(t.weights * bounded),
        }
