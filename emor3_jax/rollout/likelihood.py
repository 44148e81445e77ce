"""Likelihoods of a few short replies, without sampling any of them.

The question is read once; all candidates are then read at once behind it, each seeing the question
and itself. Nothing is copied for them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from emor3_jax.models.policy import Policy
from emor3_jax.rollout.generate import Opening, read_opening


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
    policy: Policy,
    params: dict,
    opening: Opening,
    candidates: Candidates,
    count: int,
    suppressed: jax.Array,
) -> jax.Array:
    """Returns the share of each meaning in the likelihood of all candidates.

    Args:
      policy, params: the policy.
      opening: the question behind its prefix.
      candidates: the replies.
      count: K, number of meanings.
      suppressed: bool[V], ids of probability zero.

    Returns:
      float32[B, G, K], sums to 1 over K.
    """
    last, cache = read_opening(policy, params, opening, opening.tokens.shape[-1])
    tokens = jnp.asarray(candidates.tokens)
    n, size = tokens.shape
    b, g = opening.lengths.shape
    behind = policy.extend_each(
        params, opening.prefix, cache, tokens[:, :-1], opening.positions + opening.lengths
    )
    # The states from which each token of each candidate is predicted.
    states = jnp.concatenate(
        [jnp.broadcast_to(last[:, :, None, None], (b, g, n, 1, last.shape[-1])), behind], axis=3
    )
    logprobs, _ = policy.logprobs(
        params, states, jnp.broadcast_to(tokens, (b, g, n, size)), suppressed=suppressed
    )
    real = jnp.arange(size) < jnp.asarray(candidates.lengths)[:, None]
    total = jnp.sum(jnp.where(real, logprobs, 0.0), axis=-1)
    share = jax.nn.softmax(total, axis=-1)
    return share @ jax.nn.one_hot(candidates.meaning, count)
