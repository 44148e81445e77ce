"""The parts of a response that the reflections judge, cut out of its own tokens.

Coherence judges from the first `<step1>` to the end of the first `</step2>` after it; consistency
from the first `<step1>` up to the first `<step2>` after it, whitespace at its end stripped. Both on
the raw text (METHOD, "Spans"). Tags may start and end in the middle of a token: the part of
such a token that belongs to the span is written as byte tokens, so the text of the tokens returned
is the span's text, byte for byte.

One machine reads both spans, in one scan. What it finds at a token is one entry of its table, a
packed integer; where the tags were completed is looked up afterwards, once for each response.

Deviations, numbered:
 1. Special tokens within a span are left out of it, as decoding skips them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.rewards.automaton import SPACES, TokenizerError, classify, close
from emor3_jax.rewards.rules import failure, search

_OPEN, _COHERENCE_END, _CONSISTENCY_END = "<step1>", "</step2>", "<step2>"
_OPENED, _COHERENCE, _CONSISTENCY = 1, 2, 4
"""Flags of a state: the opening tag was read; the closing tag of a span was."""
_KEEP, _TAKE_LAST = 0, 1
"""Entries for what a token does to a byte position; others are an offset in the token and more."""


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


class SpanTables(NamedTuple):
    """The machine as tables over tokens, and the bytes of tokens that a span can cut.

    Attributes:
      entry: int32[states, classes], packed from the right: the next state in `bits[0]` bits; in
        `bits[1]` bits what becomes of `last`, the end of the last character that is not whitespace
        (`_KEEP`, or 1 + its offset in the token); in as many what becomes of `stop`, which is
        `last` as it was before the last `<` (`_KEEP`, `_TAKE_LAST`, or 2 + the offset).
      begin: int32[states, classes], offset of the opening tag where the token completes it;
        negative if the tag began in an earlier token.
      end: int32[states, classes], offset behind the tag that closes coherence, likewise.
      flags: int32[states].
      bits: int32[2].
      token_class: int32[V + 1].
      sizes: int32[V + 1], bytes of each token.
      row: int32[V + 1], row of `parts` of a token that can be cut, 0 for others.
      parts: int32[rows, L], the byte tokens of such a token.
    """

    entry: jax.Array | np.ndarray
    begin: jax.Array | np.ndarray
    end: jax.Array | np.ndarray
    flags: jax.Array | np.ndarray
    bits: jax.Array | np.ndarray
    token_class: jax.Array | np.ndarray
    sizes: jax.Array | np.ndarray
    row: jax.Array | np.ndarray
    parts: jax.Array | np.ndarray


_State = tuple[int, int, int, bytes]


class _Tags:
    """Reads bytes for the three tags; knows the whitespace in front of the one that stops."""

    start: _State = (0, 0, 0, b"")

    def __init__(self) -> None:
        self._tags = (_OPEN, _COHERENCE_END, _CONSISTENCY_END)
        self._back = tuple(map(failure, self._tags))
        self._codes = {c.encode() for c in SPACES}
        self._held = {code[:i] for code in self._codes for i in range(1, len(code))}

    def flags(self, state: _State) -> int:
        """Returns which tags have been read."""
        return sum(
            flag * (at == len(tag))
            for flag, at, tag in zip(
                (_OPENED, _COHERENCE, _CONSISTENCY), state, self._tags, strict=False
            )
        )

    def step(self, state: _State, byte: int) -> _State:
        """Returns the state after a byte."""
        return self.read(state, byte)[0]

    def read(self, state: _State, byte: int) -> tuple[_State, bool, bool]:
        """Returns the next state, whether held bytes turn out to be text, and whether this does."""
        flags = self.flags(state)
        if flags & _CONSISTENCY:
            # What is text and what is whitespace matters no more.
            return (*self._search(state, byte, flags), b""), False, False
        held = state[3]
        places = self._search(state, byte, flags)
        code = held + bytes([byte])
        if code in self._codes:
            return (*places, b""), False, False
        if code in self._held:
            return (*places, code), False, False
        if held:
            # No character after all: the held bytes are text, and this byte begins anew.
            following, _, is_text = self.read((*state[:3], b""), byte)
            return following, True, is_text
        return (*places, b""), False, True

    def _search(self, state: _State, byte: int, flags: int) -> tuple[int, int, int]:
        wanted = (not flags & _OPENED, flags & _OPENED, flags & _OPENED)
        return tuple(
            search(tag, back, at, chr(byte)) if want and at < len(tag) else at
            for tag, back, at, want in zip(self._tags, self._back, state, wanted, strict=False)
        )


def build_spans(tokens: Sequence[bytes]) -> SpanTables:
    """Returns the tables of both spans for a tokenizer.

    Args:
      tokens: byte string of each token, empty for special tokens.

    Raises:
      TokenizerError: if the tokenizer lacks a token for a single byte, or has one of many bytes.
    """
    single = {t[0]: i for i, t in reversed(list(enumerate(tokens))) if len(t) == 1}
    missing = [b for b in range(256) if b not in single]
    if missing:
        raise TokenizerError(f"the tokenizer has no token for the byte {missing[0]:#04x}")
    marks = set(b"<>") | {b for c in SPACES for b in c.encode()}
    cut = [i for i, t in enumerate(tokens) if len(t) > 1 and marks & set(t)]
    row = np.zeros(len(tokens) + 1, np.int32)
    parts = np.zeros((len(cut) + 1, max((len(tokens[i]) for i in cut), default=1)), np.int32)
    for r, i in enumerate(cut, 1):
        row[i] = r
        parts[r, : len(tokens[i])] = [single[b] for b in tokens[i]]
    sizes = np.asarray([*map(len, tokens), 0], np.int32)
    return SpanTables(*_machine(tokens, sizes), sizes, row, parts)


def _machine(tokens: Sequence[bytes], sizes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the fields of `SpanTables` up to `token_class`."""
    machine = _Tags()
    states, table = close(machine.start, machine.step)
    flags = np.asarray([machine.flags(state) for state in states], np.int32)
    texts = np.asarray([[machine.read(s, b)[1:] for b in range(256)] for s in states])
    shape = (len(states), len(tokens) + 1)
    following = np.repeat(np.arange(shape[0], dtype=np.int32)[:, None], shape[1], axis=1)
    begin, end, last, stop = (np.zeros(shape, np.int16) for _ in range(4))
    for place in range(sizes.max()):
        alive = np.flatnonzero(sizes > place)
        byte = np.asarray([tokens[i][place] for i in alive])
        state, begins, ends, lasts, stops = (
            x[:, alive] for x in (following, begin, end, last, stop)
        )
        now = table[state, byte]
        before, after = flags[state], flags[now]
        new = after & ~before
        lasts[texts[state, byte, 0]] = 1 + place
        opens = (byte == ord("<")) & (before & _CONSISTENCY == 0)
        stops = np.where(opens, np.where(lasts == _KEEP, _TAKE_LAST, 1 + lasts), stops)
        lasts[texts[state, byte, 1]] = 1 + place + 1
        begins[new & _OPENED > 0] = place + 1 - len(_OPEN)
        ends[new & _COHERENCE > 0] = place + 1
        for whole, some in zip(
            (following, begin, end, last, stop), (now, begins, ends, lasts, stops), strict=True
        ):
            whole[:, alive] = some
    tables, token_class = classify([following, begin, end, last, stop])
    following, begin, end, last, stop = tables
    bits = np.asarray([len(states).bit_length(), int(sizes.max() + 3).bit_length()], np.int32)
    if bits[0] + 2 * bits[1] > 31:
        raise TokenizerError(f"the tokenizer has a token of {sizes.max()} bytes; 1000 would do")
    entry = following | last << bits[0] | stop << (bits[0] + bits[1])
    return entry, begin, end, flags, bits, token_class


