"""The two questions of the Reflective Emotional Reward, asked of the policy itself.

Coherence: which label does s1..s2 speak of, from the text alone. Consistency: does s1 describe the
image, yes or no. The judged text is the response's own tokens (`emor3_jax.rewards` cuts the span),
put between a head and a tail that were tokenised once; nothing is decoded.

Deviations, numbered:
 1. The image is not looked at again: the consistency question continues from the rollout's keys and
    values of the shared prefix (system turn and image). The constant head of the coherence
    questions is read once for the whole batch.
 2. The release re-tokenises the decoded text; here the policy reads the tokens that it wrote.
 3. Where a response has no such span, the question is still computed (shapes are static) and its
    reply is ignored.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.models.qwen2_5_vl.inputs import KV, Prompt
from emor3_jax.parallel.mesh import shard_rows
from emor3_jax.rollout import sampling
from emor3_jax.rollout.generate import Samples, SamplingRule, generate
from emor3_jax.rollout.likelihood import Candidates, probabilities


def join(
    head: jax.Array, text: jax.Array, text_lengths: jax.Array, tail: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Joins `head + text + tail` for ragged texts.

    Args:
      head: int32[H], may be empty.
      text: int32[B, G, S], right padded.
      text_lengths: int32[B, G].
      tail: int32[E], at least one token.

    Returns:
      int32[B, G, H + S + E] right padded with 0, and its lengths int32[B, G].
    """
    h, s, e = head.shape[0], text.shape[-1], tail.shape[0]
    place = jnp.arange(h + s + e)
    in_text = place - h
    in_tail = in_text - text_lengths[..., None]
    pieces = jnp.take_along_axis(text, jnp.clip(in_text, 0, s - 1)[None, None], axis=-1)
    joined = jnp.where(
        in_tail >= 0,
        jnp.where(in_tail < e, tail[jnp.clip(in_tail, 0, e - 1)], 0),
        pieces,
    )
    if h:
        joined = jnp.where(in_text < 0, head[jnp.clip(place, 0, h - 1)], joined)
    return joined, text_lengths + h + e


def shared_prefix(prefix: KV, shared_length: jax.Array) -> KV:
    """Returns the rollout's prefix cut to its first `shared_length` tokens: a mask, not a copy.

    Args:
      prefix: keys and values of the rollout's prompts.
      shared_length: int32[B], how many leading tokens the consistency question has in common.
    """
    common = jnp.arange(prefix.mask.shape[1]) < shared_length[:, None]
    return prefix._replace(mask=prefix.mask & common)


def ask_consistency(
    config: Config,
    params: dict,
    prefix: KV,
    shared_length: jax.Array,
    shared_position: jax.Array,
    head: jax.Array,
    tail: jax.Array,
    text: jax.Array,
    text_lengths: jax.Array,
    key: jax.Array,
    row: jax.Array,
    rule: SamplingRule,
    *,
    banned: jax.Array,
    dtype: jnp.dtype = jnp.float32,
) -> Samples:
    """Asks, with the image, whether each text describes it.

    Args:
      config, params: the policy.
      prefix: keys and values of the rollout's prompts.
      shared_length: int32[B], tokens of the prefix up to and with the image.
      shared_position: int32[B], the rope position that follows them.
      head, tail: int32[H], int32[E], the question around the text.
      text: int32[B, G, S], s1 of each response, right padded.
      text_lengths: int32[B, G].
      key: PRNG key.
      row: int32[B], which prompts of the step these are, for the noise.
      rule: how the reply is sampled.
      banned: bool[V].
      dtype: compute type of the layers.

    Returns:
      The replies.
    """
    question = _consistency_question(
        prefix, shared_length, shared_position, head, tail, text, text_lengths
    )
    noise = _noise(key, row, text.shape[1])
    return generate(config, params, *question, noise, rule, banned=banned, dtype=dtype)


