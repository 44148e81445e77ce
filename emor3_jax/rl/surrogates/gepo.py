"""GEPO: a response's probability over what its group expects (arXiv 2508.17850).

Deviations, numbered:
 1. The ratio follows the paper's listing; its denominator is an expectation over the responses to
    one prompt, computed in log space so that small probabilities do not underflow.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from emor3_jax.rl.surrogates.clip import Clip
from emor3_jax.rl.surrogates.tokens import Tokens, lengths, log_ratio, weighs_by_length


@dataclass(frozen=True)
class GroupRatio(Clip):
    """The clipped surrogate with a response's probability over its group's expectation (GEPO).

    The ratio is not 1 even for equal policies, so by default only the dual clip bounds it
    (arXiv 2508.17850). Attributes as of `Clip`.
    """

    per_token: ClassVar[bool] = False

    clip_low: float = 1.0
    clip_high: float = math.inf

    def conflict(self, mean: str) -> str | None:
        """See `Surrogate.conflict`."""
        if mean == "seq" and (self.clip_low != 1 or self.clip_high != math.inf):
            return (
                "is not 1 where policies are equal, so that policy_update.clip_low="
                f"{self.clip_low}, policy_update.clip_high={self.clip_high} would clip at once; "
                "set them to 1 and inf"
            )
        return weighs_by_length(mean)

    def log_ratio(self, t: Tokens) -> jax.Array:
        """Returns the logarithm of the ratio, float32[B, G, 1]; groups must be whole."""
        used, count = t.weights > 0, lengths(t)
        old = jnp.where(used, t.old, 0.0).sum(axis=-1, keepdims=True) / count
        counted = jnp.where(used.any(axis=-1, keepdims=True), old, -jnp.inf)
        # The expectation over a group without any counted response is undefined; its weights are 0.
        counted = jnp.where(used.any(axis=(1, 2), keepdims=True), counted, 0.0)
        expected = jax.nn.logsumexp(2 * counted, axis=1, keepdims=True)
        expected -= jax.nn.logsumexp(counted, axis=1, keepdims=True)
        return log_ratio(t).sum(axis=-1, keepdims=True) / count + old - expected
