"""Rewards on device: text rules as token tables, exact and linear in length (see `Scorer`)."""

from emor3_jax.rewards.automaton import TokenizerError, token_bytes
from emor3_jax.rewards.patterns import PatternError
from emor3_jax.rewards.questions import QUESTIONS, Question
from emor3_jax.rewards.reward import Reward
from emor3_jax.rewards.rules import LabelError
from emor3_jax.rewards.scorer import Scorer
from emor3_jax.rewards.spans import Span
from emor3_jax.rewards.tables import Tables, cut_spans, make_tables, read_reply, score_response
from emor3_jax.rewards.terms import Group, Term, TermError

__all__ = [
    "QUESTIONS",
    "Group",
    "LabelError",
    "PatternError",
    "Question",
    "Reward",
    "Scorer",
    "Span",
    "Tables",
    "Term",
    "TermError",
    "TokenizerError",
    "cut_spans",
    "make_tables",
    "read_reply",
    "score_response",
    "token_bytes",
]
