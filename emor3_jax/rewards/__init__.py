"""Rewards on device: text rules as token tables, exact and linear in length (see `Scorer`).

The functions are pure and take `Scorer.tables` as an argument, so that they run inside any jit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from emor3_jax.rewards import automaton, rules, spans
from emor3_jax.rewards import cache as tables_cache
from emor3_jax.rewards.automaton import Automaton, TokenizerError, token_bytes
from emor3_jax.rewards.combine import (
    check_profile,
    coherence_score,
    combine,
    consistency_score,
    graded_accuracy,
    soft_scores,
)
from emor3_jax.rewards.patterns import PatternError, PatternRule
from emor3_jax.rewards.rules import LabelError
from emor3_jax.rewards.spans import Span, SpanTables
from emor3_jax.rewards.terms import Group, Term, TermError

__all__ = [
    "Group",
    "LabelError",
    "PatternError",
    "Scorer",
    "Span",
    "Tables",
    "Term",
    "TermError",
    "TokenizerError",
    "coherence_score",
    "combine",
    "consistency_score",
    "cut_spans",
    "graded_accuracy",
    "read_label",
    "read_yes_no",
    "score_response",
    "soft_scores",
    "token_bytes",
]

Tokens = tuple[jax.Array, jax.Array]


class Tables(NamedTuple):
    """All rules for one tokenizer and label set; a pytree of arrays.

    Attributes:
      response: the rules of format and box, then patterns of one's own.
      reply: the rule of a reply that is a label.
      yes_no: the rule of a reply that says yes or no.
      spans: the parts of a response that are judged.
    """

    response: Automaton
    reply: Automaton
    yes_no: Automaton
    spans: SpanTables


def score_response(tables: Tables, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
    """Returns format float32[n], and the index of the boxed label int32[n], -1 for none.

    Where the tables hold patterns of one's own, whether each matches follows, float32[n].

    Args:
      tables: of the tokenizer and label set.
      tokens: int32[n, T].
      lengths: int32[n].
    """
    format_, label, *patterns = automaton.run_automaton(tables.response, tokens, lengths)
    return format_.astype(jnp.float32), label, *(x.astype(jnp.float32) for x in patterns)


def read_label(tables: Tables, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns the label that each reply is, int32[n]: -1 another text, -2 empty or `none`."""
    return automaton.run_automaton(tables.reply, tokens, lengths)[0]


