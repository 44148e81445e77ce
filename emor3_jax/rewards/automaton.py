"""Text rules as token tables: a rule reads characters, a table reads token ids.

A rule is a small machine over characters. It is closed over bytes (`close`), then composed with
the byte strings of a tokenizer's tokens (`compose`): the table says, for a state and a token, which
state follows. Scoring a batch is then one scan over integers, linear in length whatever the text.

Deviations, numbered:
 1. Bytes that are not valid UTF-8 decode to U+FFFD, once or several times; here they are read as
    one or several characters that no rule knows (`OTHER`). Rules treat one or several alike.
"""

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

OTHER = "\ufffd"
"""The character that stands for all characters that a rule does not tell apart."""

SPACES = tuple(c for c in map(chr, range(0x3001)) if c.isspace())
"""Unicode whitespace, Python's `\\s`."""


class TokenizerError(ValueError):
    """The tokenizer is not byte-level, so its tokens have no byte strings."""


class Rule(Protocol):
    """A machine over characters.

    Attributes:
      start: the first state, hashable.
      alphabet: the characters over one byte long that it tells from `OTHER`. `OTHER` once or
        several times in a row must lead to the same state.
    """

    start: Hashable
    alphabet: Iterable[str]

    def step(self, state: Any, char: str) -> Hashable:
        """Returns the state after a character."""

    def output(self, state: Any) -> int:
        """Returns the result if the text ends in this state."""


class Automaton(NamedTuple):
    """A rule composed with a tokenizer.

    Attributes:
      next: int32[states, classes], the state that follows. Tokens that act alike in every state
        share a class.
      token_class: int32[V + 1]; the last entry is for ids that stand for nothing.
      output: int32[states], the result of a text that ends there. State 0 is the first one.
    """

    next: jax.Array | np.ndarray
    token_class: jax.Array | np.ndarray
    output: jax.Array | np.ndarray


class _Bytes:
    """A rule over bytes: holds back the bytes of a character until it is known."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._chars = {c.encode(): c for c in rule.alphabet}
        self._prefixes = {code[:i] for code in self._chars for i in range(1, len(code))}
        self.start = (rule.start, b"")

    def step(self, state: tuple[Hashable, bytes], byte: int) -> tuple[Hashable, bytes]:
        inner, held = state
        code = held + bytes([byte])
        if code in self._chars:
            return self._rule.step(inner, self._chars[code]), b""
        if code in self._prefixes:
            return inner, code
        if held:
            return self.step((self._rule.step(inner, OTHER), b""), byte)
        char = chr(byte) if byte < 128 else OTHER
        return self._rule.step(inner, char), b""

    def output(self, state: tuple[Hashable, bytes]) -> int:
        inner, held = state
        return self._rule.output(self._rule.step(inner, OTHER) if held else inner)


def close(start: Hashable, step: Callable[[Any, int], Hashable]) -> tuple[list, np.ndarray]:
    """Returns all states that bytes can lead to from `start`, and the table int32[states, 256]."""
    states, index, rows = [start], {start: 0}, []
    for state in states:
        row = []
        for byte in range(256):
            following = step(state, byte)
            if following not in index:
                index[following] = len(states)
                states.append(following)
            row.append(index[following])
        rows.append(row)
    return states, np.asarray(rows, np.int32)


def compose(table: np.ndarray, tokens: Sequence[bytes]) -> np.ndarray:
    """Returns int32[states, V + 1], the state after a token; the last column is the empty token.

    Args:
      table: int32[states, 256].
      tokens: byte string of each token.
    """
    columns = np.repeat(np.arange(len(table), dtype=np.int32)[:, None], len(tokens) + 1, axis=1)
    alive = list(range(len(tokens)))
    for place in range(max(map(len, tokens), default=0)):
        alive = [i for i in alive if len(tokens[i]) > place]
        found = np.asarray([tokens[i][place] for i in alive])
        columns[:, alive] = table[columns[:, alive], found]
    return columns


def classify(columns: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Merges tokens whose columns are the same in all tables.

    Args:
      columns: int32[states, V + 1] each.

    Returns:
      The tables [states, classes] and the class of each token, int32[V + 1].
    """
    joined = np.concatenate(columns).T
    view = np.ascontiguousarray(joined).view([("", joined.dtype)] * joined.shape[1]).ravel()
    _, first, inverse = np.unique(view, return_index=True, return_inverse=True)
    tables = [np.ascontiguousarray(c[:, first]).astype(np.int32) for c in columns]
    return tables, inverse.ravel().astype(np.int32)


def build(rule: Rule, tokens: Sequence[bytes]) -> Automaton:
    """Returns a rule as a table over tokens.

    Args:
      rule: the machine over characters.
      tokens: byte string of each token, empty for special tokens.
    """
    over_bytes = _Bytes(rule)
    states, table = close(over_bytes.start, over_bytes.step)
    (following,), token_class = classify([compose(table, tokens)])
    outputs = np.asarray([over_bytes.output(state) for state in states], np.int32)
    return Automaton(following, token_class, outputs)


def run(automaton: Automaton, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns the rule's result for each text, int32[n]; one scan over the tokens.

    Args:
      automaton: the rule.
      tokens: int32[n, T].
      lengths: int32[n], tokens that count.
    """
    last = automaton.token_class.shape[0] - 1
    known = (tokens >= 0) & (tokens < last) & (jnp.arange(tokens.shape[1]) < lengths[:, None])
    classes = jnp.asarray(automaton.token_class)[jnp.where(known, tokens, last)]
    table = jnp.asarray(automaton.next)

    def step(state, token_class):
        return table[state, token_class], None

    start = jnp.zeros(tokens.shape[0], jnp.int32)
    state, _ = jax.lax.scan(step, start, classes.T)
    return jnp.asarray(automaton.output)[state]


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
