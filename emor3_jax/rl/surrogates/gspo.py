"""GSPO: one ratio for each response, the geometric mean over its tokens (arXiv 2507.18071)."""

from dataclasses import dataclass
from typing import ClassVar

import jax

from emor3_jax.rl.surrogates.clip import Clip
from emor3_jax.rl.surrogates.tokens import Tokens, lengths, log_ratio, weighs_by_length


@dataclass(frozen=True)
class SequenceRatio(Clip):
    """The clipped surrogate with one ratio per response, the geometric mean over its tokens (GSPO).

    The default clip range is the paper's (arXiv 2507.18071). Attributes as of `Clip`.
    """

    per_token: ClassVar[bool] = False

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def conflict(self, mean: str) -> str | None:
        """See `Surrogate.conflict`."""
        if mean == "seq" and max(self.clip_low, self.clip_high) > 0.1:
            return (
                "is a mean over tokens, close to 1, which the range of single tokens "
                f"policy_update.clip_low={self.clip_low}, policy_update.clip_high={self.clip_high} "
                "would never clip; set both to at most 0.1 (the paper's are 3e-4 and 4e-4)"
            )
        return weighs_by_length(mean)

    def log_ratio(self, t: Tokens) -> jax.Array:
        """Returns the logarithm of the ratio, float32[B, G, 1]."""
        return log_ratio(t).sum(axis=-1, keepdims=True) / lengths(t)
