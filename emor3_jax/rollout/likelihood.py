"""How likely each of a few short replies is, without sampling any of them.

The question is read once; all candidates are then read at once behind it, each seeing the question
and itself. Nothing is copied for them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.models.qwen2_5_vl.inputs import KV
from emor3_jax.rollout.generate import read_opening


class Candidates(NamedTuple):
    """Replies to choose among; several may mean the same, such as `yes` and `Yes`.

    Attributes:
      tokens: int32[N, L], right padded, the token that ends the turn included.
      lengths: int32[N].
      meaning: int32[N], from 0 on without gaps.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    meaning: np.ndarray


def make_candidates(
    tokenizer: PreTrainedTokenizerBase, meanings: list[list[str]], end: str = "<|im_end|>"
) -> Candidates:
    """Returns the replies that stand for some meanings.

    Args:
      tokenizer: of the policy.
      meanings: for each of them its spellings.
      end: the token that ends a reply.
    """
    spelled = [
        (i, tokenizer.encode(text, add_special_tokens=False))
        for i, texts in enumerate(meanings)
        for text in dict.fromkeys(texts)
    ]
    rows = [[*ids, tokenizer.convert_tokens_to_ids(end)] for _, ids in spelled]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    lengths = np.asarray([len(row) for row in rows], np.int32)
    return Candidates(tokens, lengths, np.asarray([i for i, _ in spelled], np.int32))


def probabilities(
    config: Config,
    params: dict,
    prefix: KV,
    start: jax.Array,
    start_lengths: jax.Array,
    start_positions: jax.Array,
    candidates: Candidates,
    *,
    meanings: int,
    banned: jax.Array,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Returns how the likelihood of all candidates together falls to each meaning.

    Args:
      config, params: the policy.
      prefix: keys and values of the `B` prefixes.
      start: int32[B, G, S], what follows the prefix, right padded: the question.
      start_lengths: int32[B, G], at least 1.
      start_positions: int32[B, G], rope position of the first token of `start`.
      candidates: the replies.
      meanings: K, how many meanings there are.
      banned: bool[V], ids of probability zero.
      dtype: compute type of the layers.

    Returns:
      float32[B, G, K], sums to 1 over K.
    """
    last, cache = read_opening(
        config,
        params,
        prefix,
        start,
        start_lengths,
        start_positions,
        dtype=dtype,
        cache_size=start.shape[-1],
    )
    tokens = jnp.asarray(candidates.tokens)
    n, size = tokens.shape
    b, g = start_lengths.shape
    behind = model.forward_candidates(
        config, params, prefix, cache, tokens[:, :-1], start_positions + start_lengths, dtype=dtype
    )
    # The states from which each token of each candidate is predicted.
    states = jnp.concatenate(
        [jnp.broadcast_to(last[:, :, None, None], (b, g, n, 1, last.shape[-1])), behind], axis=3
    )
    logprobs, _ = model.token_logprobs(
        config, params, states, jnp.broadcast_to(tokens, (b, g, n, size)), banned=banned
    )
    real = jnp.arange(size) < jnp.asarray(candidates.lengths)[:, None]
    total = jnp.sum(jnp.where(real, logprobs, 0.0), axis=-1)
    share = jax.nn.softmax(total, axis=-1)
    return share @ jax.nn.one_hot(candidates.meaning, meanings)
