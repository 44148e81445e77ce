"""QA examples of the base policy, and the faults of its SET responses before training."""

from typing import NamedTuple

import numpy as np

# Chance that a SET response misdescribes the image (a cue of a scene, the whole face), breaks the
# format, or draws its boxed answer anew.
MISNAMED = 0.08
BROKEN_FORMAT = 0.35
FRESH_ANSWER = 0.55

# Weight of a reflection's tokens: its one-word reply is one of about fifty tokens per image.
JUDGE_WEIGHT = 6.0


class QAExample(NamedTuple):
    """A question and the reply to learn.

    Attributes:
      kind: "describe", "consistency", "coherence" or "set".
      question: text of the user turn, after the image where there is one.
      reply: text of the assistant turn, without its end token.
      with_image: the image stands before the question.
      weight: loss weight of the reply's tokens.
    """

    kind: str
    question: str
    reply: str
    with_image: bool
    weight: float


def break_format(response: str, answer: str, rng: np.random.Generator) -> str:
    """Breaks the format in one of five ways, each of which the format reward scores 0.

    Args:
      response: a SET response.
      answer: the label in its box.
      rng: NumPy generator.
    """
    way = rng.integers(5)
    if way == 0:
        return f"answer :\n{response}"
    if way == 1:
        return response.replace("<step2> ", "")
    if way == 2:
        return response.replace(" </step2>", "")
    if way == 3:
        return response.replace("<step3> ", "").replace(" </step3>", "")
    return response.replace(f"\\boxed{{{answer}}}", f"answer : {answer}")