def read_yes_no(tables: Tables, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns int32[n]: 1 if the reply contains `yes`, else 0 if it contains `no`, else -1."""
    return automaton.run_automaton(tables.yes_no, tokens, lengths)[0]


def cut_spans(tables: Tables, tokens: jax.Array, lengths: jax.Array) -> tuple[Span, Span]:
    """Returns s1..s2 and s1 of each response: what coherence and consistency are asked about."""
    return spans.cut(tables.spans, tokens, lengths)


class Scorer:
    """Scores responses by the rules of one profile."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        profile: str = "paper",
        coherence_target: str = "label",
        *,
        patterns: Sequence[str] = (),
        cache: str | Path = "",
    ) -> None:
        """Builds the tables, or reads them from disk.

        Args:
          tokenizer: a byte-level BPE tokenizer.
          labels: the label set.
          profile: "paper" or "release".
          coherence_target: "label", or "answer": the response's own boxed answer.
          patterns: regular expressions to read beside the rules (`terms`).
          cache: folder where tables are kept; "" keeps none.

        Raises:
          TokenizerError: if the tokenizer is not byte-level.
          LabelError: if the labels cannot be told apart.
          PatternError: if a pattern cannot be read.
          ValueError: if `profile` or `coherence_target` is unknown.
        """
        check_profile(profile)
        if coherence_target not in ("label", "answer"):
            raise ValueError(f"coherence_target={coherence_target!r}: must be 'label' or 'answer'")
        self.labels, self.profile = rules.lowercase_labels(labels), profile
        self.coherence_target = coherence_target
        self._bytes = token_bytes(tokenizer)

        def build() -> Tables:
            response = [
                rules.Normalised(rules.FormatRule()),
                rules.Normalised(rules.BoxRule(labels)),
            ]
            response += map(PatternRule, patterns)
            return Tables(
                automaton.build_automaton(response, self._bytes),
                automaton.build_automaton([rules.ReplyRule(labels)], self._bytes),
                automaton.build_automaton([rules.YesNoRule()], self._bytes),
                spans.build_spans(self._bytes),
            )

        several = (0,) * (2 + len(patterns))
        like = Tables(
            Automaton(several, 0, several),
            Automaton((0,), 0, (0,)),
            Automaton((0,), 0, (0,)),
            SpanTables(*[0] * len(SpanTables._fields)),
        )
        name = tables_cache.key(self._bytes, self.labels, patterns)
        self.tables: Tables = tables_cache.load_or_build(cache, name, like, build)
        self._single = {t[0]: i for i, t in enumerate(self._bytes) if len(t) == 1}

    def score_tokens(
        self,
        tokens: jax.Array,
        lengths: jax.Array,
        answers: Sequence[str],
        coherence_replies: Tokens | None = None,
        consistency_replies: Tokens | None = None,
    ) -> dict[str, jax.Array]:
        """Scores responses given as tokens.

        Args:
          tokens: int32[n, T].
          lengths: int32[n].
          answers: the true label of each.
          coherence_replies: tokens int32[n, R] and lengths int32[n] of the replies.
          consistency_replies: likewise. Without both of them the reflection is switched off.

        Returns:
          "format", "accuracy", "coherence", "consistency", "overall": float32[n].

        Raises:
          LabelError: if an answer is not in the label set.
          ValueError: if only one kind of replies is given.
        """
        if (coherence_replies is None) != (consistency_replies is None):
            raise ValueError("give both kinds of replies, or none to switch the reflection off")
        target = []
        for answer in answers:
            if answer.strip().lower() not in self.labels:
                raise LabelError(f"answer {answer!r} is not one of {', '.join(self.labels)}")
            target.append(self.labels.index(answer.strip().lower()))
        label = jnp.asarray(target, jnp.int32)
        format_, answer, *_ = score_response(self.tables, tokens, lengths)
        accuracy = (answer == label).astype(jnp.float32)
        reflect = coherence_replies is not None
        coherence = consistency = jnp.ones if self.profile == "release" else jnp.zeros
        coherence = consistency = coherence(label.shape)
        if coherence_replies is not None and consistency_replies is not None:
            judged = cut_spans(self.tables, tokens, lengths)
            coherence = coherence_score(
                read_label(self.tables, *coherence_replies),
                answer if self.coherence_target == "answer" else label,
                judged[0].found,
                self.profile,
            )
            consistency = consistency_score(
                read_yes_no(self.tables, *consistency_replies),
                judged[1].found,
                self.profile,
            )
        overall = combine(
            format_, accuracy, coherence, consistency, profile=self.profile, reflect=reflect
        )
        return {
            "format": format_,
            "accuracy": accuracy,
            "coherence": coherence,
            "consistency": consistency,
            "overall": overall,
        }

    def score_text(
        self,
        responses: Sequence[str],
        answers: Sequence[str],
        coherence_replies: Sequence[str] | None = None,
        consistency_replies: Sequence[str] | None = None,
    ) -> dict[str, jax.Array]:
        """Scores responses given as text; otherwise as `score_tokens`."""
        return self.score_tokens(
            *self._spell(responses),
            answers,
            None if coherence_replies is None else self._spell(coherence_replies),
            None if consistency_replies is None else self._spell(consistency_replies),
        )

    def _spell(self, texts: Sequence[str]) -> Tokens:
        """Writes texts as byte tokens, in lengths rounded up so that few shapes are compiled."""
        codes = [text.encode("utf-8", "replace") for text in texts]
        size = 1 << max(4, max(map(len, codes), default=1).bit_length())
        tokens = np.zeros((len(codes), size), np.int32)
        for i, code in enumerate(codes):
            tokens[i, : len(code)] = [self._single[b] for b in code]
        return jnp.asarray(tokens), jnp.asarray([len(c) for c in codes], jnp.int32)
