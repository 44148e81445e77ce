"""The parts of a response that the reflections judge, cut out of its own tokens.

Coherence judges from the first `<step1>` to the end of the first `</step2>` after it; consistency
from the first `<step1>` up to the first `<step2>` after it, whitespace at its end stripped. Both on
the raw text (METHOD, "Spans"). Tags may start and end in the middle of a token: the part of
such a token that belongs to the span is written as byte tokens, so the text of the tokens returned
is the span's text, byte for byte.

Deviations, numbered:
 1. Special tokens within a span are left out of it, as decoding skips them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.rewards.automaton import SPACES, classify, close
from emor3_jax.rewards.rules import failure, search

_OPEN, _COHERENCE_END, _CONSISTENCY_END = "<step1>", "</step2>", "<step2>"
_KEEP, _TAKE_LAST = -1, -2


class Span(NamedTuple):
    """A part of each response.

    Attributes:
      tokens: int32[n, T + E], right padded with 0.
      lengths: int32[n].
      found: bool[n], False where the response has no such part; its length is then 0.
    """

    tokens: jax.Array
    lengths: jax.Array
    found: jax.Array


class SpanTable(NamedTuple):
    """One span's tags as a table over tokens.

    For a state and a token class: the state that follows, and what the token does to three byte
    positions, each an offset in the token or `_KEEP`: `begin` (of the opening tag), `last` (end of
    the last character that is not whitespace), `end` (of the span, if the next tag starts here;
    `_TAKE_LAST` is the value of `last` before this token). `begin` may be negative: the tag began
    in an earlier token.

    Attributes:
      next, begin, last, end: int32[states, classes]; `begin` is `_NEVER` for keep.
      token_class: int32[V + 1].
      found: bool[states], the closing tag has been read.
    """

    next: jax.Array | np.ndarray
    begin: jax.Array | np.ndarray
    last: jax.Array | np.ndarray
    end: jax.Array | np.ndarray
    token_class: jax.Array | np.ndarray
    found: jax.Array | np.ndarray


class SpanTables(NamedTuple):
    """Both spans, and the bytes of tokens that a span can cut.

    Attributes:
      coherence, consistency: the tags.
      sizes: int32[V + 1], bytes of each token.
      row: int32[V + 1], row of `parts` of a token that can be cut, 0 for others.
      parts: int32[rows, L], the byte tokens of such a token.
    """

    coherence: SpanTable
    consistency: SpanTable
    sizes: jax.Array | np.ndarray
    row: jax.Array | np.ndarray
    parts: jax.Array | np.ndarray


_NEVER = -(1 << 20)


class _Tags:
    """Reads bytes for an opening and a closing tag; knows the whitespace before the closing one."""

    def __init__(self, close_tag: str) -> None:
        self.tags = (_OPEN, close_tag)
        self._back = tuple(map(failure, self.tags))
        self._codes = {c.encode() for c in SPACES}
        self._held = {code[:i] for code in self._codes for i in range(1, len(code))}
        self.start = (0, 0, b"")

    def step(self, state: tuple[int, int, bytes], byte: int) -> tuple[int, int, bytes]:
        return self.read(state, byte)[0]

    def read(self, state, byte: int) -> tuple[tuple[int, int, bytes], bool, bool]:
        """Returns the next state, whether held bytes turn out to be text, and whether this does."""
        stage, position, held = state
        if stage == 2:
            return state, False, False
        code = held + bytes([byte])
        if code in self._codes:
            return (stage, 0, b""), False, False
        if code in self._held:
            return (stage, 0, code), False, False
        if held:
            # No character after all: the held bytes are text, and this byte begins anew.
            following, _, is_text = self.read((stage, 0, b""), byte)
            return following, True, is_text
        position = search(self.tags[stage], self._back[stage], position, chr(byte))
        if position == len(self.tags[stage]):
            return (stage + 1, 0, b""), False, True
        return (stage, position, b""), False, True


def _span_table(close_tag: str, stop_before: bool, tokens: Sequence[bytes]) -> SpanTable:
    machine = _Tags(close_tag)
    states, table = close(machine.start, machine.step)
    stages = np.asarray([state[0] for state in states])
    texts = np.asarray([[machine.read(s, b)[1:] for b in range(256)] for s in states])
    shape = (len(states), len(tokens) + 1)
    following = np.repeat(np.arange(shape[0])[:, None], shape[1], axis=1)
    begin, last, end = np.full(shape, _NEVER), np.full(shape, _KEEP), np.full(shape, _KEEP)
    sizes = np.asarray([len(token) for token in tokens])
    for place in range(max(sizes, default=0)):
        alive = np.flatnonzero(sizes > place)
        byte = np.asarray([tokens[i][place] for i in alive])
        state, begins, lasts, ends = (x[:, alive] for x in (following, begin, last, end))
        now = table[state, byte]
        held_is_text, is_text = texts[state, byte, 0], texts[state, byte, 1]
        stage, reached = stages[state], stages[now]
        lasts[held_is_text] = place
        if stop_before:
            opens = (byte == ord("<")) & (stage < 2)
            ends = np.where(opens, np.where(lasts == _KEEP, _TAKE_LAST, lasts), ends)
        else:
            ends[(stage == 1) & (reached == 2)] = place + 1
        lasts[is_text] = place + 1
        begins[(stage == 0) & (reached == 1)] = place + 1 - len(_OPEN)
        following[:, alive], begin[:, alive], last[:, alive], end[:, alive] = (
            now,
            begins,
            lasts,
            ends,
        )
    tables, token_class = classify([following, begin, last, end])
    return SpanTable(*tables, token_class, stages == 2)


def build_spans(tokens: Sequence[bytes]) -> SpanTables:
    """Returns the tables of both spans for a tokenizer.

    Args:
      tokens: byte string of each token, empty for special tokens.

    Raises:
      ValueError: if the tokenizer lacks a token for a single byte.
    """
    single = {t[0]: i for i, t in reversed(list(enumerate(tokens))) if len(t) == 1}
    missing = [b for b in range(256) if b not in single]
    if missing:
        raise ValueError(f"the tokenizer has no token for the byte {missing[0]:#04x}")
    marks = set(b"<>") | {b for c in SPACES for b in c.encode()}
    cut = [i for i, t in enumerate(tokens) if len(t) > 1 and marks & set(t)]
    row = np.zeros(len(tokens) + 1, np.int32)
    parts = np.zeros((len(cut) + 1, max((len(tokens[i]) for i in cut), default=1)), np.int32)
    for r, i in enumerate(cut, 1):
        row[i] = r
        parts[r, : len(tokens[i])] = [single[b] for b in tokens[i]]
    return SpanTables(
        _span_table(_COHERENCE_END, False, tokens),
        _span_table(_CONSISTENCY_END, True, tokens),
        np.asarray([*map(len, tokens), 0], np.int32),
        row,
        parts,
    )


def cut(table: SpanTable, spans: SpanTables, tokens: jax.Array, lengths: jax.Array) -> Span:
    """Returns the span of each response.

    Args:
      table: `spans.coherence` or `spans.consistency`.
      spans: the tables.
      tokens: int32[n, T].
      lengths: int32[n], tokens that count.
    """
    table, spans = jax.tree.map(jnp.asarray, (table, spans))
    n, t = tokens.shape
    last_id = table.token_class.shape[0] - 1
    known = (tokens >= 0) & (tokens < last_id) & (jnp.arange(t) < lengths[:, None])
    ids = jnp.where(known, tokens, last_id)
    sizes = spans.sizes[ids]
    ends = jnp.cumsum(sizes, axis=1)
    starts = ends - sizes

    def step(carry, column):
        state, begin, last, end = carry
        token_class, base = column
        new_begin = table.begin[state, token_class]
        new_last = table.last[state, token_class]
        new_end = table.end[state, token_class]
        begin = jnp.where(new_begin == _NEVER, begin, base + new_begin)
        end = jnp.where(new_end == _TAKE_LAST, last, jnp.where(new_end < 0, end, base + new_end))
        last = jnp.where(new_last < 0, last, base + new_last)
        return (table.next[state, token_class], begin, last, end), None

    zero = jnp.zeros(n, jnp.int32)
    columns = (table.token_class[ids].T, starts.T)
    (state, begin, _, end), _ = jax.lax.scan(step, (zero, zero, zero, zero), columns)
    found = table.found[state]
    begin, end = jnp.where(found, begin, 0)[:, None], jnp.where(found, end, 0)[:, None]

    # The first and the last token may stick out of the span: those are written byte by byte.
    inside = (starts >= begin) & (ends <= end) & (sizes > 0)
    left = (starts < begin) & (ends > begin)
    right = (starts < end) & (ends > end) & ~left
    width = spans.parts.shape[1]

    def part(which):
        """Bytes of the one token that sticks out: their tokens [n, L] and which are in the span."""
        at = jnp.argmax(which, axis=1)[:, None]
        token = jnp.take_along_axis(ids, at, axis=1)[:, 0]
        place = jnp.take_along_axis(starts, at, axis=1) + jnp.arange(width)
        size = jnp.take_along_axis(sizes, at, axis=1)
        within = (place >= begin) & (place < end) & (jnp.arange(width) < size)
        return spans.parts[spans.row[token]], within & jnp.any(which, axis=1, keepdims=True)

    head, head_in = part(left)
    tail, tail_in = part(right)
    pieces = jnp.concatenate([head, tokens, tail], axis=1)
    used = jnp.concatenate([head_in, inside, tail_in], axis=1) & found[:, None]
    place = jnp.cumsum(used, axis=1) - 1
    size = t + 2 * width
    rows = jnp.arange(n)[:, None]
    out = jnp.zeros((n, size), jnp.int32)
    out = out.at[rows, jnp.where(used, place, size)].set(pieces, mode="drop")
    return Span(out, jnp.sum(used, axis=1, dtype=jnp.int32), found)
