"""The questions that the policy is asked about its own responses, and the scores of its replies.

Adding a question is one more row of `QUESTIONS` and its prompt template: a file that
`data.templates.<name>` of a config names, or `<name>.txt` beside the built-in ones.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from emor3_jax.rewards.automaton import Rule
from emor3_jax.rewards.combine import (
    coherence_probability,
    coherence_score,
    consistency_probability,
    consistency_score,
)
from emor3_jax.rewards.rules import ReplyRule, YesNoRule


class Question(NamedTuple):
    """One reflection; hashable.

    Attributes:
      name: of the score, and of the template (`data/templates/<name>.txt`).
      with_image: the question starts with the image.
      span: index of the judged part of a response in `rewards.cut_spans`.
      rule: from the labels to the machine that reads a reply.
      meanings: from the labels to the replies that are told apart, for reflection probabilities.
      score: (reading of the reply, target label, found, profile) → float32[...].
      soft_score: (probabilities of the meanings, target label, found, profile) → float32[...].
    """

    name: str
    with_image: bool
    span: int
    rule: Callable[[Sequence[str]], Rule]
    meanings: Callable[[Sequence[str]], Sequence[str]]
    score: Callable[[jax.Array, jax.Array, jax.Array, str], jax.Array]
    soft_score: Callable[[jax.Array, jax.Array, jax.Array, str], jax.Array]


QUESTIONS = {
    question.name: question
    for question in (
        # Of which label do steps 1 and 2 speak, from the text alone?
        Question("coherence", False, 0, ReplyRule, tuple, coherence_score, coherence_probability),
        # Does step 1 describe the image?
        Question(
            "consistency",
            True,
            1,
            lambda labels: YesNoRule(),
            lambda labels: ("yes", "no"),
            lambda reading, target, found, profile: consistency_score(reading, found, profile),
            lambda probs, target, found, profile: consistency_probability(probs, found, profile),
        ),
    )
}
"""Name → question, in the order in which they are asked."""