def cut(spans: SpanTables, tokens: jax.Array, lengths: jax.Array) -> tuple[Span, Span]:
    """Returns the spans of coherence and of consistency of each response.

    Args:
      spans: the tables.
      tokens: int32[n, T].
      lengths: int32[n], tokens that count.
    """
    spans = jax.tree.map(jnp.asarray, spans)
    n, t = tokens.shape
    last_id = spans.token_class.shape[0] - 1
    known = (tokens >= 0) & (tokens < last_id) & (jnp.arange(t) < lengths[:, None])
    ids = jnp.where(known, tokens, last_id).T
    sizes, classes = spans.sizes[ids], spans.token_class[ids]
    state_bits, place_bits = spans.bits[0], spans.bits[1]
    places = (1 << place_bits) - 1

    def step(carry, column):
        state, start, count, last, stop = carry
        token_class, size = column
        entry = spans.entry[state, token_class]
        new_last = entry >> state_bits & places
        new_stop = entry >> (state_bits + place_bits)
        moved = jnp.where(new_stop == _TAKE_LAST, last, start + new_stop - 2)
        stop = jnp.where(new_stop == _KEEP, stop, moved)
        last = jnp.where(new_last == _KEEP, last, start + new_last - 1)
        seen = (state, start, count)
        following = entry & ((1 << state_bits) - 1)
        return (following, start + size, count + (size > 0), last, stop), seen

    zero = jnp.zeros(n, jnp.int32)
    (final, _, _, _, stop), (states, starts, counts) = jax.lax.scan(
        step, (zero,) * 5, (classes, sizes)
    )
    flags = spans.flags[states]

    def completed(flag: int, table: jax.Array) -> jax.Array:
        """Byte position that `table` says of the token which completed a tag."""
        at = jnp.sum(flags & flag == 0, axis=0)[None] - 1
        state, token_class, start = (
            jnp.take_along_axis(x, at, axis=0)[0] for x in (states, classes, starts)
        )
        return start + table[state, token_class]

    found = spans.flags[final]
    begin = completed(_OPENED, spans.begin)
    # Tokens without bytes are left out; what is left lies in `text` without gaps.
    place = jnp.where(sizes > 0, counts, t + jnp.arange(t)[:, None])
    text = jnp.zeros((n, t), jnp.int32)
    rows = jnp.arange(n)[:, None]
    text = text.at[rows, place.T].set(tokens, mode="drop", unique_indices=True)
    where = text, sizes, starts, begin
    return (
        _assemble(spans, *where, completed(_COHERENCE, spans.end), found & _COHERENCE > 0),
        _assemble(spans, *where, stop, found & _CONSISTENCY > 0),
    )


