"""Text rules as token tables: a rule reads characters, a table reads token ids.

A rule is a small machine over characters. It is closed over them (`close`) and spelled out over
bytes (`over_bytes`), with as few states as do (`merge`), then composed with the byte strings of a
tokenizer's tokens (`compose`): the table says, for a state and a token, which state follows.
Scoring a batch is then one scan over integers, linear in length whatever the text.
"""

import functools
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from emor3_jax.errors import UserError

OTHER = "\ufffd"
"""The character that stands for all characters that a rule does not tell apart."""

SPACES = tuple(c for c in map(chr, range(0x3001)) if c.isspace())
"""Unicode whitespace, Python's `\\s`."""


class TokenizerError(UserError):
    """The tokenizer is not byte-level, so its tokens have no byte strings."""


class Rule(Protocol):
    """A machine over characters.

    Attributes:
      start: the first state, hashable.
      alphabet: the characters over one byte long that it tells from `OTHER`.
    """

    start: Hashable
    alphabet: Iterable[str]

    def step(self, state: Any, char: str) -> Hashable:
        """Returns the state after a character."""

    def output(self, state: Any) -> int:
        """Returns the result if the text ends in this state."""


class Automaton(NamedTuple):
    """Rules composed with a tokenizer; they are read side by side in one scan.

    Attributes:
      next: for each rule int32[states, classes], the state that follows. Tokens that act alike in
        every state of every rule share a class.
      token_class: int32[V + 1]; the last entry is for ids that stand for nothing.
      output: for each rule int32[states], the result of a text that ends there. State 0 is the
        first one.
    """

    next: tuple[jax.Array | np.ndarray, ...]
    token_class: jax.Array | np.ndarray
    output: tuple[jax.Array | np.ndarray, ...]


def close(
    start: Hashable, step: Callable[[Any, int], Hashable], inputs: int = 256
) -> tuple[list, np.ndarray]:
    """Returns all states that inputs can lead to from `start`, and the table int32[states, inputs].

    Args:
      start: the first state.
      step: the state after an input in `range(inputs)`.
      inputs: how many there are; a byte's values unless said otherwise.
    """
    states, index, rows = [start], {start: 0}, []
    for state in states:
        row = []
        for code in range(inputs):
            following = step(state, code)
            if following not in index:
                index[following] = len(states)
                states.append(following)
            row.append(index[following])
        rows.append(row)
    return states, np.asarray(rows, np.int32)


