"""Scores of responses to rows of one label set, given as arrays, as tokens or as text."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from emor3_jax.parallel import hosts
from emor3_jax.rewards.automaton import token_bytes
from emor3_jax.rewards.questions import QUESTIONS
from emor3_jax.rewards.reward import Reward
from emor3_jax.rewards.rules import LabelError, lowercase_labels
from emor3_jax.rewards.tables import cut_spans, make_reply_tables, make_tables
from emor3_jax.rewards.terms import TermError
from emor3_jax.spelling import normalize
from emor3_jax.types import Batch, Replies, ReplyProbs, Samples, Scores

Tokens = tuple[jax.Array, jax.Array]


class Scorer:
    """A reward for one tokenizer and label set.

    Attributes:
      tokenizer: a byte-level BPE tokenizer.
      reply_tokenizer: of who is asked the questions, the same unless a judge has its own.
      labels: the label set.
      reward: rules and weights.
      tables: the rules as token tables.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        profile: str = "paper",
        coherence_target: str = "label",
        *,
        reward: Reward | None = None,
        cache: str | Path = "",
        reply_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Builds the tables, or reads them from disk.

        Args:
          tokenizer: a byte-level BPE tokenizer.
          labels: the label set.
          profile: "paper" or "release".
          coherence_target: "label", or "answer": the response's own boxed answer.
          reward: replaces the two before it.
          cache: folder where tables are kept; "" keeps none.
          reply_tokenizer: of a judge with other tokens; None has replies in those of `tokenizer`.

        Raises:
          TokenizerError: if a tokenizer is not byte-level.
          LabelError: if the labels cannot be told apart.
          PatternError: if a pattern cannot be read.
          ValueError: if `profile` or `coherence_target` is unknown.
        """
        if isinstance(labels, str):
            rule = (
                "must be a list of labels, as emor3_jax.data.labels.label_set returns for this text"
            )
            raise LabelError(f"labels={labels!r}: {rule}")
        self.tokenizer, self.labels = tokenizer, lowercase_labels(labels)
        self.reward = reward or Reward(profile, coherence_target)
        self.tables = make_tables(tokenizer, labels, self.reward.patterns, cache)
        self.reply_tokenizer = reply_tokenizer or tokenizer
        if reply_tokenizer is not None:
            replies = make_reply_tables(reply_tokenizer, labels, cache)
            self.tables = self.tables._replace(replies=replies)

    def score(self, batch: Batch, samples: Samples, replies: Replies | ReplyProbs | None) -> Scores:
        """Scores the responses to a batch."""
        texts = self._score_texts(batch.answers, samples)
        return self.reward(self.tables, batch.answers, batch.grades, samples, replies, texts)

    def score_tokens(
        self,
        tokens: jax.Array,
        lengths: jax.Array,
        answers: Sequence[str],
        coherence_replies: Tokens | None = None,
        consistency_replies: Tokens | None = None,
        **more_replies: Tokens | None,
    ) -> dict[str, jax.Array]:
        """Scores responses given as tokens.

        Args:
          tokens: int32[n, T].
          lengths: int32[n].
          answers: the true label of each.
          coherence_replies: tokens int32[n, R] and lengths int32[n] of the replies.
          consistency_replies: likewise. Without both of them the reflection is switched off.
          more_replies: likewise `<name>_replies` of each further question of `QUESTIONS`.

        Returns:
          "format", "accuracy", "coherence", "consistency", "overall": float32[n].

        Raises:
          LabelError: if an answer is not in the label set.
          ValueError: if the replies to some questions alone are given, or numbers of rows differ.
        """
        given = {"coherence": coherence_replies, "consistency": consistency_replies}
        given |= {name.removesuffix("_replies"): reply for name, reply in more_replies.items()}
        given = {name: reply for name, reply in given.items() if reply is not None}
        if given and given.keys() != QUESTIONS.keys():
            raise ValueError(
                f"give both kinds of replies ({', '.join(QUESTIONS)}; got {', '.join(given)}), or "
                "none to switch the reflection off"
            )
        if isinstance(answers, str):
            raise ValueError(
                f"answers={answers!r}: must be a list of labels, one for each response"
            )
        counts = {"responses": len(tokens), "lengths": len(lengths), "answers": len(answers)}
        counts |= {f"{name}_replies": len(reply[1]) for name, reply in given.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{counts}: give as many of each")
        indices = []
        for answer in answers:
            if normalize(answer) not in self.labels:
                raise LabelError(f"answer {answer!r} is not one of {', '.join(self.labels)}")
            indices.append(self.labels.index(normalize(answer)))
        replies = None
        if given:
            spans = cut_spans(self.tables, tokens, lengths)
            judged = {name: spans[QUESTIONS[name].span] for name in given}
            replies = Replies(
                {name: _as_samples(*reply) for name, reply in given.items()},
                {name: span.found[:, None] for name, span in judged.items()},
                {name: span.lengths[:, None] for name, span in judged.items()},
            )
        label = jnp.asarray(indices, jnp.int32)
        grades = jax.nn.one_hot(label, len(self.labels))
        samples = _as_samples(tokens, lengths)
        texts = self._score_texts(label, samples)
        scores = self.reward(self.tables, label, grades, samples, replies, texts)
        return {
            name: scores.named()[name][:, 0]
            for name in ("format", "accuracy", *QUESTIONS, "overall")
        }

    def score_text(
        self,
        responses: Sequence[str],
        answers: Sequence[str],
        coherence_replies: Sequence[str] | None = None,
        consistency_replies: Sequence[str] | None = None,
        **more_replies: Sequence[str] | None,
    ) -> dict[str, jax.Array]:
        """Scores responses given as text; otherwise as `score_tokens`."""
        given = {
            "coherence_replies": coherence_replies,
            "consistency_replies": consistency_replies,
            **more_replies,
        }
        own = self.reply_tokenizer
        spelled = {name: x if x is None else _spell(own, x) for name, x in given.items()}
        return self.score_tokens(*_spell(self.tokenizer, responses), answers, **spelled)

    def _score_texts(self, answers: jax.Array, samples: Samples) -> dict[str, np.ndarray]:
        """Returns the terms that are functions of the text, float32[B, G] each."""
        terms = [term for term in self.reward.terms if term.text]
        if not terms:
            return {}
        tokens, lengths, answers = hosts.fetch((samples.tokens, samples.lengths, answers))
        scores = {term.name: np.zeros(lengths.shape, np.float32) for term in terms}
        for at in np.ndindex(lengths.shape):
            text = self.tokenizer.decode(tokens[at][: lengths[at]], skip_special_tokens=True)
            for term in terms:
                found = term.text(text, self.labels[answers[at[0]]])
                try:
                    scores[term.name][at] = float(found)
                except (TypeError, ValueError) as error:
                    raise TermError(
                        f"reward.terms.{term.name}: its function returned {found!r} for the "
                        f"response {text[:200]!r}; it must return a number"
                    ) from error
        return scores


def _spell(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tokens:
    """Writes texts as byte tokens, in lengths rounded up so that few shapes are compiled."""
    if isinstance(texts, str):
        raise ValueError(f"{texts!r}: must be a list of texts")
    single = {t[0]: i for i, t in enumerate(token_bytes(tokenizer)) if len(t) == 1}
    codes = [text.encode("utf-8", "replace") for text in texts]
    size = 1 << max(4, max(map(len, codes), default=1).bit_length())
    tokens = np.zeros((len(codes), size), np.int32)
    for i, code in enumerate(codes):
        tokens[i, : len(code)] = [single[b] for b in code]
    return jnp.asarray(tokens), jnp.asarray([len(c) for c in codes], jnp.int32)


def _as_samples(tokens: jax.Array, lengths: jax.Array) -> Samples:
    """Returns one response a prompt, from int32[n, T] and int32[n]."""
    tokens, lengths = jnp.asarray(tokens)[:, None], jnp.asarray(lengths)[:, None]
    logprobs = jnp.zeros(tokens.shape, jnp.float32)
    return Samples(tokens, logprobs, lengths, jnp.ones(lengths.shape, bool))
