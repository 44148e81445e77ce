"""The text rules of the reward (docs/method.md), as machines over characters.

Format and boxed answer read the normalised text: every run of whitespace next to `<`, `>` or `/` is
removed first. `Normalised` does that on the fly, in front of a rule.
"""

import functools
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from emor3_jax.errors import UserError
from emor3_jax.rewards.automaton import OTHER, SPACES, Rule
from emor3_jax.spelling import normalize

_DELIMITERS = "<>/"
STEPS = ("<step1>", "</step1>", "<step2>", "</step2>", "<step3>", "</step3>", "\\boxed{", "}")
NO_LABEL, NO_REPLY = -1, -2


class LabelError(UserError):
    """A label set that the rules cannot tell apart, or of which a label could not be earned."""


def lowercase_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Returns the labels in the form in which they are compared (`spelling.normalize`).

    Raises:
      LabelError: if there is none, two are equal in lower case, or one could not be boxed.
    """
    lowered = tuple(map(normalize, labels))
    if not lowered:
        raise LabelError("labels=(): at least one label is needed")
    for i, label in enumerate(lowered):
        name = f"label {labels[i]!r}"
        if label in lowered[:i]:
            raise LabelError(f"{name} is equal to {labels[lowered.index(label)]!r} in lower case")
        if set(label) & {*"{}<>\\", OTHER}:
            raise LabelError(
                f"{name} contains a brace, an angle bracket, a backslash or an invalid character"
            )
        if not label or " ".join(label.split()) != label or labels[i] != labels[i].strip():
            raise LabelError(f"{name} must have words joined by single spaces")
        if label == "none":
            raise LabelError(f"{name} is what a missing answer reads as; choose another word")
    return lowered


def failure(pattern: str) -> list[int]:
    """Returns the failure function of Knuth, Morris and Pratt: the fallback of each position."""
    back = [0] * (len(pattern) + 1)
    k = 0
    for i in range(1, len(pattern)):
        while k and pattern[i] != pattern[k]:
            k = back[k]
        k += pattern[i] == pattern[k]
        back[i + 1] = k
    return back


def matched_length(pattern: str, back: list[int], position: int, char: str) -> int:
    """Returns how much of `pattern` the text ends with after `char`."""
    while position and (position == len(pattern) or pattern[position] != char):
        position = back[position]
    return position + (pattern[position] == char)


class FormatRule:
    """1 if the text starts with `<step1>` and holds the other marks in order after it, else 0."""

    start: Hashable = (0, 0)
    alphabet = ()

    def __init__(self) -> None:
        self._back = [failure(pattern) for pattern in STEPS]

    def step(self, state: Any, char: str) -> Hashable:
        stage, position = state
        if stage in (-1, len(STEPS)):
            return state
        pattern = STEPS[stage]
        if stage == 0 and pattern[position] != char:
            return (-1, 0)
        position = matched_length(pattern, self._back[stage], position, char)
        return (stage + 1, 0) if position == len(pattern) else (stage, position)

    def output(self, state: Any) -> int:
        return int(state[0] == len(STEPS))


class BoxRule:
    """Index of the label in the last `\\boxed{…}`, in any case, stripped; -1 if it is none.

    A label holds no brace, so content with one is no label, whatever its depth.
    """

    _MARK = "\\boxed{"
    # Content: outside, before its first character, no label, or closed on a label.
    _OUT, _LEAD, _DEAD = "out", "lead", "dead"
    start: Hashable = (0, _OUT)

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = {label: i for i, label in enumerate(lowercase_labels(labels))}
        self._words = _Words(self._labels)
        self._back = failure(self._MARK)
        self.alphabet = (*SPACES, *self._words.alphabet)

    def step(self, state: Any, char: str) -> Hashable:
        position, content = state
        position = matched_length(self._MARK, self._back, position, char)
        if position == len(self._MARK):
            return (0, self._LEAD)
        return (position, self._content(content, char))

    def _content(self, content: Any, char: str) -> Any:
        if content in (self._OUT, self._DEAD) or isinstance(content, int):
            return content
        if content == self._LEAD:
            if char.isspace():
                return content
            text, space = "", ""
        else:
            text, space = content
        if char == "}":
            return self._labels.get(text.lower(), self._DEAD)
        if char.isspace():
            # One plain space may stand inside a label; any other run may only be stripped.
            return (text, " " if char == " " and not space else "\t")
        text = self._words.extend(text + space, char)
        return self._DEAD if text is None else (text, "")

    def output(self, state: Any) -> int:
        return state[1] if isinstance(state[1], int) else NO_LABEL


class ReplyRule:
    """Index of the label that the whole reply is, in any case; -2 if empty or `none`; else -1."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = {label: i for i, label in enumerate(lowercase_labels(labels))}
        self._words = _Words((*self._labels, "none"))
        self.start: Hashable = ""
        self.alphabet = self._words.alphabet

    def step(self, state: Any, char: str) -> Hashable:
        return None if state is None else self._words.extend(state, char)

    def output(self, state: Any) -> int:
        text = None if state is None else state.lower()
        return NO_REPLY if text in ("", "none") else self._labels.get(text, NO_LABEL)


