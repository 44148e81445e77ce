"""Training losses: clipped policy surrogates with a KL term, and imitation.

A loss is a hashable frozen dataclass, a static argument of jitted functions. It names the arrays
that it `needs`, computes the `weights` of all tokens of an update batch, and maps the `Tokens` of a
micro-batch to its share of the loss and of the metrics. `summarise` then normalises their sums.

`SURROGATES` differ in the importance ratio that multiplies the advantage. With `d_t` the
log-probability of token t under the policy minus that under the old policy, and `p_i`, `q_i` the
geometric means of a response's token probabilities under the two:

| name | class | ratio | paper |
|---|---|---|---|
| token | `Clip` | `exp(d_t)` | GRPO, arXiv 2402.03300 |
| sequence | `SequenceRatio` | `exp(mean of d over the response)`, `p_i / q_i` | GSPO, 2507.18071 |
| group | `GroupRatio` | `p_i / (Σ q_j² / Σ q_j)`, summed over the group | GEPO, arXiv 2508.17850 |

The mean over tokens gives every token the weight 1 / N:

| name | N | paper |
|---|---|---|
| token | tokens of the batch | DAPO, arXiv 2503.14476 |
| seq | tokens of the response, times responses of the batch | GRPO |
| constant | T, the maximum response length, times responses | Dr. GRPO, arXiv 2503.20783 |

Deviations, numbered:
 1. The release averages over each micro-batch and then over micro-batches, so a token of a short
    micro-batch weighs more. Here token weights are fixed over the whole update batch before it is
    split into micro-batches (`token_weights`), so any micro-batch size gives the same gradient.
 2. Clip fractions are reported by cause: `clip_fraction_low` counts ratios below `1 - clip_low`,
    `clip_fraction_high` ratios above `1 + clip_high`, each where the clip is active, and
    `clip_fraction_dual` tokens bounded by the dual clip.
 3. The group ratio follows the paper's listing; its denominator is an expectation over the
    responses to one prompt, computed in log space so that small probabilities do not underflow.
 4. A masked response (DAPO's masking of truncated ones) counts neither among the tokens nor among
    the responses of a mean; the constant mean still counts it, being constant.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from emor3_jax.rl import kl as kls

Metrics = dict[str, jax.Array]

MEANS = ("token", "seq", "constant")
"""Names of the mean in the config."""


def token_weights(mask: jax.Array, mean: str = "token", *, limit: int | None = None) -> jax.Array:
    """Returns the weight of each token in the loss.

    Args:
      mask: bool[B, G, T], the tokens that count, the end-of-sequence token included.
      mean: "token" (every token of the batch alike), "seq" (mean within each response first), or
        "constant" (independent of the response's length, so that no length is favoured).
      limit: for "constant", the maximum response length; None is T.

    Returns:
      float32[B, G, T]; the weights sum to 1 over the batch, with "constant" to at most 1.

    Raises:
      ValueError: if `mean` is unknown.
    """
    chex.assert_rank(mask, 3)
    mask = mask.astype(jnp.float32)
    if mean == "token":
        return mask / jnp.maximum(mask.sum(), 1.0)
    if mean == "seq":
        lengths = mask.sum(axis=-1, keepdims=True)
        responses = jnp.maximum((lengths > 0).sum(), 1)
        return mask / jnp.maximum(lengths, 1.0) / responses
    if mean == "constant":
        b, g, t = mask.shape
        return mask / (b * g * (limit or t))
    raise ValueError(f"mean={mean!r}: must be one of {', '.join(MEANS)}")


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
    """

    logprobs: jax.Array
    old: jax.Array | None = None
    sampler: jax.Array | None = None
    ref: jax.Array | None = None
    advantages: jax.Array | None = None
    weights: jax.Array | None = None

    def require(self, needs: frozenset[str]) -> None:
        """Checks that all needed arrays are present and that shapes agree.

        Raises:
          ValueError: if one of `needs`, or `weights`, is None.
          AssertionError: if shapes do not agree.
        """
        missing = sorted(name for name in needs | {"weights"} if getattr(self, name) is None)
        if missing:
            raise ValueError(f"the loss needs tokens.{', tokens.'.join(missing)}, got None")
        per_token = self.logprobs, self.old, self.sampler, self.ref, self.weights
        chex.assert_equal_shape([x for x in per_token if x is not None])
        if self.advantages is not None:
            chex.assert_shape(self.advantages, self.logprobs.shape[:2])


class Surrogate(Protocol):
    """A policy-gradient objective per token: a frozen dataclass of its clip range.

    Attributes:
      needs: the arrays it reads: "old", "sampler", "ref", "advantages".
    """

    needs: ClassVar[frozenset[str]]

    def __call__(self, t: Tokens) -> tuple[jax.Array, Metrics]:
        """Returns the unweighted loss of each token and metrics, which are weighted sums.

        The loss is float32[B, G, T], or [B, G, 1] if all tokens of a response have the same.
        """
        ...

    def conflict(self, mean: str) -> str | None:
        """Returns the reason to refuse these settings with one of `MEANS`, or None.

        It is a predicate of `policy_update.ratio` and names the other config fields involved.
        """
        ...


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

    clip_low: float = 0.2
    clip_high: float = 0.3
    clip_dual: float = 3.0

    def conflict(self, mean: str) -> str | None:
        """See `Surrogate.conflict`."""
        return None

    def log_ratio(self, t: Tokens) -> jax.Array:
        """Returns the logarithm of the ratio, float32[B, G, T] or [B, G, 1] (one per response)."""
        return _difference(t)

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


@dataclass(frozen=True)
class SequenceRatio(Clip):
    """The clipped surrogate with one ratio per response, the geometric mean over its tokens (GSPO).

    The default clip range is the paper's (arXiv 2507.18071). Attributes as of `Clip`.
    """

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
        return _length_weighted(mean)

    def log_ratio(self, t: Tokens) -> jax.Array:
        """Returns the logarithm of the ratio, float32[B, G, 1]."""
        return _difference(t).sum(axis=-1, keepdims=True) / _lengths(t)


@dataclass(frozen=True)
class GroupRatio(Clip):
    """The clipped surrogate with a response's probability over its group's expectation (GEPO).

    The ratio is not 1 even for equal policies, so by default only the dual clip bounds it
    (arXiv 2508.17850). Attributes as of `Clip`.
    """

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
        return _length_weighted(mean)

    def log_ratio(self, t: Tokens) -> jax.Array:
        """Returns the logarithm of the ratio, float32[B, G, 1]; groups must be whole."""
        used, lengths = t.weights > 0, _lengths(t)
        old = jnp.where(used, t.old, 0.0).sum(axis=-1, keepdims=True) / lengths
        counted = jnp.where(used.any(axis=-1, keepdims=True), old, -jnp.inf)
        # The expectation over a group without any counted response is undefined; its weights are 0.
        counted = jnp.where(used.any(axis=(1, 2), keepdims=True), counted, 0.0)
        expected = jax.nn.logsumexp(2 * counted, axis=1, keepdims=True)
        expected -= jax.nn.logsumexp(counted, axis=1, keepdims=True)
        return _difference(t).sum(axis=-1, keepdims=True) / lengths + old - expected


def _difference(t: Tokens) -> jax.Array:
    # Padding positions are undefined: their difference is set to 0 before any exp.
    return jnp.where(t.weights > 0, jnp.clip(t.logprobs - t.old, -20.0, 20.0), 0.0)


def _lengths(t: Tokens) -> jax.Array:
    return jnp.maximum((t.weights > 0).sum(axis=-1, keepdims=True), 1)


def _length_weighted(mean: str) -> str | None:
    if mean == "seq":
        return None
    return (
        f"is one ratio for all tokens of a response, which policy_update.mean={mean!r} would weigh "
        "by its length; set the mean to 'seq', or the ratio to 'token'"
    )


SURROGATES: dict[str, type[Surrogate]] = {
    "token": Clip,
    "sequence": SequenceRatio,
    "group": GroupRatio,
}
"""Ratio in the config → surrogate, constructed from clip_low, clip_high and clip_dual."""


@dataclass(frozen=True, kw_only=True)
class TokenMean:
    """The weighted mean over response tokens, common to all losses.

    Attributes:
      mean, limit: see `token_weights`.
      mask_truncated: leave out responses without an end-of-sequence token (DAPO, arXiv 2503.14476).
      entropy: also report the policy's entropy, at the cost of one more pass over the logits; the
        learner computes it, with the weights of the loss.
    """

    mean: str = "token"
    limit: int | None = None
    mask_truncated: bool = False
    entropy: bool = False

    def weights(self, mask: jax.Array, ended: jax.Array) -> jax.Array:
        """Returns the weight of each token of a whole update batch, float32[B, G, T].

        Args:
          mask: bool[B, G, T], the response tokens.
          ended: bool[B, G], false for truncated responses.
        """
        if self.mask_truncated:
            mask = mask & ended[..., None]
        return token_weights(mask, self.mean, limit=self.limit)

    def summarise(self, metrics: Metrics, total_weight: jax.Array) -> Metrics:
        """Returns the metrics of an update batch from their sums over its micro-batches.

        Args:
          metrics: of the loss, and others that are sums with its weights.
          total_weight: float32[], the sum of all weights of the batch.
        """
        if self.mean != "constant":
            return metrics
        # The weights do not sum to 1, so all metrics but the loss are divided to become means.
        total = jnp.maximum(total_weight, 1e-9)
        return {k: x if k == "loss" else x / total for k, x in metrics.items()}


@dataclass(frozen=True)
class PolicyLoss(TokenMean):
    """A surrogate plus a weighted estimate of the KL to the reference.

    Attributes:
      surrogate: the policy-gradient term.
      kl: one of `kl.ESTIMATES`, or "off" for no KL term.
      mean, limit, mask_truncated, entropy: see `TokenMean`.
    """

    surrogate: Surrogate
    kl: str = "k3"

    @property
    def needs(self) -> frozenset[str]:
        """The arrays of `Tokens` that it reads besides `logprobs` and `weights`."""
        return self.surrogate.needs | {"old"} | (set() if self.kl == "off" else {"ref"})

    def __call__(
        self, tokens: Tokens, kl_coef: jax.Array | float | None
    ) -> tuple[jax.Array, Metrics]:
        """Returns the loss of a batch of responses and its metrics.

        Paper: the group-relative objective; release: `compute_policy_loss`, `compute_kl`.

        Args:
          tokens: with the arrays of `needs`.
          kl_coef: float32[], weight of the KL term; not read if `kl` is "off".

        Returns:
          The loss, float32[], and metrics (weighted sums, float32[]): `loss`, `kl`, `moved`
          (absolute difference to the old log-probabilities: at the first update of a step the
          train-inference mismatch), and those of the surrogate.

        Raises:
          ValueError: if an array of `needs` is missing.
        """
        tokens.require(self.needs)
        weights, used = tokens.weights, tokens.weights > 0
        per_token, metrics = self.surrogate(tokens)
        kl = jnp.zeros(())
        if self.kl != "off":
            estimate = kls.ESTIMATES[self.kl](tokens.logprobs, tokens.ref)
            estimate = jnp.where(used, estimate, 0.0)
            per_token = per_token + kl_coef * estimate
            kl = jnp.sum(weights * estimate)
        loss = jnp.sum(weights * per_token)
        mismatch = jnp.where(used, jnp.abs(tokens.logprobs - tokens.old), 0.0)
        return loss, {"loss": loss, "kl": kl, "moved": jnp.sum(weights * mismatch), **metrics}


@dataclass(frozen=True)
class ImitationLoss(TokenMean):
    """The negative log-likelihood of given responses, for supervised fine-tuning.

    Attributes:
      mean, limit, mask_truncated, entropy: see `TokenMean`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(
        self, tokens: Tokens, kl_coef: jax.Array | float | None = None
    ) -> tuple[jax.Array, Metrics]:
        """Returns the loss of a batch of responses, float32[], and the metric `loss`.

        Args:
          tokens: `logprobs` and `weights` alone are read.
          kl_coef: ignored; part of the interface shared with `PolicyLoss`.
        """
        tokens.require(self.needs)
        weights = tokens.weights
        loss = -jnp.sum(jnp.where(weights > 0, weights * tokens.logprobs, 0.0))
        return loss, {"loss": loss}

    def summarise(self, metrics: Metrics, total_weight: jax.Array) -> Metrics:
        """Returns the metrics of an update batch and the `perplexity` of a token, at least 1."""
        mean = metrics["loss"] / jnp.maximum(total_weight, 1e-9)
        return super().summarise(metrics, total_weight) | {"perplexity": jnp.exp(mean)}
