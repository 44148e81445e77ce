"""One episode: answer the prompts, ask both reflections, score everything; to train and to test.

    samples, replies = actor.run(params, batch, key, ...)
    scores           = actor.score(batch, samples, replies)

A few prompts at a time leave the rollout (`rollout.engine`) and are judged while their keys are
still there; then other prompts take their place. The arrays stay on the device.

Deviations, numbered:
 1. The host reads the lengths of the texts to judge, to choose among a few padded lengths
    (`reflect.text_lengths`); otherwise short texts would pay for the longest response possible.
 2. Where a response has no text to judge, the paper's profile scores 0 and the release's scores as
    its stand-in reply "None" would (`emor3_jax.rewards`).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from emor3_jax import rewards
from emor3_jax.data.batch import Batch, take_part
from emor3_jax.data.prompts import PromptTemplates, reflection_parts
from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.models.qwen2_5_vl.inputs import KV
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import shard_rows
from emor3_jax.rewards.terms import Term
from emor3_jax.rollout import engine, reflect
from emor3_jax.rollout.engine import ALL_AT_ONCE, Finished, Opening, Plan
from emor3_jax.rollout.generate import Samples, SamplingRule
from emor3_jax.rollout.likelihood import make_candidates

BOXED = r"(?s)\\boxed\{.*\}"
"""The format of a plain answer: a box that is closed, wherever it stands."""

NOTHING_TO_JUDGE = -3
"""`Scores.inferred` of a response without a text for the coherence question, or not asked."""


class Replies(NamedTuple):
    """What the policy said of its own responses.

    Attributes:
      coherence, consistency: the replies, [B, G, R].
      coherence_found, consistency_found: bool[B, G], whether there was a text to judge.
      coherence_length, consistency_length: int32[B, G], tokens of the text.
    """

    coherence: Samples
    consistency: Samples
    coherence_found: jax.Array
    consistency_found: jax.Array
    coherence_length: jax.Array
    consistency_length: jax.Array


class Judgement(NamedTuple):
    """What the policy would say of its own responses, as probabilities instead of replies.

    Attributes:
      labels: float32[B, G, K], how likely each label is among all.
      yes: float32[B, G], how likely yes is beside no.
      coherence_found, consistency_found: bool[B, G], whether there was a text to judge.
      coherence_length, consistency_length: int32[B, G], tokens of the text.
    """

    labels: jax.Array
    yes: jax.Array
    coherence_found: jax.Array
    consistency_found: jax.Array
    coherence_length: jax.Array
    consistency_length: jax.Array


class Scores(NamedTuple):
    """Scores of responses, float32[B, G] each but for the last three.

    Attributes:
      overall, format, accuracy, coherence, consistency: in [0, 1] (release: overall up to 1.1);
        where no reflection is asked, coherence and consistency are 0 (paper) or 1 (release);
        accuracy is graded where the data set is (`Batch.grades`).
      answer: int32[B, G], index of the boxed label, -1 where there is none.
      inferred: int32[B, G], index of the label that the policy inferred from s1..s2, negative
        where the reply was no label, `NOTHING_TO_JUDGE` where it was not asked.
      terms: name → float32[B, G], reward terms of one's own, before their weights.
    """

    overall: jax.Array
    format: jax.Array
    accuracy: jax.Array
    coherence: jax.Array
    consistency: jax.Array
    answer: jax.Array
    inferred: jax.Array
    terms: dict[str, jax.Array]

    def named(self) -> dict[str, jax.Array]:
        """Returns the scores by name, terms of one's own among them."""
        names = ("overall", "format", "accuracy", "coherence", "consistency")
        return {name: getattr(self, name) for name in names} | self.terms


def bucket(size: int, sizes: Sequence[int]) -> int:
    """Returns the smallest of rising `sizes` that holds `size`, the last one if none does."""
    return next((s for s in sizes if size <= s), sizes[-1])


