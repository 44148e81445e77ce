"""Short grouped generation in one program: `G` continuations of each of `B` prefixes.

Serves the reflections, whose questions are long and whose replies are a few tokens; the rollout,
with its long responses, has `rollout.engine`.

Deviations, numbered:
 1. The prefix holds the prompt without its last token; that token, or the question that follows it,
    opens each continuation. So the prefix pass needs no logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emor3_jax.models.cache import KV, Cache
from emor3_jax.models.policy import Policy
from emor3_jax.rollout.sampling import Sampling, sample
from emor3_jax.types import Samples


class Opening(NamedTuple):
    """Tokens that follow a prefix, before the ones that are generated.

    Attributes:
      prefix: keys and values of the `B` prefixes.
      tokens: int32[B, G, S], right padded.
      lengths: int32[B, G], at least 1.
      positions: int32[B, G], rope position of the first token.
    """

    prefix: KV
    tokens: jax.Array
    lengths: jax.Array
    positions: jax.Array


def read_opening(
    policy: Policy, params: dict, opening: Opening, cache_size: int
) -> tuple[jax.Array, Cache]:
    """Reads the tokens that open each continuation.

    Args:
      policy, params: the policy.
      opening: of the continuations.
      cache_size: positions of the cache, at least S.

    Returns:
      float[B, G, D], the final hidden state of each opening's last token, and the cache behind it.
    """
    s = opening.tokens.shape[-1]
    hidden, cache = policy.extend(
        params,
        opening.prefix,
        opening.tokens,
        opening.positions[..., None] + jnp.arange(s),
        jnp.arange(s) < opening.lengths[..., None],
        cache_size=cache_size,
    )
    last = jnp.take_along_axis(hidden, (opening.lengths - 1)[..., None, None], axis=2)[:, :, 0]
    return last, cache


def generate(
    policy: Policy,
    params: dict,
    opening: Opening,
    noise: Callable[[jax.Array], jax.Array],
    sampling: Sampling,
    suppressed: jax.Array,
) -> Samples:
    """Samples continuations until all have ended or `sampling.max_tokens` is reached.

    Args:
      policy, params: the policy.
      opening: of the continuations.
      noise: int32[] → float32[B, G] in [0, 1), the numbers that decide token t.
      sampling: settings of the sampler.
      suppressed: bool[V], ids never sampled.

    Returns:
      `Samples` with T = `sampling.max_tokens`.
    """
    b, g, s = opening.tokens.shape
    t_max = sampling.max_tokens
    stop = jnp.asarray(sampling.stop, jnp.int32)

    def pick(hidden: jax.Array, t: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        return sample(policy.logits(params, hidden), noise(t), sampling, suppressed)

    last, cache = read_opening(policy, params, opening, s + t_max - 1)
    token, logprob = pick(last, 0)
    tokens = jnp.zeros((b, g, t_max), jnp.int32).at[..., 0].set(token)
    logprobs = jnp.zeros((b, g, t_max), jnp.float32).at[..., 0].set(logprob)
    ended = jnp.isin(token, stop)
    lengths = jnp.ones((b, g), jnp.int32)

    def unfinished(carry: tuple) -> jax.Array:
        t, _, _, _, _, ended, _ = carry
        return (t < t_max) & ~jnp.all(ended)

    def step(carry: tuple) -> tuple:
        t, token, tokens, logprobs, lengths, ended, cache = carry
        positions = opening.positions + opening.lengths + t - 1
        hidden, cache = policy.decode(params, opening.prefix, cache, token, positions, s + t - 1)
        token, logprob = pick(hidden, t)
        token = jnp.where(ended, 0, token)
        tokens = tokens.at[..., t].set(token)
        logprobs = logprobs.at[..., t].set(jnp.where(ended, 0.0, logprob))
        lengths = lengths + ~ended
        ended = ended | jnp.isin(token, stop)
        return t + 1, token, tokens, logprobs, lengths, ended, cache

    carry = (jnp.int32(1), token, tokens, logprobs, lengths, ended, cache)
    _, _, tokens, logprobs, lengths, ended, _ = jax.lax.while_loop(unfinished, step, carry)
    return Samples(tokens, logprobs, lengths, ended)
