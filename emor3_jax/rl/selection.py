"""Selection of tokens by the policy's entropy, or by what they do to it.

| name | selected tokens | what becomes of them | paper |
|---|---|---|---|
| top_entropy | the share of highest entropy | they alone have a surrogate | arXiv 2506.01939 |
| clip_cov | a random share, of covariances within bounds | they have none | arXiv 2505.22617 |
| kl_cov | the share of highest covariance | `coef · |log r|` is added | arXiv 2505.22617 |

The covariance of a token is `(A - mean A) (log π - mean log π)`, with means over tokens: where it
is large, the update lowers the entropy.

Deviations, numbered:
 1. Tokens are selected once for each update, among all of its tokens, by the policy that sampled:
    the papers' programs select within each micro-batch, by the policy as it is by then. At the
    first update of a step these are the same policy, and here no selection depends on the size of
    a micro-batch.
 2. For the same reason "clip_cov" does not leave out of its draw what the ratio clips.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

SELECTIONS = ("top_entropy", "clip_cov", "kl_cov")
"""Names of the selection in the config."""


@dataclass(frozen=True)
class Selection:
    """A choice of tokens.

    Attributes:
      kind: one of `SELECTIONS`.
      share: of the tokens of an update, in (0, 1]; at least one token is selected.
      low, high: bounds of the covariance, for "clip_cov".
      coef: weight of the penalty, for "kl_cov".
    """

    kind: str
    share: float
    low: float = 1.0
    high: float = 5.0
    coef: float = 1.0

    def __call__(
        self,
        mask: jax.Array,
        logprobs: jax.Array,
        advantages: jax.Array,
        entropy: jax.Array | None,
        key: jax.Array,
    ) -> jax.Array:
        """Returns the selected tokens of an update, bool[B, G, T].

        Args:
          mask: bool[B, G, T], the tokens that count.
          logprobs: float32[B, G, T], under the policy that sampled.
          advantages: float32[B, G].
          entropy: float32[B, G, T], of the distributions they were drawn from; "top_entropy" alone
            reads it.
          key: PRNG key; "clip_cov" alone reads it.
        """
        if self.kind == "top_entropy":
            return _top(entropy, mask, mask, self.share)
        covariance = _covariance(mask, logprobs, advantages)
        if self.kind == "kl_cov":
            return _top(covariance, mask, mask, self.share)
        within = mask & (covariance > self.low) & (covariance < self.high)
        return _top(jax.random.uniform(key, mask.shape), within, mask, self.share)


def _covariance(mask: jax.Array, logprobs: jax.Array, advantages: jax.Array) -> jax.Array:
    count = jnp.maximum(mask.sum(), 1)

    def centred(x: jax.Array) -> jax.Array:
        return x - jnp.sum(jnp.where(mask, x, 0.0)) / count

    return centred(jnp.broadcast_to(advantages[..., None], mask.shape)) * centred(logprobs)


def _top(values: jax.Array, among: jax.Array, mask: jax.Array, share: float) -> jax.Array:
    """Returns the highest values, bool, as many as a share of the mask; of equal ones the first."""
    ordered = jnp.sort(jnp.where(among, values, -jnp.inf).ravel())[::-1]
    count = jnp.maximum(jnp.floor(share * mask.sum()).astype(jnp.int32), 1)
    least = ordered[count - 1]
    above, equal = among & (values > least), among & (values == least)
    # Where no response has an advantage, all covariances are equal.
    place = jnp.cumsum(equal.ravel()).reshape(equal.shape)
    return above | (equal & (place <= count - above.sum()))
