"""Numbers that a response states inside tags, such as `<confidence>0.8</confidence>`.

The built-in template `confidence` asks for one after the boxed answer. `log_score` rewards an
honest one: it is a custom reward term, added to a config with its weight,

    config.reward.terms.log_score = reward_term(
        weight=0.1, text="emor3_jax.rewards.stated:log_score"
    )

as EmoCaliber (arXiv 2512.15528) adds the logarithmic score of a stated confidence to format and
accuracy; bound and scale are this project's own.
"""

import math
import re

from emor3_jax.spelling import normalize

LEAST = 0.01
"""A stated confidence counts as at least so much, and as at most 1 less it."""

_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+))\s*(%?)"
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")


def stated_number(response: str, tag: str) -> float:
    """Returns the last number inside a tag, NaN if there is none.

    Args:
      response: the text.
      tag: name of the tag. A number with a percent sign is divided by 100.
    """
    found = re.findall(rf"<{re.escape(tag)}>\s*{_NUMBER}\s*</{re.escape(tag)}>", response)
    if not found:
        return math.nan
    number, percent = found[-1]
    return float(number) / (100 if percent else 1)


def stated_confidence(response: str) -> float:
    """Returns the confidence that a response states, in [0, 1]; NaN if it states none."""
    number = stated_number(response, "confidence")
    return number if 0 <= number <= 1 else math.nan


def log_score(response: str, label: str) -> float:
    """Returns the logarithmic score of the stated confidence, scaled to [0, 1].

    With c the confidence, held in [LEAST, 1 - LEAST], it is ln c if the last box holds the label,
    else ln(1 - c), scaled so that ln LEAST is 0 and ln(1 - LEAST) is 1. In expectation it is
    largest where c is the probability of being right. Without a confidence or a box it is 0.

    Args:
      response: the text.
      label: the true label.
    """
    confidence, boxes = stated_confidence(response), _BOX.findall(response)
    if math.isnan(confidence) or not boxes:
        return 0.0
    right = normalize(boxes[-1]) == normalize(label)
    held = min(max(confidence if right else 1 - confidence, LEAST), 1 - LEAST)
    lowest, highest = math.log(LEAST), math.log(1 - LEAST)
    return (math.log(held) - lowest) / (highest - lowest)
