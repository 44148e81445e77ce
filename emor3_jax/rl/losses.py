"""Training losses: clipped policy surrogates with a KL term, and imitation.

A loss is a hashable frozen dataclass, a static argument of jitted functions. It names the arrays
that it `needs`, computes the `weights` of all tokens of an update batch, and maps the `Tokens` of a
micro-batch to its share of the loss and of the metrics. `summarise` then normalises their sums.

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
 3. A masked response (DAPO's masking of truncated ones) counts neither among the tokens nor among
    the responses of a mean; the constant mean still counts it, being constant. The same holds for
    groups that `mask_equal` leaves out.
 4. Where tokens are selected, the entropy bonus still counts all of them; TRL's counts the selected
    ones. The mean entropy has the weights of the loss, so that "constant" makes the bonus smaller;
    TRL's is that of "token" always.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp

from emor3_jax.rl import kl as kls
from emor3_jax.rl.correction import Correction
from emor3_jax.rl.selection import Selection
from emor3_jax.rl.surrogates.tokens import Metrics, Surrogate, Tokens, lengths, log_ratio

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


@dataclass(frozen=True, kw_only=True)
class TokenMean:
    """The weighted mean over response tokens, common to all losses.

    Attributes:
      mean, limit: see `token_weights`.
      mask_truncated: leave out responses without an end-of-sequence token (DAPO, arXiv 2503.14476).
      mask_equal: leave out groups whose rewards are all equal, which have no advantage, of the KL
        too.
      entropy: also report the policy's entropy, at the cost of one more pass over the logits; the
        learner computes it, with the weights of the loss.
    """

    mean: str = "token"
    limit: int | None = None
    mask_truncated: bool = False
    mask_equal: bool = False
    entropy: bool = False

    def weights(
        self, mask: jax.Array, ended: jax.Array, equal: jax.Array | None = None
    ) -> jax.Array:
        """Returns the weight of each token of a whole update batch, float32[B, G, T].

        Args:
          mask: bool[B, G, T], the response tokens.
          ended: bool[B, G], false for truncated responses.
          equal: bool[B], true for groups whose rewards are all equal; `mask_equal` alone reads it.
        """
        if self.mask_truncated:
            mask = mask & ended[..., None]
        if self.mask_equal:
            mask = mask & ~equal[:, None, None]
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
      kl_ratio: multiply the estimate of a token by its ratio, which makes it, and its gradient,
        unbiased for tokens of the policy that sampled (DeepSeek-V3.2, arXiv 2512.02556).
      correction: of the mismatch between sampler and learner; None for none.
      off_policy: leave out the surrogate of bad responses whose mean of `log μ - log π` is over
        this, in nats a token (the same); infinite leaves out none.
      selection: of tokens, which changes their surrogate; None for none.
      mean, limit, mask_truncated, mask_equal, entropy: see `TokenMean`.
    """

    surrogate: Surrogate
    kl: str = "k3"
    kl_ratio: bool = False
    correction: Correction | None = None
    off_policy: float = math.inf
    selection: Selection | None = None

    @property
    def needs(self) -> frozenset[str]:
        """The arrays of `Tokens` that it reads besides `logprobs` and `weights`."""
        found = self.surrogate.needs | {"old"}
        found |= set() if self.kl == "off" else {"ref"}
        found |= {"sampler"} if self.correction or math.isfinite(self.off_policy) else set()
        return found | ({"selected"} if self.selection else set())

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
          train-inference mismatch), and those of the surrogate and of what masks it.

        Raises:
          ValueError: if an array of `needs` is missing.
        """
        tokens.require(self.needs)
        weights, used = tokens.weights, tokens.weights > 0
        per_token, metrics = self._masked_surrogate(tokens)
        kl = jnp.zeros(())
        if self.kl != "off":
            estimate = kls.ESTIMATES[self.kl](tokens.logprobs, tokens.ref)
            estimate = jnp.where(used, estimate, 0.0)
            if self.kl_ratio:
                estimate = estimate * jnp.exp(log_ratio(tokens))
            per_token = per_token + kl_coef * estimate
            kl = jnp.sum(weights * estimate)
        loss = jnp.sum(weights * per_token)
        mismatch = jnp.where(used, jnp.abs(tokens.logprobs - tokens.old), 0.0)
        return loss, {"loss": loss, "kl": kl, "moved": jnp.sum(weights * mismatch), **metrics}

    def _masked_surrogate(self, tokens: Tokens) -> tuple[jax.Array, Metrics]:
        """Returns the surrogate's loss per token, masked and weighted, and its metrics."""
        per_token, metrics = self.surrogate(tokens)
        if self.selection is not None:
            kind, selected = self.selection.kind, tokens.selected
            if kind == "kl_cov":
                penalty = self.selection.coef * jnp.abs(log_ratio(tokens))
                per_token = per_token + jnp.where(selected, penalty, 0.0)
            else:
                per_token = jnp.where(selected == (kind == "top_entropy"), per_token, 0.0)
            metrics["selected"] = jnp.sum(tokens.weights * selected)
        if math.isfinite(self.off_policy):
            dropped = self._off_policy(tokens)
            per_token = jnp.where(dropped, 0.0, per_token)
            metrics["off_policy_masked"] = jnp.sum(tokens.weights * dropped)
        if self.correction is not None:
            weight, found = self.correction(tokens)
            per_token, metrics = per_token * weight, metrics | found
        return per_token, metrics

    def _off_policy(self, tokens: Tokens) -> jax.Array:
        """Returns which responses are left out, bool[B, G, 1]."""
        gap = tokens.sampler - jax.lax.stop_gradient(tokens.logprobs)
        gap = jnp.where(tokens.weights > 0, gap, 0.0).sum(axis=-1, keepdims=True)
        return (tokens.advantages[..., None] < 0) & (gap / lengths(tokens) > self.off_policy)


@dataclass(frozen=True)
class ImitationLoss(TokenMean):
    """The negative log-likelihood of given responses, for supervised fine-tuning.

    Attributes:
      mean, limit, mask_truncated, mask_equal, entropy: see `TokenMean`.
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
