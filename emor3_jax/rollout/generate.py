"""Short grouped generation in one program: `G` continuations of each of `B` prefixes.

Serves the reflections, whose openings are long and whose replies are a few tokens; the rollout,
with its long responses, has `rollout.engine`.

Deviations, numbered:
 1. The prefix holds the prompt without its last token; that token, or the question that follows it,
    opens each continuation. So the prefix pass needs no logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.models.qwen2_5_vl.inputs import KV, Cache
from emor3_jax.rollout import sampling


class Samples(NamedTuple):
    """Generated tokens.

    Attributes:
      tokens: int32[B, G, T], 0 after the end.
      logprobs: float32[B, G, T], under the sampler's distribution, 0 after the end.
      lengths: int32[B, G], the end-of-sequence token included.
      ended: bool[B, G], False where the response was cut at T tokens.
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    ended: jax.Array

    @property
    def mask(self) -> jax.Array:
        """bool[B, G, T], True for the tokens that were generated."""
        return jnp.arange(self.tokens.shape[-1]) < self.lengths[..., None]


class SamplingRule(NamedTuple):
    """How tokens are drawn; hashable, so that it can be a static argument.

    Attributes:
      max_tokens: T, at most so many tokens are generated.
      temperature: 0 is greedy.
      top_p: in (0, 1].
      stop: ids that end a response.
    """

    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[int, ...]


def read_opening(
    config: Config,
    params: dict,
    prefix: KV,
    start: jax.Array,
    start_lengths: jax.Array,
    start_positions: jax.Array,
    *,
    dtype: jnp.dtype,
    cache_size: int,
) -> tuple[jax.Array, Cache]:
    """Reads what opens each continuation.

    Args:
      config, params, prefix, start, start_lengths, start_positions, dtype: as in `generate`.
      cache_size: places of the cache, at least S.

    Returns:
      float[B, G, D], the final hidden state of each opening's last token, and the cache behind it.
    """
    s = start.shape[-1]
    hidden, cache = model.forward_continuation(
        config,
        params,
        prefix,
        start,
        start_positions[..., None] + jnp.arange(s),
        jnp.arange(s) < start_lengths[..., None],
        dtype=dtype,
        cache_size=cache_size,
    )
    last = jnp.take_along_axis(hidden, (start_lengths - 1)[..., None, None], axis=2)[:, :, 0]
    return last, cache


def generate(
    config: Config,
    params: dict,
    prefix: KV,
    start: jax.Array,
    start_lengths: jax.Array,
    start_positions: jax.Array,
    noise: Callable[[jax.Array], jax.Array],
    rule: SamplingRule,
    *,
    banned: jax.Array,
    dtype: jnp.dtype = jnp.float32,
) -> Samples:
    """Samples continuations token by token, until all have ended or `rule.max_tokens` is reached.

    Args:
      config, params: the policy.
      prefix: keys and values of the `B` prefixes.
      start: int32[B, G, S], tokens that follow the prefix, right padded.
      start_lengths: int32[B, G], at least 1.
      start_positions: int32[B, G], rope position of the first token of `start`.
      noise: int32[] → float32[B, G] in [0, 1), the numbers that decide token t.
      rule: how to sample.
      banned: bool[V], ids never sampled.
      dtype: compute type of the layers.

    Returns:
      `Samples` with T = `rule.max_tokens`.
    """
    b, g, s = start.shape
    t_max = rule.max_tokens
    stop = jnp.asarray(rule.stop, jnp.int32)

    def pick(hidden: jax.Array, t: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(config, params, hidden)
        tokens, logprobs = sampling.sample(
            logits,
            noise(t),
            temperature=rule.temperature,
            top_p=rule.top_p,
            banned=banned,
        )
        return tokens, logprobs

    last, cache = read_opening(
        config,
        params,
        prefix,
        start,
        start_lengths,
        start_positions,
        dtype=dtype,
        cache_size=s + t_max - 1,
    )
    token, logprob = pick(last, 0)
    tokens = jnp.zeros((b, g, t_max), jnp.int32).at[..., 0].set(token)
    logprobs = jnp.zeros((b, g, t_max), jnp.float32).at[..., 0].set(logprob)
    ended = jnp.isin(token, stop)
    lengths = jnp.ones((b, g), jnp.int32)

    def going(carry: tuple) -> jax.Array:
        t, _, _, _, _, ended, _ = carry
        return (t < t_max) & ~jnp.all(ended)

    def step(carry: tuple) -> tuple:
        t, token, tokens, logprobs, lengths, ended, cache = carry
        positions = start_positions + start_lengths + t - 1
        hidden, cache = model.decode_step(
            config, params, prefix, cache, token, positions, s + t - 1, dtype=dtype
        )
        token, logprob = pick(hidden, t)
        token = jnp.where(ended, 0, token)
        tokens = tokens.at[..., t].set(token)
        logprobs = logprobs.at[..., t].set(jnp.where(ended, 0.0, logprob))
        lengths = lengths + ~ended
        ended = ended | jnp.isin(token, stop)
        return t + 1, token, tokens, logprobs, lengths, ended, cache

    carry = (jnp.int32(1), token, tokens, logprobs, lengths, ended, cache)
    _, _, tokens, logprobs, lengths, ended, _ = jax.lax.while_loop(going, step, carry)
    return Samples(tokens, logprobs, lengths, ended)
