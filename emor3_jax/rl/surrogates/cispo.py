"""CISPO: the clipped ratio is a weight of the log-probability, so that no token is left out.

MiniMax-M1, arXiv 2506.13585; ScaleRL, arXiv 2510.13786, takes an upper bound of 5 on the ratio.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from emor3_jax.rl.surrogates.tokens import Metrics, Tokens, log_ratio


@dataclass(frozen=True)
class Cispo:
    """`-stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A log π`, with a ratio per token.

    Attributes:
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; a `clip_low` of 1
        leaves it without a lower bound, as in the paper.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old", "advantages"})
    fields: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high")
    per_token: ClassVar[bool] = True

    clip_low: float = 1.0
    clip_high: float = 4.0

    def conflict(self, mean: str) -> str | None:
        """See `Surrogate.conflict`."""
        return None

    def __call__(self, t: Tokens) -> tuple[jax.Array, Metrics]:
        """Returns the loss per token, float32[B, G, T], and the clip fractions."""
        t.require(self.needs)
        r = jnp.exp(log_ratio(t))
        low, high = 1.0 - self.clip_low, 1.0 + self.clip_high
        weight = jax.lax.stop_gradient(jnp.clip(r, low, high))
        logprobs = jnp.where(t.weights > 0, t.logprobs, 0.0)
        return -weight * t.advantages[..., None] * logprobs, {
            "clip_fraction_low": jnp.sum(t.weights * (r < low)),
            "clip_fraction_high": jnp.sum(t.weights * (r > high)),
        }
