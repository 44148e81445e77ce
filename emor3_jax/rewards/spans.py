"""The parts of a response that the reflections judge, cut out of its own tokens.

Coherence judges from the first `<step1>` to the end of the first `</step2>` after it; consistency
from the first `<step1>` up to the first `<step2>` after it, whitespace at its end stripped. Both on
the raw text (docs/method.md). Tags may start and end in the middle of a token: the part of
such a token that belongs to the span is written as byte tokens, so the text of the tokens returned
is the span's text, byte for byte.

One machine reads both spans, in one scan. What it finds at a token is one entry of its table, a
packed integer; where the tags were completed is looked up afterwards, once for each response.

Deviations, numbered:
 1. Special tokens within a span are left out of it, as decoding skips them.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.rewards.automaton import SPACES, TokenizerError, classify, close
from emor3_jax.rewards.rules import failure, matched_length

_OPEN, _COHERENCE_END, _CONSISTENCY_END = "<step1>", "</step2>", "<step2>"
_OPENED, _COHERENCE, _CONSISTENCY = 1, 2, 4
"""Flags of a state: the opening tag was read; the closing tag of a span was."""
_CLASS_BITS = 16
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
      bounds: int32[2]. States are sorted: those below the first lack `_OPENED`, those below the
        second `_COHERENCE`.
      flags: int32[states].
      bits: int32[2].
      token: int32[V + 1], packed from the right: the class in 16 bits, the size in bytes.
      row: int32[V + 1], row of `parts` of a token that can be cut, 0 for others.
      parts: int32[rows, L], the byte tokens of such a token.
    """

    entry: jax.Array | np.ndarray
    begin: jax.Array | np.ndarray
    end: jax.Array | np.ndarray
    bounds: jax.Array | np.ndarray
    flags: jax.Array | np.ndarray
    bits: jax.Array | np.ndarray
    token: jax.Array | np.ndarray
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
        matched = self._search(state, byte, flags)
        code = held + bytes([byte])
        if code in self._codes:
            return (*matched, b""), False, False
        if code in self._held:
            return (*matched, code), False, False
        if held:
            # No character after all: the held bytes are text, and this byte begins anew.
            following, _, is_text = self.read((*state[:3], b""), byte)
            return following, True, is_text
        return (*matched, b""), False, True

    def _search(self, state: _State, byte: int, flags: int) -> tuple[int, int, int]:
        wanted = (not flags & _OPENED, flags & _OPENED, flags & _OPENED)
        return tuple(
            matched_length(tag, back, at, chr(byte)) if want and at < len(tag) else at
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
    return SpanTables(*_machine(tokens), row, parts)


@functools.cache
def _over_bytes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the machine over bytes: int32[S, 256], flags int32[S], and which held bytes are text.

    It does not depend on the tokenizer; the last is bool[S, 256, 2], as `_Tags.read` returns it.
    """
    machine = _Tags()
    states, table = close(machine.start, machine.step)
    # The tags are read in this order, so their flags rise along any text.
    order = np.argsort([machine.flags(s) & (_OPENED | _COHERENCE) for s in states], kind="stable")
    states, table = [states[i] for i in order], np.argsort(order).astype(np.int32)[table[order]]
    flags = np.asarray([machine.flags(state) for state in states], np.int32)
    texts = np.asarray([[machine.read(s, b)[1:] for b in range(256)] for s in states])
    return table, flags, texts


def _machine(tokens: Sequence[bytes]) -> tuple[np.ndarray, ...]:
    """Returns the fields of `SpanTables` up to `token`."""
    table, flags, texts = _over_bytes()
    bounds = [np.sum(flags & flag == 0) for flag in (_OPENED, _COHERENCE)]
    sizes = np.asarray([*map(len, tokens), 0], np.int32)
    shape = (len(flags), len(tokens) + 1)
    following = np.repeat(np.arange(shape[0], dtype=np.int32)[:, None], shape[1], axis=1)
    begin, end, last, stop = (np.zeros(shape, np.int16) for _ in range(4))
    for offset in range(sizes.max()):
        alive = np.flatnonzero(sizes > offset)
        byte = np.asarray([tokens[i][offset] for i in alive])
        state, begins, ends, lasts, stops = (
            x[:, alive] for x in (following, begin, end, last, stop)
        )
        now = table[state, byte]
        before, after = flags[state], flags[now]
        new = after & ~before
        lasts[texts[state, byte, 0]] = 1 + offset
        opens = (byte == ord("<")) & (before & _CONSISTENCY == 0)
        stops = np.where(opens, np.where(lasts == _KEEP, _TAKE_LAST, 1 + lasts), stops)
        lasts[texts[state, byte, 1]] = 1 + offset + 1
        begins[new & _OPENED > 0] = offset + 1 - len(_OPEN)
        ends[new & _COHERENCE > 0] = offset + 1
        for whole, some in zip(
            (following, begin, end, last, stop), (now, begins, ends, lasts, stops), strict=True
        ):
            whole[:, alive] = some
    tables, token_class = classify([following, begin, end, last, stop])
    following, begin, end, last, stop = tables
    bits = np.asarray([len(flags).bit_length(), int(sizes.max() + 3).bit_length()], np.int32)
    if bits[0] + 2 * bits[1] > 31:
        raise TokenizerError(f"the tokenizer has a token of {sizes.max()} bytes; 1000 would do")
    entry = following | last << bits[0] | stop << (bits[0] + bits[1])
    token = token_class | sizes << _CLASS_BITS
    return entry, begin, end, np.asarray(bounds, np.int32), flags, bits, token


def cut(spans: SpanTables, tokens: jax.Array, lengths: jax.Array) -> tuple[Span, Span]:
    """Returns the spans of coherence and of consistency of each response.

    Args:
      spans: the tables.
      tokens: int32[n, T].
      lengths: int32[n], tokens that count.
    """
    spans = jax.tree.map(jnp.asarray, spans)
    n, t = tokens.shape
    last_id = spans.token.shape[0] - 1
    known = (tokens >= 0) & (tokens < last_id) & (jnp.arange(t) < lengths[:, None])
    columns = spans.token[jnp.where(known, tokens, last_id).T]
    state_bits, place_bits = spans.bits[0], spans.bits[1]
    state_mask, place_mask = (1 << state_bits) - 1, (1 << place_bits) - 1

    def step(carry: tuple, column: jax.Array) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        state, start, count, last, stop, opening, ending = carry
        token_class, size = column & ((1 << _CLASS_BITS) - 1), column >> _CLASS_BITS
        entry = spans.entry[state, token_class]
        new_last = entry >> state_bits & place_mask
        new_stop = entry >> (state_bits + place_bits)
        moved = jnp.where(new_stop == _TAKE_LAST, last, start + new_stop - 2)
        stop = jnp.where(new_stop == _KEEP, stop, moved)
        last = jnp.where(new_last == _KEEP, last, start + new_last - 1)
        # The token that completes a tag is the last one that is read in a state without it.
        here = state << _CLASS_BITS | token_class, start
        opening, ending = (
            tuple(jnp.where(state < bound, new, old) for new, old in zip(here, event, strict=True))
            for bound, event in zip(spans.bounds, (opening, ending), strict=True)
        )
        seen = start, count
        count = count + (size > 0)
        return (entry & state_mask, start + size, count, last, stop, opening, ending), seen

    zero = jnp.zeros(n, jnp.int32)
    carry = (zero, zero, zero, zero, zero, (zero,) * 2, (zero,) * 2)
    (final, total, count, _, stop, opening, ending), (starts, counts) = jax.lax.scan(
        step, carry, columns
    )

    def position(event: tuple[jax.Array, jax.Array], offsets: jax.Array) -> jax.Array:
        pair, start = event
        return start + offsets[pair >> _CLASS_BITS, pair & ((1 << _CLASS_BITS) - 1)]

    begin, end = position(opening, spans.begin), position(ending, spans.end)
    # Tokens without bytes are left out; what is left lies in `text` without gaps.
    filled = columns >> _CLASS_BITS > 0
    index = jnp.arange(t)[:, None]

    def close_gaps(tokens: jax.Array) -> jax.Array:
        target = jnp.where(filled, counts, t + index).T
        text = jnp.zeros((n, t), jnp.int32)
        rows = jnp.arange(n)[:, None]
        return text.at[rows, target].set(tokens, mode="drop", unique_indices=True)

    # A scatter costs as much as all the rest; special tokens mostly stand at the end alone.
    text = jax.lax.cond(jnp.any(filled & (counts != index)), close_gaps, lambda x: x, tokens)
    found = spans.flags[final]
    response = _Text(text, starts, counts, total, count)
    first = _token_before(spans, response, begin)
    return tuple(
        _assemble(spans, response, first, begin, after, found & flag > 0)
        for after, flag in ((end, _COHERENCE), (stop, _CONSISTENCY))
    )


class _Text(NamedTuple):
    """The tokens of responses that have bytes, and where all tokens lie.

    Attributes:
      tokens: int32[n, T], those that have bytes, without gaps.
      starts: int32[T, n], bytes before each token of the response.
      counts: int32[T, n], tokens with bytes before it.
      size, count: int32[n], bytes and tokens with bytes of the whole response.
    """

    tokens: jax.Array
    starts: jax.Array
    counts: jax.Array
    size: jax.Array
    count: jax.Array


class _Edge(NamedTuple):
    """The last token that starts before a byte.

    Attributes:
      count: int32[n], tokens with bytes that start before it.
      token, start, size: int32[n], the last of them, its first byte and how many it has.
    """

    count: jax.Array
    token: jax.Array
    start: jax.Array
    size: jax.Array


def _token_before(spans: SpanTables, text: _Text, byte: jax.Array) -> _Edge:
    """Returns the last token that starts before `byte`, int32[n], by halving."""
    t = len(text.starts)

    def at(x: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index[None], axis=0, mode="clip")[0]

    below = jnp.zeros_like(byte)
    for power in range(t.bit_length() - 1, -1, -1):
        further = below + (1 << power)
        below = jnp.where((further <= t) & (at(text.starts, further - 1) < byte), further, below)
    past = below >= t
    count = jnp.where(past, text.count, at(text.counts, below))
    behind = jnp.where(past, text.size, at(text.starts, below))
    last = jnp.maximum(count - 1, 0)[:, None]
    token = jnp.take_along_axis(text.tokens, last, axis=1)[:, 0]
    size = spans.token[token] >> _CLASS_BITS
    return _Edge(count, token, behind - size, size)


def _assemble(
    spans: SpanTables,
    text: _Text,
    first: _Edge,
    begin: jax.Array,
    end: jax.Array,
    found: jax.Array,
) -> Span:
    """Returns the tokens of the bytes from `begin` to `end` of each response.

    The first and the last token may stick out of the span: those are written byte by byte.

    Args:
      spans: the tables.
      text: the responses.
      first: the last token that starts before `begin`.
      begin, end: int32[n], bytes; anything where there is no span.
      found: bool[n].
    """
    t = text.tokens.shape[1]
    end = jnp.where(found, end, begin)
    final = _token_before(spans, text, end)
    # How many byte tokens stand for the head, and for the tail; one token may be both.
    head_bytes = jnp.clip(jnp.minimum(first.start + first.size, end) - begin, 0)
    head_bytes = jnp.where(first.count > 0, head_bytes, 0)
    cuts_tail = (final.start + final.size > end) & (final.count > first.count)
    tail_bytes = jnp.where(cuts_tail, end - final.start, 0)
    whole = final.count - cuts_tail - first.count

    head, tail = (spans.parts[spans.row[edge.token]] for edge in (first, final))
    # Computed once for each response: fused into what follows, it would be for each column.
    offset = begin - first.start
    offset, skipped, head_bytes, whole, tail_bytes, head, tail = jax.lax.optimization_barrier(
        (offset, first.count, head_bytes, whole, tail_bytes, head, tail)
    )
    e = spans.parts.shape[1]
    column = jnp.arange(t + 2 * e)
    middle = column - head_bytes[:, None]
    ending = middle - whole[:, None]
    source = jnp.where(ending < 0, e + skipped[:, None] + middle, e + t + ending)
    source = jnp.where(middle < 0, offset[:, None] + column, source)
    # One gather from all three: they cost more than the copy.
    pieces = jnp.concatenate([head, text.tokens, tail], axis=1)
    out = jnp.take_along_axis(pieces, source, axis=1, mode="clip")
    length = jnp.where(found, head_bytes + whole + tail_bytes, 0)
    return Span(jnp.where(column < length[:, None], out, 0), length, found)
