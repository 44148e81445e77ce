"""SAPO: a soft gate instead of a clip, steeper for bad responses (arXiv 2511.20347)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from emor3_jax.rl.surrogates.tokens import Metrics, Tokens, log_ratio


@dataclass(frozen=True)
class Sapo:
    """`-A (4 / τ) σ(τ (r - 1))`, whose slope at r = 1 is that of the ratio itself.

    Attributes:
      sapo_positive, sapo_negative: the temperature τ where the advantage is over 0, and elsewhere;
        the higher one lets ratios far from 1 count less.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old", "advantages"})
    fields: ClassVar[tuple[str, ...]] = ("sapo_positive", "sapo_negative")
    per_token: ClassVar[bool] = True

    sapo_positive: float = 1.0
    sapo_negative: float = 1.05

    def conflict(self, mean: str) -> str | None:
        """See `Surrogate.conflict`."""
        return None

    def __call__(self, t: Tokens) -> tuple[jax.Array, Metrics]:
        """Returns the loss per token, float32[B, G, T], and the mean slope of the gate."""
        t.require(self.needs)
        r, advantage = jnp.exp(log_ratio(t)), t.advantages[..., None]
        temperature = jnp.where(advantage > 0, self.sapo_positive, self.sapo_negative)
        gate = jax.nn.sigmoid(temperature * (r - 1.0))
        slope = 4.0 * gate * (1.0 - gate)
        return -advantage * gate * 4.0 / temperature, {"gate": jnp.sum(t.weights * slope)}