class YesNoRule:
    """1 if the text contains `yes` in any case; else 0 if it contains `no`; else -1."""

    start: Hashable = ("", False)
    alphabet = ()

    def step(self, state: Any, char: str) -> Hashable:
        ending, no = state
        if ending == "yes":
            return state
        char = char.lower()
        if ending + char in ("y", "ye", "yes"):
            return (ending + char, no)
        if ending == "n" and char == "o":
            return ("", True)
        return (char if char in ("y", "n") else "", no)

    def output(self, state: Any) -> int:
        ending, no = state
        return 1 if ending == "yes" else (0 if no else -1)


class Normalised:
    """Puts the removal of whitespace next to `<`, `>` and `/` in front of a rule."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.start: Hashable = (rule.start, False, "")
        self.alphabet = tuple({*rule.alphabet, *SPACES})

    def step(self, state: Any, char: str) -> Hashable:
        # `held` is whitespace whose fate the next character decides: "", one space, or any other
        # run, which is as good as a tab to every rule.
        inner, after_delimiter, held = state
        if char.isspace():
            if after_delimiter:
                return state
            return (inner, False, " " if char == " " and not held else "\t")
        if held and char not in _DELIMITERS:
            inner = self._rule.step(inner, held)
        return (self._rule.step(inner, char), char in _DELIMITERS, "")

    def output(self, state: Any) -> int:
        return self._rule.output(state[0])


@functools.cache
def _changed_by_lower() -> tuple[str, ...]:
    """Returns all characters with another lower case; surrogates have none."""
    return tuple(c for c in map(chr, range(0x110000)) if c.lower() != c)


class _Words:
    """Reads text as long as it may become one of some lower-case words, whatever its case.

    The text read so far is kept composed (NFC) and in lower case but for capital sigmas, whose
    lower case depends on what follows them.
    """

    _CAPITAL, _SIGMA, _FINAL = "\u03a3\u03c3\u03c2"

    def __init__(self, words: Iterable[str]) -> None:
        words = [self._fold(word) for word in words]
        self._prefixes = {word[:i] for word in words for i in range(len(word) + 1)}
        # A letter may come in parts: e and an accent.
        parts = {c: _parts(c) for word in words for c in word}
        self._prefixes |= {
            word[:i] + part for word in words for i, c in enumerate(word) for part in parts[c]
        }
        # Characters over one byte long whose lower case occurs (K of Kelvin reads as k).
        wanted = {c for letter in parts for c in unicodedata.normalize("NFD", letter)}
        wanted |= {c for letter in parts for part in (letter, *parts[letter]) for c in part}
        wanted |= {self._FINAL} if self._SIGMA in wanted else set()
        found = {c for c in wanted if c.lower() == c}
        found |= {c for c in _changed_by_lower() if set(c.lower()) <= wanted}
        self.alphabet = tuple(sorted(c for c in found if c >= "\x80"))

    def _fold(self, text: str) -> str:
        return text.replace(self._CAPITAL, self._SIGMA).replace(self._FINAL, self._SIGMA)

    def extend(self, text: str, char: str) -> str | None:
        """Returns the text with a character more, None if no word begins so."""
        text += char if char == self._CAPITAL else char.lower()
        text = unicodedata.normalize("NFC", text)
        return text if self._fold(text) in self._prefixes else None


def _parts(letter: str) -> list[str]:
    """Returns the beginnings of a letter that is written in parts: e of é, e and ê of ế."""
    parts = unicodedata.normalize("NFD", letter)
    return [unicodedata.normalize("NFC", parts[:i]) for i in range(1, len(parts))]