def judge_consistency(
    config: Config,
    params: dict,
    prefix: KV,
    shared_length: jax.Array,
    shared_position: jax.Array,
    head: jax.Array,
    tail: jax.Array,
    text: jax.Array,
    text_lengths: jax.Array,
    candidates: Candidates,
    *,
    banned: jax.Array,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Returns how likely yes is beside no, float32[B, G], without sampling a reply.

    Args:
      candidates: spellings of yes (meaning 0) and of no (1).
      config, params, prefix, shared_length, shared_position, head, tail, text, text_lengths,
        banned, dtype: as in `ask_consistency`.
    """
    question = _consistency_question(
        prefix, shared_length, shared_position, head, tail, text, text_lengths
    )
    return probabilities(
        config, params, *question, candidates, meanings=2, banned=banned, dtype=dtype
    )[..., 0]


def _consistency_question(
    prefix: KV,
    shared_length: jax.Array,
    shared_position: jax.Array,
    head: jax.Array,
    tail: jax.Array,
    text: jax.Array,
    text_lengths: jax.Array,
) -> tuple[KV, jax.Array, jax.Array, jax.Array]:
    tokens, lengths = join(head, text, text_lengths, tail)
    position = jnp.broadcast_to(shared_position[:, None], lengths.shape)
    return shared_prefix(prefix, shared_length), tokens, lengths, position


def ask_coherence(
    config: Config,
    params: dict,
    head: jax.Array,
    tail: jax.Array,
    text: jax.Array,
    text_lengths: jax.Array,
    key: jax.Array,
    row: jax.Array,
    rule: SamplingRule,
    *,
    banned: jax.Array,
    dtype: jnp.dtype = jnp.float32,
) -> Samples:
    """Asks, from the text alone, which of the labels describes it best.

    Args:
      config, params: the policy.
      head: int32[H], H at least 1, the question up to the text; computed once for the whole batch.
      tail: int32[E], the question after the text.
      text: int32[B, G, S], s1..s2 of each response, right padded.
      text_lengths: int32[B, G].
      key, row, rule, banned, dtype: as in `ask_consistency`.

    Returns:
      The replies, [B, G, …].
    """
    question = _coherence_question(config, params, head, tail, text, text_lengths, dtype)
    noise = _noise(key, row, text.shape[1])
    return generate(config, params, *question, noise, rule, banned=banned, dtype=dtype)


def judge_coherence(
    config: Config,
    params: dict,
    head: jax.Array,
    tail: jax.Array,
    text: jax.Array,
    text_lengths: jax.Array,
    candidates: Candidates,
    *,
    meanings: int,
    banned: jax.Array,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Returns how likely each label is among all, float32[B, G, K], without sampling a reply.

    Args:
      candidates: spellings of each label; the meaning is the label's index.
      meanings: K.
      config, params, head, tail, text, text_lengths, banned, dtype: as in `ask_coherence`.
    """
    question = _coherence_question(config, params, head, tail, text, text_lengths, dtype)
    return probabilities(
        config, params, *question, candidates, meanings=meanings, banned=banned, dtype=dtype
    )


def _noise(key: jax.Array, row: jax.Array, responses: int) -> Callable[[jax.Array], jax.Array]:
    return lambda t: sampling.noise(key, row[:, None], jnp.arange(responses), t)


def _coherence_question(
    config: Config,
    params: dict,
    head: jax.Array,
    tail: jax.Array,
    text: jax.Array,
    text_lengths: jax.Array,
    dtype: jnp.dtype,
) -> tuple[KV, jax.Array, jax.Array, jax.Array]:
    """The head is read once; a copy of its keys for each prompt keeps groups on their devices."""
    b, _, _ = text.shape
    h = head.shape[0]
    prompt = Prompt(
        tokens=head[None],
        positions=jnp.broadcast_to(jnp.arange(h)[None, :, None], (1, h, 3)),
        mask=jnp.ones((1, h), bool),
        image_slots=jnp.full((1, h), -1),
    )
    _, prefix = model.forward_prompt(config, params, prompt, None, dtype=dtype)
    copies = KV(*(
        shard_rows(axis, jnp.repeat(x, b, axis))
        for axis, x in zip((1, 1, 0), prefix, strict=True)
    ))  # fmt: skip
    tokens, lengths = join(jnp.zeros((0,), jnp.int32), text, text_lengths, tail)
    return copies, tokens, lengths, jnp.full(lengths.shape, h)
