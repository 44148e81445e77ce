"""The small programs of a step around its passes: sizes, padding, mismatch, KL, advantages."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp

from emor3_jax.learner.micro_batches import RowSizes
from emor3_jax.parallel.program import by_prompts, by_prompts_and_whole, laid_out, whole
from emor3_jax.rl import advantages
from emor3_jax.rl.advantages import RewardTerms
from emor3_jax.rl.correction import mismatch
from emor3_jax.rl.kl import penalty
from emor3_jax.types import Batch, Experience, Samples

Metrics = dict[str, jax.Array]


@jax.jit
@laid_out(whole)
def mismatch_jitted(logprobs: jax.Array, samples: Samples) -> Metrics:
    """Returns `rl.correction.mismatch` of log-probabilities, float32[B, G, T], jitted."""
    return mismatch(logprobs, samples.logprobs, samples.mask)


@partial(jax.jit, static_argnames="size")
@laid_out(by_prompts)
def trim(samples: Samples, *, size: int) -> Samples:
    """Cuts padding off the end of responses.

    Args:
      samples: of length T.
      size: new length, at least that of the longest response and at most T.
    """
    return samples.cut(size)


@jax.jit
@laid_out(by_prompts)
def measure(batch: Batch, samples: Samples) -> RowSizes:
    """Returns the sizes of prompts and of their responses."""
    real = jnp.any(batch.images.mask, axis=(1, 3))
    last = jnp.max(jnp.where(real, jnp.arange(real.shape[-1]) + 1, 0), axis=-1)
    patches = jnp.sum(batch.images.mask, axis=(1, 2, 3), dtype=jnp.int32)
    prompt = jnp.sum(batch.prompt.mask, axis=-1, dtype=jnp.int32)
    return RowSizes(jnp.asarray(samples.lengths), prompt, last.astype(jnp.int32), patches)


@partial(jax.jit, static_argnames="name")
@laid_out(by_prompts_and_whole)
def penalise(
    rewards: jax.Array,
    samples: Samples,
    ref_logprobs: jax.Array,
    kl_coef: jax.Array | float,
    *,
    name: str,
) -> tuple[jax.Array, jax.Array]:
    """Takes the KL off the rewards; returns them float32[B, G], and the mean KL of a token.

    Args:
      rewards: float32[B, G].
      samples: responses with their log-probabilities under the policy that sampled.
      ref_logprobs: float32[B, G, T], under the reference.
      kl_coef: weight of the KL.
      name: of the estimate, see `rl.kl`.
    """
    each, mean = penalty(name, samples.logprobs, ref_logprobs, samples.mask)
    return rewards - kl_coef * each, mean


def terms_of(experience: Experience, weights: Iterable[tuple[str, float]]) -> RewardTerms:
    """Returns the rewards of an experience as estimators read them.

    Args:
      experience: of a rollout, with scores and rewards.
      weights: names of the reward terms, each with its weight.
    """
    return RewardTerms(
        experience.rewards,
        experience.scores.named(),
        dict(weights),
        experience.greedy,
        experience.samples.lengths,
    )


@partial(jax.jit, static_argnames="name")
@laid_out(by_prompts_and_whole)
def compare_groups(terms: RewardTerms, *, name: str) -> tuple[jax.Array, jax.Array]:
    """Returns groups with nothing to compare, bool[B], and the mean reward, float32[].

    Args:
      terms: rewards of a rollout.
      name: of the advantage estimator.
    """
    return advantages.nothing_to_compare(name, terms), jnp.mean(terms.rewards)


@partial(jax.jit, static_argnames=("name", "std"))
@laid_out(by_prompts)
def estimate_jitted(terms: RewardTerms, *, name: str, std: str) -> jax.Array:
    """Returns `rl.advantages.estimate`, jitted."""
    return advantages.estimate(name, terms, std=std)
