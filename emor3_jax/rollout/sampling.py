"""Sampling one token: temperature, top-p, suppressed tokens, and its log-probability.

Deviations, numbered:
 1. A token is drawn by inverting the cumulative distribution with one uniform number per row, not
    by a Gumbel number per vocabulary entry: the same distribution for a vocabulary's worth less
    random bits.
 2. The recorded log-probability is that of the tempered distribution over the allowed ids before
    the top-p cut, as in the release: scoring a response later cannot know what the cut removed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_BITS, _DIGIT = 30, 2
"""Bits of floats under 2, and how many of them a pass of `nucleus` finds."""

NEG_INF = -1e30
"""A finite stand-in for minus infinity, so that gradients and differences stay finite."""


class Sampling(NamedTuple):
    """Settings of the sampler; hashable, so that they can be a static argument.

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


def allowed_log_softmax(logits: jax.Array, temperature: float, suppressed: jax.Array) -> jax.Array:
    """Returns float32[..., V]: log-probabilities of the tempered distribution over allowed ids.

    Args:
      logits: float32[..., V].
      temperature: over 0; 0 (greedy) reads as 1, so that greedy replies have log-probabilities.
      suppressed: bool[V], ids that can never be sampled.
    """
    tempered = logits.astype(jnp.float32) / (temperature or 1.0)
    return jax.nn.log_softmax(jnp.where(suppressed, NEG_INF, tempered), axis=-1)


def top_p_filter(logprobs: jax.Array, top_p: float) -> jax.Array:
    """Returns probabilities float32[..., V] with all but the smallest set of mass `top_p` at 0.

    The set is filled from the most probable id on and includes the id that crosses `top_p`; ids as
    probable as the last one stay too.

    Args:
      logprobs: float32[..., V].
      top_p: in (0, 1]; 1 keeps everything.
    """
    probs = jnp.exp(logprobs)
    return probs if top_p >= 1.0 else nucleus(probs, top_p)


def nucleus(probs: jax.Array, top_p: float) -> jax.Array:
    """Returns `top_p_filter` of probabilities, float32[..., V], each under 2.

    Nothing is sorted. Floats that are not negative are in the order of their bits as integers, so
    the largest integer whose floats from there on have mass `top_p` is found digit by digit, from
    the highest: 15 passes of three sums each, whatever V is.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def add_digit(i: jax.Array, least: jax.Array) -> jax.Array:
        shift = _BITS - _DIGIT * (i + 1)
        # Sums of ever fewer numbers fall, so as many reach the mass as the digit says.
        enough = [
            jnp.sum(probs, axis=-1, keepdims=True, where=bits >= least + (digit << shift)) >= top_p
            for digit in range(1, 1 << _DIGIT)
        ]
        return least + (sum(x.astype(jnp.int32) for x in enough) << shift)

    least = jnp.zeros((*probs.shape[:-1], 1), jnp.int32)
    least = jax.lax.fori_loop(0, _BITS // _DIGIT, add_digit, least)
    return jnp.where(bits >= least, probs, 0.0)


def noise(key: jax.Array, row: jax.Array, response: jax.Array, position: jax.Array) -> jax.Array:
    """Returns float32[...] in [0, 1): a number for one token of one response to one prompt.

    It depends on nothing else, so not on what else is sampled at the same time.

    Args:
      key: a PRNG key.
      row, response, position: int32, broadcast together: indices of prompt, response and token.
    """
    numbers = jnp.broadcast_arrays(row, response, position)

    def one(*numbers: jax.Array) -> jax.Array:
        return jax.random.uniform(functools.reduce(jax.random.fold_in, numbers, key))

    return jax.vmap(one)(*(x.ravel() for x in numbers)).reshape(numbers[0].shape)


def invert(probs: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns int32[...], the id at the share `uniform` of the cumulative distribution.

    A cumulative sum in float32 is added up in pieces, so it may step at an id of probability 0 or
    even fall; such ids take no part.

    Args:
      probs: float32[..., V], at least one of them over 0 in each row.
      uniform: float32[...] in [0, 1).
    """
    cumulative = jnp.where(probs > 0, jnp.cumsum(probs, axis=-1), 0.0)
    total = jnp.max(cumulative, axis=-1)
    # Rounding could put the point on the very end, past the last id.
    point = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.zeros_like(total)))
    ids = jnp.arange(probs.shape[-1], dtype=jnp.int32)
    passed = cumulative > point[..., None]
    return jnp.min(jnp.where(passed, ids, probs.shape[-1]), axis=-1)


def sample(
    logits: jax.Array, uniform: jax.Array, sampling: Sampling, suppressed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the sampled ids int32[...] and their log-probabilities float32[...].

    Args:
      logits: float[..., V].
      uniform: float32[...] in [0, 1), which decides (`noise`).
      sampling: temperature, of which 0 takes the most probable id, and top-p.
      suppressed: bool[V], ids that can never be sampled.
    """
    logprobs = allowed_log_softmax(logits, sampling.temperature, suppressed)
    if sampling.temperature == 0:
        tokens = jnp.argmax(logprobs, axis=-1).astype(jnp.int32)
    else:
        tokens = invert(top_p_filter(logprobs, sampling.top_p), uniform)
    chosen = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    return tokens, chosen
