"""Custom reward terms, added to the method's reward with a weight each.

A term is one of three things:

* a regular expression: 1 where it matches the response's raw text, else 0. Read on the device, with
  the other rules (`patterns`).
* a function of the group, `module:name`: takes a `Group`, returns float32[B, G]. It is traced into
  the program that scores, so it must be made of JAX operations.
* a function of the text, `module:name`: takes the response's text and its label, returns a number.
  It runs in Python on decoded text, for each response: far slower, and the device waits for it.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from emor3_jax.errors import UserError
from emor3_jax.rewards.patterns import PatternRule
from emor3_jax.rewards.questions import QUESTIONS

BOXED = r"(?s)\\boxed\{.*\}"
"""The format of a plain answer: a box that is closed, anywhere."""

BUILT_IN = ("overall", "format", "accuracy")


class TermError(UserError):
    """A reward term that cannot be used."""


class Group(NamedTuple):
    """Argument of a function of the group: B prompts with G responses each.

    Attributes:
      tokens: int32[B, G, T].
      lengths: int32[B, G].
      label: int32[B], index of the true label in the label set.
      answer: int32[B, G], index of the boxed label, -1 where there is none.
      format, accuracy: float32[B, G], the method's scores.
      reflections: name of a question → float32[B, G]; `coherence` and `consistency` are in it.
    """

    tokens: jax.Array
    lengths: jax.Array
    label: jax.Array
    answer: jax.Array
    format: jax.Array
    accuracy: jax.Array
    reflections: dict[str, jax.Array]

    @property
    def coherence(self) -> jax.Array:
        """float32[B, G]."""
        return self.reflections["coherence"]

    @property
    def consistency(self) -> jax.Array:
        """float32[B, G]."""
        return self.reflections["consistency"]


class Term(NamedTuple):
    """One reward term; hashable, so that it can be a static argument.

    Attributes:
      name: of its metric, `reward/<name>`.
      weight: what it is added to the reward with; negative for a penalty.
      pattern: a regular expression, "" for none.
      function: of the group, or None.
      text: of the text, or None.
    """

    name: str
    weight: float
    pattern: str = ""
    function: Callable[[Group], jax.Array] | None = None
    text: Callable[[str, str], float] | None = None

    @property
    def rule(self) -> PatternRule:
        """The machine of the expression."""
        return PatternRule(self.pattern)


def make_term(name: str, weight: float, pattern: str, function: str, text: str) -> Term:
    """Returns a term from what a config says of it.

    Args:
      name: of the term.
      weight: of the term.
      pattern: a regular expression; "" for none.
      function, text: `module:name` of a function; "" for none.

    Raises:
      TermError: if not exactly one kind is given, the name is taken, or a function is not found.
      PatternError: if the expression is wrong.
    """
    taken = (*BUILT_IN, *QUESTIONS)
    if name in taken or not name.isidentifier():
        raise TermError(
            f"name {name!r} must be a word of letters, digits and _, and none of {', '.join(taken)}"
        )
    if sum(map(bool, (pattern, function, text))) != 1:
        raise TermError("give exactly one of pattern, function and text")
    if pattern:
        PatternRule(pattern)
    return Term(name, weight, pattern, _find(function), _find(text))


def _find(path: str) -> Callable[..., Any] | None:
    if not path:
        return None
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TermError(f"{path!r} is not found ({error}); write it as module:name") from error
    if not callable(found):
        raise TermError(f"{path!r} is not a function")
    return found