def merge(table: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smallest machine with the same outputs (Moore's partition); state 0 stays first.

    Args:
      table: int32[states, inputs].
      outputs: int32[states], the result of a text that ends there.
    """
    columns = np.unique(table, axis=1)
    group = _group_rows(outputs[:, None])
    while True:
        finer = _group_rows(np.column_stack([group, group[columns]]))
        if finer.max() == group.max():
            break
        group = finer
    # Groups are numbered by first member, so state 0 is in group 0.
    _, first = np.unique(group, return_index=True)
    return group[table[first]], outputs[first]


def _group_rows(rows: np.ndarray) -> np.ndarray:
    """Returns int32[n], equal numbers for equal rows, numbered in order of appearance."""
    _, first, inverse = _unique_rows(rows)
    order = np.empty(len(first), np.int32)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse]


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`np.unique` of the rows of a matrix, compared as bytes, with first indices and inverse."""
    rows = np.ascontiguousarray(rows)
    view = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, inverse = np.unique(view, return_index=True, return_inverse=True)
    return rows[first], first, inverse.ravel()


# UTF-8: what may follow in a character that has begun. For each class of beginnings, the range of
# the next byte and the class after it; the last one ends the character.
_DONE = "done"
_FOLLOW = {
    "one more": (0x80, 0xBF, _DONE),
    "two more": (0x80, 0xBF, "one more"),
    "three more": (0x80, 0xBF, "two more"),
    "after E0": (0xA0, 0xBF, "one more"),
    "after ED": (0x80, 0x9F, "one more"),
    "after F0": (0x90, 0xBF, "two more"),
    "after F4": (0x80, 0x8F, "two more"),
}


def _lead(byte: int) -> str | None:
    """Returns the class of a character that begins with a byte; None if none does."""
    special = {0xE0: "after E0", 0xED: "after ED", 0xF0: "after F0", 0xF4: "after F4"}
    if byte in special:
        return special[byte]
    for first, last, kind in (
        (0xC2, 0xDF, "one more"),
        (0xE1, 0xEF, "two more"),
        (0xF1, 0xF3, "three more"),
    ):
        if first <= byte <= last:
            return kind
    return None


def over_bytes(rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Returns a rule as a table over bytes, int32[states, 256], and each state's result.

    Bytes are decoded on the fly as Python's `decode("utf-8", "replace")` and tokenizers do: the
    longest beginning of a character that does not go on is one U+FFFD. A state is one of the rule's
    with the bytes of a character that is not whole yet, or their class where the rule knows no
    character that begins so.
    """
    chars = [*map(chr, range(128)), *rule.alphabet, OTHER]
    states, table = close(rule.start, lambda s, i: rule.step(s, chars[i]), len(chars))
    table, outputs = merge(table, np.asarray([rule.output(s) for s in states], np.int32))
    code_of = {c.encode(): i for i, c in enumerate(chars[:-1]) if i >= 128}
    prefixes = sorted({code[:i] for code in code_of for i in range(1, len(code))})
    index = {held: i for i, held in enumerate([b"", *prefixes, *_FOLLOW])}
    other = table[:, -1]
    n, width = len(table), len(index)

    def kind(held: bytes | str) -> str:
        if isinstance(held, str):
            return held
        return functools.reduce(lambda k, _: _FOLLOW[k][2], held[1:], _lead(held[0]))

    def begin(byte: int) -> np.ndarray:
        """The states that follow each state with a byte that begins a character, or none."""
        begun = _lead(byte)
        if begun is None:
            return (table[:, byte] if byte < 128 else other) * width
        return np.arange(n) * width + index.get(bytes([byte]), index[begun])

    def go_on(held: bytes | str, byte: int, following: str) -> np.ndarray:
        """The states that follow each state and some bytes held back."""
        code = held + bytes([byte]) if isinstance(held, bytes) else None
        if following == _DONE:
            return (table[:, code_of[code]] if code in code_of else other) * width
        return np.arange(n) * width + index.get(code, index[following])

    anew = np.column_stack([begin(byte) for byte in range(256)])
    following = np.empty((n, width, 256), np.int32)
    following[:, 0] = anew
    for held, i in index.items():
        if held:
            # A byte that does not go on ends what was held, and begins anew.
            following[:, i] = anew[other]
            first, last, kind_after = _FOLLOW[kind(held)]
            for byte in range(first, last + 1):
                following[:, i, byte] = go_on(held, byte, kind_after)
    # A text that ends within a character has an invalid one there.
    results = np.column_stack([outputs, *[outputs[other]] * (width - 1)])
    return merge(following.reshape(n * width, 256), results.ravel())


def compose(table: np.ndarray, tokens: Sequence[bytes]) -> np.ndarray:
    """Returns int32[states, V + 1], the state after a token; the last column is the empty token.

    Args:
      table: int32[states, 256].
      tokens: byte string of each token.
    """
    columns = np.repeat(np.arange(len(table), dtype=np.int32)[:, None], len(tokens) + 1, axis=1)
    alive = list(range(len(tokens)))
    for offset in range(max(map(len, tokens), default=0)):
        alive = [i for i in alive if len(tokens[i]) > offset]
        found = np.asarray([tokens[i][offset] for i in alive])
        columns[:, alive] = table[columns[:, alive], found]
    return columns


def classify(columns: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Merges tokens whose columns are the same in all tables.

    Args:
      columns: int32[states, V + 1] each.

    Returns:
      The tables [states, classes] and the class of each token, int32[V + 1].
    """
    _, first, inverse = _unique_rows(np.concatenate(columns).T)
    tables = [np.ascontiguousarray(c[:, first]).astype(np.int32) for c in columns]
    return tables, inverse.astype(np.int32)


def build_automaton(rules: Sequence[Rule], tokens: Sequence[bytes]) -> Automaton:
    """Returns rules as tables over tokens.

    Args:
      rules: the machines over characters.
      tokens: byte string of each token, empty for special tokens.
    """
    tables, outputs = zip(*map(over_bytes, rules), strict=True)
    following, token_class = classify([compose(table, tokens) for table in tables])
    return Automaton(tuple(following), token_class, outputs)


def run_automaton(
    automaton: Automaton, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns each rule's result for each text, int32[n]; one scan over the tokens.

    Args:
      automaton: the rules.
      tokens: int32[n, T].
      lengths: int32[n], tokens that count.
    """
    last = automaton.token_class.shape[0] - 1
    known = (tokens >= 0) & (tokens < last) & (jnp.arange(tokens.shape[1]) < lengths[:, None])
    classes = jnp.asarray(automaton.token_class)[jnp.where(known, tokens, last).T]
    tables = [jnp.asarray(table) for table in automaton.next]

    def step(states: list[jax.Array], token_class: jax.Array) -> tuple[list[jax.Array], None]:
        return [t[s, token_class] for t, s in zip(tables, states, strict=True)], None

    start = [jnp.zeros(tokens.shape[0], jnp.int32)] * len(tables)
    states, _ = jax.lax.scan(step, start, classes)
    return tuple(
        jnp.asarray(output)[state] for output, state in zip(automaton.output, states, strict=True)
    )


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Returns the byte string of each token of a byte-level BPE tokenizer, empty if special.

    Args:
      tokenizer: a Hugging Face fast tokenizer.

    Raises:
      TokenizerError: if the tokenizer does not decode by bytes.
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    kinds = [d["type"] for d in decoder.get("decoders", [decoder]) if "type" in d]
    if kinds != ["ByteLevel"]:
        raise TokenizerError(
            f"tokenizer {type(tokenizer).__name__} decodes by {kinds or 'nothing'}; the reward "
            "tables need a byte-level BPE tokenizer, such as Qwen2.5-VL's"
        )
    byte_of = {c: b for b, c in _byte_alphabet().items()}
    added = tokenizer.added_tokens_decoder
    out = []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if i in added:
            out.append(b"" if added[i].special else added[i].content.encode())
        elif token is None:
            out.append(b"")
        else:
            unknown = [c for c in token if c not in byte_of]
            if unknown:
                raise TokenizerError(f"token {i} {token!r} contains {unknown[0]!r}, not a byte")
            out.append(bytes(byte_of[c] for c in token))
    return out


def _byte_alphabet() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's convention)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {b: chr(b) for b in printable}
    hidden = (b for b in range(256) if b not in alphabet)
    return alphabet | {b: chr(256 + i) for i, b in enumerate(hidden)}
