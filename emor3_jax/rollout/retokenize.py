"""Judged texts in the tokens of a judge that has others than the policy.

Deviations, numbered:
 1. As the release does, and unlike a policy that is asked about its own tokens, the text is decoded
    and tokenised anew; what is no UTF-8 is read as replacement characters.
 2. A text of more tokens than the longest padded length loses its end, which is counted and logged.
"""

import copy
import functools
import logging
from collections.abc import Sequence

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from emor3_jax.parallel import hosts
from emor3_jax.rewards.automaton import token_bytes
from emor3_jax.rewards.spans import Span
from emor3_jax.types import bucket

logger = logging.getLogger(__name__)


def has_tokens(judge: PreTrainedTokenizerBase, policy: PreTrainedTokenizerBase) -> bool:
    """Returns whether all tokens of a policy's text stand for the same bytes in a judge's."""
    ours, theirs = token_bytes(policy), token_bytes(judge)
    known = zip(ours, theirs, strict=False)
    return len(ours) <= len(theirs) and all(mine == other for mine, other in known if mine)


class Retokenizer:
    """Writes texts in other tokens, on the host.

    Attributes:
      cut: number of texts so far that lost their end.
    """

    def __init__(
        self,
        policy: PreTrainedTokenizerBase | None = None,
        judge: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
          policy, judge: their tokenizers; None where only shapes are asked for.
        """
        self._policy, self._judge = policy, judge
        self.cut = 0

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        return token_bytes(self._policy)

    @functools.cached_property
    def _own(self) -> PreTrainedTokenizerBase:
        # A copy, since it is set to read no special tokens, whatever a response spells out.
        return copy.deepcopy(self._judge)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the judge's tokens of texts, none of them special."""
        return self._own(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids

    def __call__(
        self, spans: Sequence[Span], sizes: Sequence[int]
    ) -> tuple[tuple[Span, ...], tuple[int, ...]]:
        """Returns texts in the judge's tokens, and the longest of each kind.

        Every host writes all texts, so that all choose the same padded length.

        Args:
          spans: texts in the policy's tokens, [B, G, …] each, on the devices.
          sizes: rising padded lengths, from which one is taken for each kind.
        """
        told = hosts.fetch([(span.tokens, span.lengths) for span in spans])
        found, longest = [], []
        for span, (tokens, lengths) in zip(spans, told, strict=True):
            places = np.ndindex(lengths.shape)
            rows = self.encode([self._decode(tokens[at], lengths[at]) for at in places])
            over = sum(len(row) > sizes[-1] for row in rows)
            if over and not self.cut:
                logger.warning(
                    "a judged text of %d tokens of the judge is cut to %d; raise the last of "
                    "reflect.text_lengths (reflect/texts_cut counts them)",
                    max(map(len, rows)),
                    sizes[-1],
                )
            self.cut += over
            rows = [row[: sizes[-1]] for row in rows]
            counts = np.asarray([len(row) for row in rows], np.int32).reshape(lengths.shape)
            longest.append(int(counts.max()))
            text = np.zeros((len(rows), bucket(longest[-1], sizes)), np.int32)
            for i, row in enumerate(rows):
                text[i, : len(row)] = row
            found.append(
                span._replace(
                    tokens=_like(text.reshape(*lengths.shape, -1), span.tokens),
                    lengths=_like(counts, span.lengths),
                )
            )
        return tuple(found), tuple(longest)

    def _decode(self, tokens: np.ndarray, length: int) -> str:
        said = b"".join(self._pieces[token] for token in tokens[:length])
        return said.decode("utf-8", "replace")


def _like(x: np.ndarray, placed: jax.Array) -> jax.Array:
    """Puts a host array where another one of as many rows lies."""
    return jax.make_array_from_callback(x.shape, placed.sharding, lambda index: x[index])


def widened(span: Span, size: int) -> Span:
    """Returns the shapes of a text that was written anew, padded to `size`; of abstract arrays."""
    old = span.tokens
    shape = (*old.shape[:2], size)
    return span._replace(tokens=jax.ShapeDtypeStruct(shape, old.dtype, sharding=old.sharding))
