"""The reward: the one place where format, accuracy and reflections become a number."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from emor3_jax.parallel.program import by_prompts, laid_out
from emor3_jax.rewards.combine import check_profile, combine, graded_accuracy
from emor3_jax.rewards.questions import QUESTIONS, Question
from emor3_jax.rewards.shaping import overlong
from emor3_jax.rewards.tables import Tables, read_reply, score_response
from emor3_jax.rewards.terms import BOXED, Group, Term, TermError
from emor3_jax.types import NOTHING_TO_JUDGE, Replies, ReplyProbs, Samples, Scores


@dataclass(frozen=True)
class Reward:
    """Rules and weights of the reward; hashable.

    Attributes:
      profile: "paper" or "release".
      coherence_target: "label", or "answer": the response's own boxed answer.
      lambda_reflect, lambda_format: weights of the reflections and of the format.
      terms: custom reward terms.
      format: "set", or "boxed": the format score asks for a closed box alone.
      reflection: "both", or the name of the one question that has the reflections' whole weight.
      overlong: (limit, buffer, weight) of the over-long penalty (`shaping`), or None.
    """

    profile: str = "paper"
    coherence_target: str = "label"
    lambda_reflect: float = 0.1
    lambda_format: float = 0.1
    terms: tuple[Term, ...] = ()
    format: str = "set"
    reflection: str = "both"
    overlong: tuple[int, int, float] | None = None

    def __post_init__(self) -> None:
        check_profile(self.profile)
        if self.coherence_target not in ("label", "answer"):
            raise ValueError(
                f"coherence_target={self.coherence_target!r}: must be 'label' or 'answer'"
            )
        if self.format not in ("set", "boxed"):
            raise ValueError(f"format={self.format!r}: must be 'set' or 'boxed'")
        if self.reflection not in ("both", *QUESTIONS):
            raise ValueError(
                f"reflection={self.reflection!r}: must be 'both' or one of {', '.join(QUESTIONS)}"
            )
        weights = self.lambda_reflect, self.lambda_format
        if min(weights) < 0 or sum(weights) > 1:
            raise ValueError(
                f"lambda_reflect={weights[0]}, lambda_format={weights[1]}: must be 0 or more, and "
                "together at most 1"
            )
        if self.overlong is not None and self.overlong[1] < 1:
            raise ValueError(f"overlong={self.overlong}: the buffer must be at least 1 token")
        for term in self.terms:
            if sum(map(bool, (term.pattern, term.function, term.text))) != 1:
                raise TermError(
                    f"term {term.name!r}: give exactly one of pattern, function and text"
                )

    @property
    def patterns(self) -> tuple[str, ...]:
        """Regular expressions that the tables must hold, in order."""
        boxed = (BOXED,) if self.format == "boxed" else ()
        return (*boxed, *(term.pattern for term in self.terms if term.pattern))

    @property
    def questions(self) -> tuple[Question, ...]:
        """Questions in the order of the weights: those that count, as often as they count."""
        if self.reflection == "both":
            return tuple(QUESTIONS.values())
        return (QUESTIONS[self.reflection],) * len(QUESTIONS)

    def weights(self, reflect: bool = True) -> dict[str, float]:
        """Returns name of a score → its weight in `Scores.overall`.

        Args:
          reflect: the questions were asked.
        """
        one = self.lambda_reflect / (len(self.questions) if self.profile == "paper" else 1)
        found = {
            "format": self.lambda_format,
            "accuracy": 1 - self.lambda_reflect - self.lambda_format,
        }
        if not reflect and self.profile == "paper":
            found["accuracy"] += self.lambda_reflect
        for question in self.questions if reflect or self.profile == "release" else ():
            found[question.name] = found.get(question.name, 0.0) + one
        return found | {term.name: term.weight for term in self.terms}

    def __call__(
        self,
        tables: Tables,
        answers: jax.Array,
        grades: jax.Array,
        samples: Samples,
        replies: Replies | ReplyProbs | None,
        texts: dict[str, jax.Array] | None = None,
    ) -> Scores:
        """Scores each response by the rules of the profile.

        Args:
          tables: of the tokenizer and label set, with `patterns`.
          answers: int32[B], index of the label.
          grades: float32[B, K], the accuracy of each label as an answer.
          samples: the responses.
          replies: the reflections, None if no question was asked.
          texts: name → float32[B, G], the terms that are functions of the text.
        """
        return score_jitted(self, tables, answers, grades, samples, replies, texts or {})

    def shape(self, scores: Scores, samples: Samples) -> jax.Array:
        """Returns the rewards that advantages compare, float32[B, G]."""
        if self.overlong is None:
            return scores.overall
        return shape_jitted(self.overlong, scores.overall, samples.lengths)


@partial(jax.jit, static_argnums=0)
@laid_out(by_prompts)
def shape_jitted(
    penalty: tuple[int, int, float], overall: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Returns `Reward.shape` with an over-long penalty, jitted."""
    limit, buffer, weight = penalty
    return overall + weight * overlong(lengths, limit=limit, buffer=buffer)


