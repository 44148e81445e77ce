"""The questions of the Reflective Emotional Reward, asked of the policy itself or of a judge.

The judged text is the response's own tokens (`rewards.cut_spans`), put between a head and a tail
that were tokenised once; nothing is decoded, but for a judge that lacks these tokens
(`rollout.retokenize`).

Deviations, numbered:
 1. The image is not encoded again: a question with the image continues from the rollout's keys and
    values of the shared prefix (system turn and image). The constant head of a question without it
    is read once for the whole batch.
 2. The release re-tokenises the decoded text; here the policy reads the tokens that it wrote.
 3. Where a response has no such span, the question is still computed (shapes are static) and its
    reply is ignored.
 4. The host reads the lengths of the texts to judge, to choose among a few padded lengths
    (`reflect.text_lengths`); otherwise short texts would pay for the longest response possible.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from emor3_jax.data.prompts import PromptTemplates, reflection_parts
from emor3_jax.models.cache import KV
from emor3_jax.models.policy import Policy
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import shard_rows
from emor3_jax.parallel.program import (
    Program,
    Programs,
    by_prompts,
    by_prompts_and_whole,
    laid_out,
)
from emor3_jax.rewards.questions import QUESTIONS, Question
from emor3_jax.rewards.reward import flatten
from emor3_jax.rewards.spans import Span
from emor3_jax.rewards.tables import Tables, cut_spans
from emor3_jax.rollout.generate import Opening, generate
from emor3_jax.rollout.likelihood import Candidates, make_candidates, probabilities
from emor3_jax.rollout.retokenize import Retokenizer, widened
from emor3_jax.rollout.sampling import Sampling, noise
from emor3_jax.types import Prompt, Replies, ReplyProbs, Samples, bucket


class PromptedQuestion(NamedTuple):
    """A question in the tokens of a policy.

    Attributes:
      question: the row of `QUESTIONS`.
      head, tail: int32[H] and int32[E], the tokens around the judged text; with the image the head
        may be empty.
      candidates: spellings of the replies that are told apart.
    """

    question: Question
    head: np.ndarray
    tail: np.ndarray
    candidates: Candidates


class Reflection(NamedTuple):
    """Settings of the reflections.

    Attributes:
      questions: in the order in which they are asked.
      sampling: of the replies.
      text_lengths: rising padded lengths of the judged texts.
      soft: score replies by their probability instead of sampling them.
      retokenizer: writes the judged texts in the tokens of a judge; None leaves them as they are.
    """

    questions: tuple[PromptedQuestion, ...]
    sampling: Sampling
    text_lengths: tuple[int, ...]
    soft: bool = False
    retokenizer: Retokenizer | None = None

    def sizes(self, response_tokens: int) -> tuple[int, ...]:
        """Returns rising padded lengths of the texts of responses of so many tokens."""
        if self.retokenizer is None:
            return (*self.text_lengths, response_tokens)
        return tuple(sorted({*self.text_lengths, response_tokens}))


class Asked(NamedTuple):
    """The arrays of one question about each response.

    Attributes:
      prefix: keys and values of the rollout's prompts, None without the image.
      shared_length: int32[B], tokens of the prefix up to and with the image, or None.
      shared_position: int32[B], the rope position that follows them, or None.
      head, tail: int32[H] and int32[E], tokens around the text.
      text: int32[B, G, S], right padded.
      text_lengths: int32[B, G].
    """

    prefix: KV | None
    shared_length: jax.Array | None
    shared_position: jax.Array | None
    head: jax.Array
    tail: jax.Array
    text: jax.Array
    text_lengths: jax.Array


def prompt_questions(
    tokenizer: PreTrainedTokenizerBase,
    templates: PromptTemplates,
    labels: Sequence[str],
    listed: Sequence[str] = (),
) -> tuple[PromptedQuestion, ...]:
    """Tokenises the questions of a label set.

    Args:
      tokenizer: of the policy.
      templates: of the questions.
      labels: the label set.
      listed: the labels in the order in which the questions list them; that of `labels` if empty.
    """
    found = []
    for name, question in QUESTIONS.items():
        template = templates.reflections[name]
        parts = reflection_parts(tokenizer, template, listed or labels, question.with_image)
        spellings = [[word.lower(), word.capitalize()] for word in question.meanings(labels)]
        head, tail = (np.asarray(part, np.int32) for part in parts)
        candidates = make_candidates(tokenizer, spellings)
        found.append(PromptedQuestion(question, head, tail, candidates))
    return tuple(found)


def reflect(
    policy: Policy,
    params: dict,
    reflection: Reflection,
    tables: Tables,
    prompts: tuple[KV, jax.Array, jax.Array],
    samples: Samples,
    noise_of: tuple[jax.Array, jax.Array],
    suppressed: jax.Array,
) -> Replies | ReplyProbs:
    """Asks all questions about each response.

    Args:
      policy, params: who is asked.
      reflection: the questions and how to ask them.
      tables: of the label set, for the spans.
      prompts: its keys and values, `shared_length` and `shared_position` of the prompts.
      samples: the responses to these prompts.
      noise_of: PRNG key, and int32[B], index in the step of each prompt.
      suppressed: bool[V], ids never sampled.
    """
    key, rows = noise_of
    spans, longest = find_spans(tables, samples)
    sizes = reflection.sizes(samples.tokens.shape[-1])
    if reflection.retokenizer is not None:
        spans, longest = reflection.retokenizer(spans, sizes)
    keys = jax.random.split(key, len(reflection.questions))
    judged = [spans[prompted.question.span] for prompted in reflection.questions]
    longest = hosts.fetch([longest[prompted.question.span] for prompted in reflection.questions])
    replies: dict[str, Any] = {}
    for i, (prompted, span, most) in enumerate(
        zip(reflection.questions, judged, longest, strict=True)
    ):
        asked = Asked(
            *(prompts if prompted.question.with_image else (None, None, None)),
            prompted.head,
            prompted.tail,
            span.tokens,
            span.lengths,
        )
        size = bucket(int(most), sizes)
        if reflection.soft:
            count = int(prompted.candidates.meaning.max()) + 1
            reply = weigh(
                policy, params, asked, prompted.candidates, suppressed, count=count, size=size
            )
        else:
            reply = ask(
                policy, params, asked, keys[i], rows, reflection.sampling, suppressed, size=size
            )
        replies[prompted.question.name] = reply
    names = [prompted.question.name for prompted in reflection.questions]
    found = {name: span.found for name, span in zip(names, judged, strict=True)}
    lengths = {name: span.lengths for name, span in zip(names, judged, strict=True)}
    return (ReplyProbs if reflection.soft else Replies)(replies, found, lengths)


def reflect_programs(
    policy: Policy,
    params: Any,
    reflection: Reflection,
    tables: Tables,
    prompts: tuple[Any, Any, Any],
    samples: Samples,
    noise_of: tuple[Any, Any],
    suppressed: Any,
) -> Programs:
    """Yields the programs of `reflect` at the longest texts; arguments as there, but abstract."""
    key, rows = noise_of
    spans, _ = yield Program("spans", find_spans, (tables, samples))
    sizes = reflection.sizes(samples.tokens.shape[-1])
    size = bucket(samples.tokens.shape[-1], sizes)
    if reflection.retokenizer is not None:
        size = sizes[-1]
        spans = tuple(widened(span, size) for span in spans)
    replies, found, lengths = {}, {}, {}
    for prompted in reflection.questions:
        name, span = prompted.question.name, spans[prompted.question.span]
        shared = prompts if prompted.question.with_image else (None, None, None)
        asked = Asked(*shared, prompted.head, prompted.tail, span.tokens, span.lengths)
        if reflection.soft:
            args = policy, params, asked, prompted.candidates, suppressed
            count = int(prompted.candidates.meaning.max()) + 1
            program = Program(name, weigh, args, {"count": count, "size": size})
        else:
            args = policy, params, asked, key, rows, reflection.sampling, suppressed
            program = Program(name, ask, args, {"size": size})
        replies[name] = yield program
        found[name], lengths[name] = span.found, span.lengths
    return (ReplyProbs if reflection.soft else Replies)(replies, found, lengths)


@jax.jit
@laid_out(by_prompts_and_whole)
def find_spans(tables: Tables, samples: Samples) -> tuple[tuple[Span, ...], tuple[jax.Array, ...]]:
    """Returns the judged parts of responses, [B, G, …] each, and the longest of each, int32[]."""
    shape = samples.lengths.shape
    spans = cut_spans(tables, *flatten(samples))
    spans = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), spans)
    return spans, tuple(span.lengths.max() for span in spans)


@partial(jax.jit, static_argnames=("policy", "sampling", "size"))
@laid_out(by_prompts)
def ask(
    policy: Policy,
    params: dict,
    asked: Asked,
    key: jax.Array,
    rows: jax.Array,
    sampling: Sampling,
    suppressed: jax.Array,
    *,
    size: int,
) -> Samples:
    """Samples a reply to a question about each response.

    Args:
      policy, params: the policy.
      asked: the question.
      key: PRNG key.
      rows: int32[B], index in the step of each prompt, for the noise.
      sampling: of the replies.
      suppressed: bool[V], ids never sampled.
      size: padded length of the texts, at least the longest.

    Returns:
      The replies, [B, G, R].
    """
    responses = jnp.arange(asked.text.shape[1])

    def numbers(t: jax.Array) -> jax.Array:
        return noise(key, rows[:, None], responses, t)

    opening = open_question(policy, params, asked, size)
    return generate(policy, params, opening, numbers, sampling, suppressed)


@partial(jax.jit, static_argnames=("policy", "count", "size"))
@laid_out(by_prompts)
def weigh(
    policy: Policy,
    params: dict,
    asked: Asked,
    candidates: Candidates,
    suppressed: jax.Array,
    *,
    count: int,
    size: int,
) -> jax.Array:
    """Returns the probability of each meaning of a reply among all, without sampling one.

    Args:
      policy, params: the policy.
      asked: the question.
      candidates: spellings of each meaning.
      suppressed: bool[V], ids of probability zero.
      count: K, number of meanings.
      size: padded length of the texts, at least the longest.

    Returns:
      float32[B, G, K], sums to 1 over K.
    """
    opening = open_question(policy, params, asked, size)
    return probabilities(policy, params, opening, candidates, count, suppressed)


def open_question(policy: Policy, params: dict, asked: Asked, size: int) -> Opening:
    """Returns the question about each response behind its prefix; `size` as of `ask`."""
    asked = asked._replace(text=asked.text[..., :size])
    if asked.prefix is not None:
        tokens, lengths = join_text(asked.head, asked.text, asked.text_lengths, asked.tail)
        position = jnp.broadcast_to(asked.shared_position[:, None], lengths.shape)
        prefix = shared_prefix(asked.prefix, asked.shared_length)
        return Opening(prefix, tokens, lengths, position)
    # The head is read once; a copy of its keys for each prompt keeps groups on their devices.
    b, h = len(asked.text), asked.head.shape[0]
    prompt = Prompt(
        tokens=asked.head[None],
        positions=jnp.broadcast_to(jnp.arange(h)[None, :, None], (1, h, 3)),
        mask=jnp.ones((1, h), bool),
        image_slots=jnp.full((1, h), -1),
    )
    prefix = policy.prefill(params, prompt, None)
    copies = KV(*(
        shard_rows(axis, jnp.repeat(x, b, axis))
        for axis, x in zip((1, 1, 0), prefix, strict=True)
    ))  # fmt: skip
    empty = jnp.zeros((0,), jnp.int32)
    tokens, lengths = join_text(empty, asked.text, asked.text_lengths, asked.tail)
    return Opening(copies, tokens, lengths, jnp.full(lengths.shape, h))


def join_text(
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
    index = jnp.arange(h + s + e)
    in_text = index - h
    in_tail = in_text - text_lengths[..., None]
    pieces = jnp.take_along_axis(text, jnp.clip(in_text, 0, s - 1)[None, None], axis=-1)
    joined = jnp.where(
        in_tail >= 0,
        jnp.where(in_tail < e, tail[jnp.clip(in_tail, 0, e - 1)], 0),
        pieces,
    )
    if h:
        joined = jnp.where(in_text < 0, head[jnp.clip(index, 0, h - 1)], joined)
    return joined, text_lengths + h + e


def shared_prefix(prefix: KV, shared_length: jax.Array) -> KV:
    """Returns the rollout's prefix cut to its first `shared_length` tokens: a mask, not a copy.

    Args:
      prefix: keys and values of the rollout's prompts.
      shared_length: int32[B], leading tokens that a question with the image has in common.
    """
    common = jnp.arange(prefix.mask.shape[1]) < shared_length[:, None]
    return prefix._replace(mask=prefix.mask & common)