def banned_ids(config: Config, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Returns bool[V], ids that a response may never contain.

    These are the image and vision ids (a sampled image token has no image), the other special
    tokens that do not end a turn, and the ids of a padded vocabulary that stand for nothing.

    Args:
      config: of the policy.
      tokenizer: its tokenizer.
    """
    banned = np.ones(config.vocab_size, bool)
    banned[: min(len(tokenizer), config.vocab_size)] = False
    banned[list(tokenizer.added_tokens_decoder)] = True
    banned[list(stop_ids(tokenizer))] = False
    return banned


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the ids that end a response: the end of the turn and the end of the text."""
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    return tuple(i for i in ids if i is not None)


def score_options(
    profile: str,
    coherence_target: str,
    lambda_reflect: float,
    lambda_format: float,
    terms: tuple[Term, ...] = (),
    *,
    boxed: bool = False,
    reflection: str = "both",
) -> dict[str, Any]:
    """Returns the static arguments of the program that scores; arguments of `Actor`."""
    return {
        "profile": profile,
        "answer_is_target": coherence_target == "answer",
        "lambda_reflect": lambda_reflect,
        "lambda_format": lambda_format,
        "terms": terms,
        "boxed": boxed,
        "reflection": reflection,
    }


class Actor:
    """Answers, judges and scores for one label set; holds no parameters."""

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        templates: PromptTemplates,
        *,
        profile: str,
        coherence_target: str,
        lambda_reflect: float,
        lambda_format: float,
        reflect_rule: SamplingRule | None,
        text_lengths: Sequence[int],
        dtype: jnp.dtype,
        soft: bool = False,
        terms: Sequence[Term] = (),
        format: str = "set",
        reflection: str = "both",
        table_cache: str = "",
    ) -> None:
        """Prepares the reward tables and the two questions.

        Args:
          config: of the policy.
          tokenizer: its tokenizer.
          labels: the label set.
          templates: the prompt templates.
          profile: "paper" or "release".
          coherence_target: "label" or "answer".
          lambda_reflect, lambda_format: weights of the reward.
          reflect_rule: how replies are sampled; None asks no reflection.
          text_lengths: rising padded lengths of the judged texts.
          dtype: compute type.
          soft: score replies by their likelihood instead of sampling them.
          terms: reward terms of one's own.
          format: "set", or "boxed": the format score asks for a closed box alone.
          reflection: "both", or the one score that has the reflection's whole weight: "coherence"
            or "consistency".
          table_cache: folder where reward tables are kept; "" keeps none.
        """
        self.config, self.tokenizer, self.labels = config, tokenizer, tuple(labels)
        self.dtype, self.rule, self.text_lengths = dtype, reflect_rule, tuple(text_lengths)
        self.terms = tuple(terms)
        patterns = [BOXED] if format == "boxed" else []
        patterns += [term.pattern for term in terms if term.pattern]
        scorer = rewards.Scorer(tokenizer, labels, profile, patterns=patterns, cache=table_cache)
        self.tables = scorer.tables
        self.banned = banned_ids(config, tokenizer)
        self.coherence_parts, self.consistency_parts = (
            tuple(
                np.asarray(part, np.int32)
                for part in reflection_parts(tokenizer, template, labels, with_image=with_image)
            )
            for template, with_image in (
                (templates.coherence, False),
                (templates.consistency, True),
            )
        )
        self._merge = config.vision.merge_unit
        self.soft = soft
        self.candidates = tuple(
            make_candidates(tokenizer, [[word.lower(), word.capitalize()] for word in words])
            for words in (self.labels, ("yes", "no"))
        )
        self.score_options = score_options(
            profile,
            coherence_target,
            lambda_reflect,
            lambda_format,
            self.terms,
            boxed=format == "boxed",
            reflection=reflection,
        )

    def run(
        self,
        params: dict,
        batch: Batch,
        key: jax.Array,
        *,
        responses: int,
        rule: SamplingRule,
        plan: Plan = ALL_AT_ONCE,
        parts: int = 1,
        mark: Callable[[str, Any], None] = lambda phase, arrays: None,
    ) -> tuple[Samples, Replies | Judgement | None]:
        """Samples `responses` answers to each prompt and asks both questions about each.

        Args:
          params: of the policy; cast once for all tokens to the type of the arithmetic.
          batch: B prompts.
          key: PRNG key.
          responses: G.
          rule: how responses are sampled.
          plan: how much is in flight at once.
          parts: how many parts the devices cut the prompts into.
          mark: told of each phase ("rollout", "reflect") and the arrays that it ends with.

        Returns:
          The responses, [B, G, T], and what was said of them; None if reflection is switched off.
        """
        params = model.cast_for_decoding(params, self.dtype)
        of_rollout, of_reflection = jax.random.split(key)
        found, rows = [], []
        for each in self._roll_out(params, batch, of_rollout, responses, rule, plan, parts):
            mark("rollout", each.samples)
            replies = self.reflect(
                params, batch, each.prefix, each.samples, of_reflection, row=each.row
            )
            mark("reflect", replies)
            found.append((each.samples, replies))
            rows.append(each.row)
        return _in_order(found, np.concatenate(rows))

    def roll_out(
        self, params: dict, batch: Batch, key: jax.Array, *, responses: int, rule: SamplingRule
    ) -> tuple[KV, Samples]:
        """Samples `responses` answers to each prompt; returns the prompts' keys and values too."""
        params = model.cast_for_decoding(params, self.dtype)
        (all_at_once,) = self._roll_out(params, batch, key, responses, rule, ALL_AT_ONCE, 1)
        return all_at_once.prefix, all_at_once.samples

    def _roll_out(
        self,
        params: dict,
        batch: Batch,
        key: jax.Array,
        responses: int,
        rule: SamplingRule,
        plan: Plan,
        parts: int,
    ) -> Iterator[Finished]:
        prompts = len(batch.last_token)

        def openings() -> Iterator[Opening]:
            size = min(plan.refill or plan.slots or prompts, prompts)
            waves = prompts // size
            for wave in range(waves):
                rows = np.arange(wave, prompts, waves, dtype=np.int32)
                part = take_part(batch, wave, waves, self._merge)
                prefix = _prefill(params, part, config=self.config, dtype=self.dtype)
                yield Opening(rows, part.last_token, part.next_position, prefix)

        return engine.roll_out(
            openings(),
            prompts,
            key,
            params,
            self.banned,
            config=self.config,
            responses=responses,
            rule=rule,
            plan=plan,
            parts=parts,
            dtype=self.dtype,
        )

    def reflect(
        self,
        params: dict,
        batch: Batch,
        prefix: KV,
        samples: Samples,
        key: jax.Array,
        *,
        row: np.ndarray | None = None,
    ) -> Replies | Judgement | None:
        """Asks both questions about each response; None if reflection is switched off.

        Args:
          params: of the policy.
          batch: the prompts of the step.
          prefix: keys and values of all of them, or of some.
          samples: responses to the same prompts.
          key: PRNG key.
          row: int32[R], which prompts of the step these are, by default all in order.
        """
        if self.rule is None:
            return None
        coherence, consistency = _spans(self.tables, samples)
        keys = jax.random.split(key)
        longest = hosts.fetch([coherence.lengths.max(), consistency.lengths.max()])
        sizes = (*self.text_lengths, coherence.tokens.shape[-1])
        coherence_text, consistency_text = (
            span.tokens[..., : bucket(int(size), sizes)]
            for span, size in zip((coherence, consistency), longest, strict=True)
        )
        of_text = self.config, params, *self.coherence_parts, coherence_text, coherence.lengths
        shared = batch.shared_length, batch.shared_position
        if row is not None:
            shared = _take_rows(shared, row)
        of_image = (
            self.config,
            params,
            prefix,
            *shared,
            *self.consistency_parts,
            consistency_text,
            consistency.lengths,
        )
        options = {"banned": self.banned, "dtype": self.dtype}
        found = coherence.found, consistency.found, coherence.lengths, consistency.lengths
        if self.soft:
            labels, yes_no = self.candidates
            return Judgement(
                _judge_coherence(*of_text, labels, meanings=len(self.labels), **options),
                _judge_consistency(*of_image, yes_no, **options),
                *found,
            )
        row = np.arange(len(samples.lengths), dtype=np.int32) if row is None else row
        return Replies(
            _ask_coherence(*of_text, keys[0], row, self.rule, **options),
            _ask_consistency(*of_image, keys[1], row, self.rule, **options),
            *found,
        )

    def score(self, batch: Batch, samples: Samples, replies: Replies | Judgement | None) -> Scores:
        """Scores each response by the rules of the profile."""
        said = self._read_texts(batch, samples)
        return _score(
            self.tables,
            batch.answers,
            batch.grades,
            samples,
            replies,
            said,
            **self.score_options,
        )

    def _read_texts(self, batch: Batch, samples: Samples) -> dict[str, np.ndarray]:
        """Returns the terms that are functions of the text, float32[B, G] each."""
        terms = [term for term in self.terms if term.text]
        if not terms:
            return {}
        tokens, lengths, answers = hosts.fetch((samples.tokens, samples.lengths, batch.answers))
        shape = lengths.shape
        said = {term.name: np.zeros(shape, np.float32) for term in terms}
        for at in np.ndindex(shape):
            text = self.tokenizer.decode(tokens[at][: lengths[at]], skip_special_tokens=True)
            for term in terms:
                said[term.name][at] = term.text(text, self.labels[answers[at[0]]])
        return said