def flatten(samples: Samples) -> tuple[jax.Array, jax.Array]:
    """Returns tokens int32[B * G, T] and lengths int32[B * G]."""
    return samples.tokens.reshape(-1, samples.tokens.shape[-1]), samples.lengths.reshape(-1)


@partial(jax.jit, static_argnums=0)
@laid_out(by_prompts)
def score_jitted(
    reward: Reward,
    tables: Tables,
    answers: jax.Array,
    grades: jax.Array,
    samples: Samples,
    replies: Replies | ReplyProbs | None,
    texts: dict[str, jax.Array],
) -> Scores:
    """Returns `Reward.__call__`, jitted."""
    shape = samples.lengths.shape
    format_, answer, *matches = (
        x.reshape(shape) for x in score_response(tables, *flatten(samples))
    )
    if reward.format == "boxed":
        format_ = matches.pop(0)
    accuracy = graded_accuracy(answer, grades)
    target = answer
    if reward.coherence_target == "label":
        target = jnp.broadcast_to(answers[:, None], shape)
    reflections, inferred = _reflect(reward.profile, tables, target, replies)
    overall = combine(
        format_,
        accuracy,
        [reflections[question.name] for question in reward.questions],
        profile=reward.profile,
        lambda_reflect=reward.lambda_reflect,
        lambda_format=reward.lambda_format,
        reflect=replies is not None,
    )
    group = Group(samples.tokens, samples.lengths, answers, answer, format_, accuracy, reflections)
    terms = {}
    for term in reward.terms:
        if term.pattern:
            terms[term.name] = matches.pop(0)
        elif term.function:
            terms[term.name] = jnp.broadcast_to(term.function(group), shape).astype(jnp.float32)
        else:
            terms[term.name] = texts[term.name]
        overall += term.weight * terms[term.name]
    own = [term.name for term in reward.terms if not term.pattern]
    if own:
        # A group of which one term is no number teaches nothing: its rewards are all 0. The metric
        # of the term, which is no number then, and a guard (runtime/guards.py) tell which it was.
        usable = jnp.stack([jnp.isfinite(terms[name]).all(axis=-1) for name in own]).all(axis=0)
        overall = jnp.where(usable[:, None], overall, 0.0)
    return Scores(overall, format_, accuracy, reflections, answer, inferred, terms)


def _reflect(
    profile: str,
    tables: Tables,
    target: jax.Array,
    replies: Replies | ReplyProbs | None,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns name of a question → score float32[B, G], and the inferred label int32[B, G]."""
    shape = target.shape
    if replies is None:
        unasked = jnp.full(shape, float(profile == "release"))
        return dict.fromkeys(QUESTIONS, unasked), jnp.full(shape, NOTHING_TO_JUDGE)
    scores, readings = {}, {}
    for name, question in QUESTIONS.items():
        found = replies.found[name]
        if isinstance(replies, ReplyProbs):
            probs = replies.probs[name]
            readings[name] = jnp.argmax(probs, axis=-1)
            scores[name] = question.soft_score(probs, target, found, profile)
            continue
        tokens = flatten(replies.samples[name])
        readings[name] = read_reply(tables, name, *tokens).reshape(shape)
        scores[name] = question.score(readings[name], target, found, profile)
    inferred = jnp.where(replies.found["coherence"], readings["coherence"], NOTHING_TO_JUDGE)
    return scores, inferred
