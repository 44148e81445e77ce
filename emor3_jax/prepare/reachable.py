"""Whether each label can be earned: ideal responses, scored through the real tokenizer and tables.

A label whose reply is cut short, or whose tokens the sampler cannot draw, would score 0 for ever,
and nothing would say so.
"""

import copy
import dataclasses
import logging
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from emor3_jax.config import ConfigError
from emor3_jax.parallel import hosts
from emor3_jax.rewards.questions import QUESTIONS
from emor3_jax.rewards.rules import LabelError
from emor3_jax.rewards.scorer import Scorer
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.rollout.tokens import suppressed_tokens

logger = logging.getLogger(__name__)

_IDEAL = (
    "<step1> a still lake </step1> <step2> it feels calm </step2> <step3> so it is </step3> "
    "\\boxed{{{label}}}"
)
_SHORTEST = "<step1>a</step1><step2>a</step2><step3>a</step3>\\boxed{{{label}}}"
_KNOWN = {"coherence", "consistency"}


def check_reachable(rollout: Rollout) -> None:
    """Scores an ideal response to each label, and its ideal replies.

    Args:
      rollout: of a run's steps.

    Raises:
      ConfigError: if `reflect.max_tokens` cuts an ideal reply.
      LabelError: if a score is not 1, or the sampler cannot draw a token; naming the label.
    """
    scorer: Scorer = rollout.scorer
    labels, judges = scorer.labels, scorer.reply_tokenizer
    suppressed = rollout.suppressed
    if judges is not scorer.tokenizer:
        suppressed = suppressed_tokens(len(judges), judges)

    def spell(
        texts: list[str],
        tokenizer: PreTrainedTokenizerBase = scorer.tokenizer,
        suppressed: np.ndarray = rollout.suppressed,
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            for token in row:
                if suppressed[token]:
                    raise LabelError(
                        f"label {labels[i]!r}: the sampler cannot draw the token "
                        f"{tokenizer.convert_ids_to_tokens(token)!r} of {texts[i]!r}, since the "
                        "tokenizer has it as a special one; take another tokenizer or label"
                    )
        return tokens, np.array([len(row) for row in rows], np.int32)

    shortest = spell([_SHORTEST.format(label=label) for label in labels])[1]
    longest = int(shortest.max()) + 1
    if scorer.reward.format == "set" and longest > rollout.sampling.max_tokens:
        logger.warning(
            "rollout.max_tokens=%d: the three steps, the box and the end of a response take %d "
            "tokens at least, so that no response to %r can have a format score; raise it",
            rollout.sampling.max_tokens,
            longest,
            labels[int(shortest.argmax())],
        )
    responses = spell([_IDEAL.format(label=label) for label in labels])
    replies = {}
    reflection = rollout.reflection
    if reflection is not None and QUESTIONS.keys() == _KNOWN:
        said = {"coherence": list(labels), "consistency": ["yes"] * len(labels)}
        replies = {name: spell(texts, judges, suppressed) for name, texts in said.items()}
        for name, (_, lengths) in {} if reflection.soft else replies.items():
            longest, most = int(lengths.max()), reflection.sampling.max_tokens
            if longest >= most:
                reply = "yes" if name == "consistency" else labels[int(lengths.argmax())]
                rule = (
                    f"cuts the reply {reply!r} of {name}, which takes {longest} tokens "
                    f"{'of the judge ' if judges is not scorer.tokenizer else ''}and its "
                    f"end: it could never be right; give {longest + 1} or more"
                )
                raise ConfigError("reflect.max_tokens", most, rule)
    plain = copy.copy(scorer)
    plain.reward = dataclasses.replace(scorer.reward, terms=(), overlong=None)
    given = {f"{name}_replies": reply for name, reply in replies.items()}

    @jax.jit
    def ideal_scores(responses: Any, given: Any) -> dict[str, jax.Array]:
        return plain.score_tokens(*responses, labels, **given)

    with hosts.on_own_devices():
        scores = ideal_scores(responses, given)
    for name in ("format", "accuracy", *replies):
        for label, score in zip(labels, np.asarray(scores[name]), strict=True):
            if score != 1:
                raise LabelError(
                    f"label {label!r}: an ideal response to it has a {name} of {score:g}, not 1, "
                    "by this tokenizer; no response could earn it: choose another spelling of the "
                    "label (data.train.labels)"
                )