@partial(jax.jit, static_argnames=("config", "dtype"))
def _prefill(params: dict, batch: Batch, *, config: Config, dtype: jnp.dtype) -> KV:
    features = model.encode_images(config, params, batch.images, dtype=dtype)
    return model.forward_prompt(
        config, params, batch.prompt, features, dtype=dtype, images_by_prompt=True
    )[1]


def _in_order(found: list, rows: np.ndarray) -> Any:
    """Joins what was found for some prompts each, in the order of the prompts."""
    if len(found) == 1 and (rows == np.arange(len(rows))).all():
        return found[0]
    return _join(found, np.argsort(rows))


@jax.jit
def _join(found: list, order: jax.Array) -> Any:
    return jax.tree.map(lambda *x: shard_rows(0, jnp.concatenate(x)[order]), *found)


@jax.jit
def _take_rows(tree: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda x: shard_rows(0, jnp.take(x, rows, axis=0)), tree)


@jax.jit
def _spans(tables: rewards.Tables, samples: Samples) -> tuple[rewards.Span, rewards.Span]:
    shape = samples.lengths.shape
    flat = samples.tokens.reshape(-1, samples.tokens.shape[-1]), samples.lengths.reshape(-1)
    spans = rewards.cut_spans(tables, *flat)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), spans)


