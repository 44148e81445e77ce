"""GMPO: the geometric mean of a response's ratios, each clipped first (arXiv 2507.20673).

One ratio far from 1 moves a geometric mean less than an arithmetic one, so the range is wide.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from emor3_jax.rl.surrogates.tokens import Metrics, Tokens, lengths, log_ratio, weighs_by_length


@dataclass(frozen=True)
class Gmpo:
    """`-A exp(mean over the response of the clipped log r)`.

    Where A is over 0 the logarithm of a ratio counts up to `clip_high`, else down to `-clip_low`.

    Attributes:
      clip_low, clip_high: bounds on the logarithm of a ratio; the paper's are 0.4.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old", "advantages"})
    fields: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high")
    per_token: ClassVar[bool] = False

    clip_low: float = 0.4
    clip_high: float = 0.4

    def conflict(self, mean: str) -> str | None:
        """See `Surrogate.conflict`."""
        return weighs_by_length(mean)

    def __call__(self, t: Tokens) -> tuple[jax.Array, Metrics]:
        """Returns the loss, float32[B, G, 1], and the clip fractions of tokens."""
        t.require(self.needs)
        each, advantage = log_ratio(t), t.advantages[..., None]
        good = advantage > 0
        low, high = ~good & (each < -self.clip_low), good & (each > self.clip_high)
        bound = jnp.where(low, -self.clip_low, self.clip_high)
        clipped = jnp.where(low | high, bound, each)
        mean = clipped.sum(axis=-1, keepdims=True) / lengths(t)
        return -advantage * jnp.exp(mean), {
            "clip_fraction_low": jnp.sum(t.weights * low),
            "clip_fraction_high": jnp.sum(t.weights * high),
        }
