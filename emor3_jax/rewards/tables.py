"""Reward rules as token tables: one tree of arrays for a tokenizer and a label set.

The functions are pure and take the tables as an argument, so that they run inside any jit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from emor3_jax.rewards import cache, rules, spans
from emor3_jax.rewards.automaton import Automaton, build_automaton, run_automaton, token_bytes
from emor3_jax.rewards.patterns import PatternRule
from emor3_jax.rewards.questions import QUESTIONS
from emor3_jax.rewards.spans import Span, SpanTables


class Tables(NamedTuple):
    """All rules for one tokenizer and label set; a pytree of arrays.

    Attributes:
      response: the rules of format and box, then custom patterns.
      replies: name of a question → the rule that reads a reply, in the tokens of who is asked.
      spans: the parts of a response that are judged.
    """

    response: Automaton
    replies: dict[str, Automaton]
    spans: SpanTables


def make_tables(
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    patterns: Sequence[str] = (),
    folder: str | Path = "",
) -> Tables:
    """Builds the tables, or reads them from disk.

    Args:
      tokenizer: a byte-level BPE tokenizer.
      labels: the label set.
      patterns: regular expressions to read beside the rules (`terms`).
      folder: where tables are kept; "" keeps none.

    Raises:
      TokenizerError: if the tokenizer is not byte-level.
      LabelError: if the labels cannot be told apart.
      PatternError: if a pattern cannot be read.
    """
    checked, tokens = rules.lowercase_labels(labels), token_bytes(tokenizer)

    def build() -> Tables:
        response = [rules.Normalised(rules.FormatRule()), rules.Normalised(rules.BoxRule(labels))]
        response += map(PatternRule, patterns)
        return Tables(
            build_automaton(response, tokens),
            _reply_rules(labels, tokens),
            spans.build_spans(tokens),
        )

    several = (0,) * (2 + len(patterns))
    like = Tables(
        Automaton(several, 0, several),
        _like_replies(),
        SpanTables(*[0] * len(SpanTables._fields)),
    )
    return cache.load_or_build(folder, cache.key(tokens, checked, patterns), like, build)


def make_reply_tables(
    tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], folder: str | Path = ""
) -> dict[str, Automaton]:
    """Builds `Tables.replies` for the tokens of a judge, or reads them from disk.

    Args:
      tokenizer: of the judge.
      labels: the label set.
      folder: as of `make_tables`, which says what is raised.
    """
    checked, tokens = rules.lowercase_labels(labels), token_bytes(tokenizer)
    key = cache.key(tokens, checked, kind="replies")
    return cache.load_or_build(folder, key, _like_replies(), lambda: _reply_rules(labels, tokens))


def _reply_rules(labels: Sequence[str], tokens: Sequence[bytes]) -> dict[str, Automaton]:
    return {name: build_automaton([q.rule(labels)], tokens) for name, q in QUESTIONS.items()}


def _like_replies() -> dict[str, Automaton]:
    # Questions may have been added by now.
    return {name: Automaton((0,), 0, (0,)) for name in QUESTIONS}


def score_response(tables: Tables, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
    """Returns format float32[n], and the index of the boxed label int32[n], -1 for none.

    Where the tables hold custom patterns, 1 for each that matches follows, float32[n].

    Args:
      tables: of the tokenizer and label set.
      tokens: int32[n, T].
      lengths: int32[n].
    """
    format_, label, *patterns = run_automaton(tables.response, tokens, lengths)
    return format_.astype(jnp.float32), label, *(x.astype(jnp.float32) for x in patterns)


def read_reply(tables: Tables, question: str, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns the reading of each reply, int32[n].

    Coherence: index of the label, -1 for another text, -2 for an empty one or `none`. Consistency:
    1 if the reply contains `yes`, else 0 if it contains `no`, else -1.

    Args:
      tables: of the tokenizer and label set.
      question: name in `QUESTIONS`.
      tokens: int32[n, R].
      lengths: int32[n].
    """
    return run_automaton(tables.replies[question], tokens, lengths)[0]


def cut_spans(tables: Tables, tokens: jax.Array, lengths: jax.Array) -> tuple[Span, Span]:
    """Returns s1..s2 and s1 of each response: the texts of coherence and consistency."""
    return spans.cut(tables.spans, tokens, lengths)