_ask_coherence, _ask_consistency = (
    jax.jit(ask, static_argnames=("config", "rule", "dtype"))
    for ask in (reflect.ask_coherence, reflect.ask_consistency)
)
_judge_coherence = jax.jit(reflect.judge_coherence, static_argnames=("config", "meanings", "dtype"))
_judge_consistency = jax.jit(reflect.judge_consistency, static_argnames=("config", "dtype"))


@partial(
    jax.jit,
    static_argnames=(
        "profile",
        "answer_is_target",
        "lambda_reflect",
        "lambda_format",
        "terms",
        "boxed",
        "reflection",
    ),
)
def _score(
    tables: rewards.Tables,
    answers: jax.Array,
    grades: jax.Array | None,
    samples: Samples,
    replies: Replies | Judgement | None,
    said: dict[str, jax.Array],
    *,
    profile: str,
    answer_is_target: bool,
    lambda_reflect: float,
    lambda_format: float,
    terms: tuple[Term, ...],
    boxed: bool,
    reflection: str,
) -> Scores:
    shape = samples.lengths.shape

    def flat(s: Samples) -> tuple[jax.Array, jax.Array]:
        return s.tokens.reshape(-1, s.tokens.shape[-1]), s.lengths.reshape(-1)

    format_, answer, *matches = (
        x.reshape(shape) for x in rewards.score_response(tables, *flat(samples))
    )
    if boxed:
        format_ = matches.pop(0)
    label = jnp.broadcast_to(answers[:, None], shape)
    accuracy = rewards.graded_accuracy(answer, grades)
    if replies is None:
        coherence = consistency = jnp.full(shape, float(profile == "release"))
        inferred = jnp.full(shape, NOTHING_TO_JUDGE)
    elif isinstance(replies, Judgement):
        inferred = jnp.argmax(replies.labels, axis=-1)
        inferred = jnp.where(replies.coherence_found, inferred, NOTHING_TO_JUDGE)
        target = answer if answer_is_target else label
        coherence, consistency = rewards.soft_scores(
            replies.labels,
            replies.yes,
            target,
            replies.coherence_found,
            replies.consistency_found,
            profile,
        )
    else:
        inferred = rewards.read_label(tables, *flat(replies.coherence)).reshape(shape)
        inferred = jnp.where(replies.coherence_found, inferred, NOTHING_TO_JUDGE)
        target = answer if answer_is_target else label
        coherence = rewards.coherence_score(inferred, target, replies.coherence_found, profile)
        consistency = rewards.consistency_score(
            rewards.read_yes_no(tables, *flat(replies.consistency)).reshape(shape),
            replies.consistency_found,
            profile,
        )
    overall = rewards.combine(
        format_,
        accuracy,
        consistency if reflection == "consistency" else coherence,
        coherence if reflection == "coherence" else consistency,
        profile=profile,
        lambda_reflect=lambda_reflect,
        lambda_format=lambda_format,
        reflect=replies is not None,
    )
    group = rewards.Group(
        samples.tokens, samples.lengths, answers, answer, format_, accuracy, coherence, consistency
    )
    values = {}
    for term in terms:
        if term.pattern:
            values[term.name] = matches.pop(0)
        elif term.function:
            values[term.name] = jnp.broadcast_to(term.function(group), shape).astype(jnp.float32)
        else:
            values[term.name] = said[term.name]
        overall += term.weight * values[term.name]
    return Scores(overall, format_, accuracy, coherence, consistency, answer, inferred, values)
