"""The arrays that losses read, and what every surrogate is."""

from typing import ClassVar, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]


class Tokens(NamedTuple):
    """The arrays that losses read; those that a loss does not need may be None.

    Attributes:
      logprobs: float32[B, G, T], log-probabilities under the policy being updated.
      old: float32[B, G, T], under the policy that sampled: the denominator of the ratio, either
        recorded by the sampler or recomputed.
      sampler: float32[B, G, T], as recorded by the sampler.
      ref: float32[B, G, T], under the reference.
      advantages: float32[B, G].
      weights: float32[B, G, T] of the loss, 0 at padding. A micro-batch has its slice of the whole
        batch's weights: losses and metrics then add up.
      selected: bool[B, G, T], see `rl.selection`.
    """

    logprobs: jax.Array
    old: jax.Array | None = None
    sampler: jax.Array | None = None
    ref: jax.Array | None = None
    advantages: jax.Array | None = None
    weights: jax.Array | None = None
    selected: jax.Array | None = None

    def require(self, needs: frozenset[str]) -> None:
        """Checks that all needed arrays are present and that shapes agree.

        Raises:
          ValueError: if one of `needs`, or `weights`, is None.
          AssertionError: if shapes do not agree.
        """
        missing = sorted(name for name in needs | {"weights"} if getattr(self, name) is None)
        if missing:
            raise ValueError(f"the loss needs tokens.{', tokens.'.join(missing)}, got None")
        per_token = self.logprobs, self.old, self.sampler, self.ref, self.weights, self.selected
        chex.assert_equal_shape([x for x in per_token if x is not None])
        if self.advantages is not None:
            chex.assert_shape(self.advantages, self.logprobs.shape[:2])


class Surrogate(Protocol):
    """A policy-gradient objective per token: a frozen dataclass of its settings.

    Attributes:
      needs: the arrays it reads: "old", "sampler", "ref", "advantages".
      fields: its settings, in order, as fields of `policy_update`.
      per_token: it gives each token of a response a loss of its own, so that some can be left out.
    """

    needs: ClassVar[frozenset[str]]
    fields: ClassVar[tuple[str, ...]]
    per_token: ClassVar[bool]

    def __call__(self, t: Tokens) -> tuple[jax.Array, Metrics]:
        """Returns the unweighted loss of each token and metrics, which are weighted sums.

        The loss is float32[B, G, T], or [B, G, 1] if all tokens of a response have the same.
        """
        ...

    def conflict(self, mean: str) -> str | None:
        """Returns the reason to refuse these settings with one of `losses.MEANS`, or None.

        It is a predicate of `policy_update.surrogate` and names the other config fields involved.
        """
        ...


def log_ratio(t: Tokens) -> jax.Array:
    """Returns `log policy - log old` of each token, float32[B, G, T], clamped to ±20; 0 at padding.

    Padding positions are undefined: their difference is set to 0 before any exp.
    """
    return jnp.where(t.weights > 0, jnp.clip(t.logprobs - t.old, -20.0, 20.0), 0.0)


def lengths(t: Tokens) -> jax.Array:
    """Returns the number of tokens that count, at least 1, int32[B, G, 1]."""
    return jnp.maximum((t.weights > 0).sum(axis=-1, keepdims=True), 1)


def weighs_by_length(mean: str) -> str | None:
    """Returns why a loss that all tokens of a response share needs the mean "seq", or None."""
    if mean == "seq":
        return None
    return (
        f"is one ratio for all tokens of a response, which policy_update.mean={mean!r} would weigh "
        "by its length; set the mean to 'seq', or the surrogate to 'clip'"
    )