def _assemble(
    spans: SpanTables,
    text: jax.Array,
    sizes: jax.Array,
    starts: jax.Array,
    begin: jax.Array,
    end: jax.Array,
    found: jax.Array,
) -> Span:
    """Returns the tokens of the bytes from `begin` to `end` of each response.

    The first and the last token may stick out of the span: those are written byte by byte.

    Args:
      spans: the tables.
      text: int32[n, T], tokens that have bytes, without gaps.
      sizes, starts: int32[T, n], bytes of each token and before it, in the order of the response.
      begin, end: int32[n], bytes.
      found: bool[n].
    """
    n, t = text.shape
    begin, end = jnp.where(found, begin, 0), jnp.where(found, end, 0)
    real = sizes > 0

    def straddling(edge: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The last token that starts before a byte: how many do, its start, and its id."""
        before = real & (starts < edge)
        count = jnp.sum(before, axis=0)
        start = jnp.max(jnp.where(before, starts, 0), axis=0)
        token = jnp.take_along_axis(text, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        return count, start, token

    first, head_start, head = straddling(begin)
    stop, tail_start, tail = straddling(end)
    tail_end = tail_start + spans.sizes[tail]
    # How many byte tokens stand for the head, and for the tail; one token may be both.
    head_bytes = jnp.clip(jnp.minimum(head_start + spans.sizes[head], end) - begin, 0)
    head_bytes = jnp.where(first > 0, head_bytes, 0)
    cuts_tail = (tail_end > end) & (stop > first)
    tail_bytes = jnp.where(cuts_tail, end - tail_start, 0)
    whole = jnp.maximum(stop - cuts_tail - first, 0)

    width = spans.parts.shape[1]
    column = jnp.arange(t + 2 * width)
    middle = column - head_bytes[:, None]
    ending = middle - whole[:, None]

    def gather(x: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, jnp.clip(at, 0, x.shape[1] - 1), axis=1)

    head_at = (begin - head_start)[:, None] + column
    out = jnp.where(
        middle < 0,
        gather(spans.parts[spans.row[head]], head_at),
        jnp.where(
            ending < 0,
            gather(text, first[:, None] + middle),
            gather(spans.parts[spans.row[tail]], ending),
        ),
    )
    length = head_bytes + whole + tail_bytes
    return Span(jnp.where(column < length[:, None], out, 0), length, found)
