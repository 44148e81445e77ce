"""Regular expressions as machines over characters, for custom reward terms.

Python's own parser reads the expression and Python's own engine says which characters each of its
classes holds, so that `\\w`, ranges, case and Unicode mean what they mean to `re`. What is built
from it is an automaton: exact, and linear in length whatever the expression.

Deviations, numbered:
 1. Only what an automaton can do: no back-references, no lookaround, no word boundaries, no
    possessive or atomic parts, no `(?m)`. Such an expression is refused by name.
"""

import functools
import re
from collections.abc import Hashable, Sequence
from re import _compiler, _constants, _parser
from typing import Any, NamedTuple

from emor3_jax.errors import UserError
from emor3_jax.rewards.automaton import OTHER


class PatternError(UserError):
    """An expression that is wrong, or that no automaton can read."""


class _Node(NamedTuple):
    """A position in an expression.

    Attributes:
      kind: "char", "split", "begin", "end" or "match".
      following: positions after it.
      test: of "char": index of the class that the character must be in.
    """

    kind: str
    following: tuple[int, ...]
    test: int = -1


_MATCH = 0
_MOST = 1000
"""Largest repetition, and largest number of positions."""


@functools.cache
def _all_characters() -> str:
    return "".join(chr(p) for p in range(0x110000) if not 0xD800 <= p < 0xE000)


class _Class(NamedTuple):
    """The characters of a class.

    Attributes:
      chars: those that it holds, or lacks.
      inverted: it lacks them, and holds all others.
    """

    chars: frozenset[str]
    inverted: bool


@functools.cache
def _read_class(test: re.Pattern) -> _Class:
    """Asks the engine about every character; cached, since one class often stands many times."""
    if test.fullmatch(OTHER):
        return _Class(frozenset(test.sub("", _all_characters())), True)
    return _Class(frozenset(test.findall(_all_characters())), False)


class PatternRule:
    """1 if an expression matches anywhere in the text, as `re.search`, else 0.

    Attributes:
      pattern: the expression.
    """

    def __init__(self, pattern: str) -> None:
        """Reads an expression.

        Args:
          pattern: as `re` takes it, with flags inside, such as `(?si)`.

        Raises:
          PatternError: if it is wrong, or asks for what an automaton cannot do.
        """
        self.pattern = pattern
        try:
            parsed = _parser.parse(pattern)
        except re.error as error:
            raise PatternError(f"pattern {pattern!r}: {error}") from error
        self._nodes = [_Node("match", ())]
        self._tests: list[re.Pattern] = []
        flags = parsed.state.flags
        if flags & re.MULTILINE:
            raise self._refuse("(?m)")
        first = self._sequence(parsed, flags, _MATCH)
        self._first = first
        self._classes = [_read_class(test) for test in self._tests]
        different = frozenset().union(*(each.chars for each in set(self._classes)))
        self.alphabet: Sequence[str] = tuple(sorted(c for c in different if ord(c) > 127))
        self._cache: dict[tuple, Hashable] = {}
        self.start: Hashable = self._close({first}, at_start=True)

    def step(self, state: Any, char: str) -> Hashable:
        """Returns the state after a character; the empty set of positions stands for a match."""
        if _MATCH in state:
            return state
        holds = tuple((char in each.chars) != each.inverted for each in self._classes)
        key = state, holds, char == "\n"
        if key not in self._cache:
            # A match may also begin at any later character.
            reached = {self._first}
            for i in state:
                node = self._nodes[i]
                if node.kind == "char" and holds[node.test]:
                    reached.add(node.following[0])
                elif node.kind == "end" and char == "\n":
                    reached.add(self._last(node.following[0]))
            self._cache[key] = self._close(reached)
        return self._cache[key]

    def output(self, state: Any) -> int:
        """Returns whether the text matches if it ends here."""
        return int(_MATCH in self._close(set(state), at_end=True))

    def _close(
        self, positions: set[int], at_start: bool = False, at_end: bool = False
    ) -> frozenset:
        """Returns all positions that are reached without a character; `_MATCH` alone if it is."""
        found, todo = set(), list(positions)
        while todo:
            i = todo.pop()
            if i in found:
                continue
            found.add(i)
            node = self._nodes[i]
            passes = {"split": True, "begin": at_start, "end": at_end, "last": at_end}
            if passes.get(node.kind, False):
                todo += node.following
        return frozenset({_MATCH}) if _MATCH in found else frozenset(found)

    def _add(self, kind: str, *following: int, test: int = -1) -> int:
        if len(self._nodes) >= 20 * _MOST:
            raise PatternError(f"pattern {self.pattern!r} is too large")
        self._nodes.append(_Node(kind, following, test))
        return len(self._nodes) - 1

    def _last(self, following: int) -> int:
        """The position behind a final newline: only the end may follow."""
        node = _Node("last", (following,))
        if node not in self._nodes:
            self._nodes.append(node)
        return self._nodes.index(node)

    def _sequence(self, items: Sequence, flags: int, following: int) -> int:
        for item in reversed(list(items)):
            following = self._item(item, flags, following)
        return following

    def _item(self, item: tuple, flags: int, following: int) -> int:
        """Returns the first position of an item that goes on to `following`."""
        kind, value = item
        if kind in (_constants.LITERAL, _constants.NOT_LITERAL, _constants.IN, _constants.ANY):
            return self._add("char", following, test=self._test(item, flags))
        if kind is _constants.SUBPATTERN:
            _, added, removed, inner = value
            if added & re.MULTILINE:
                raise self._refuse("(?m)")
            return self._sequence(inner, (flags | added) & ~removed, following)
        if kind is _constants.BRANCH:
            ways = [self._sequence(way, flags, following) for way in value[1]]
            return self._add("split", *ways)
        if kind in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
            least, most, inner = value
            if least > _MOST or (most is not _constants.MAXREPEAT and most > _MOST):
                raise PatternError(f"pattern {self.pattern!r} repeats over {_MOST} times")
            if most is _constants.MAXREPEAT:
                loop = self._add("split")
                body = self._sequence(inner, flags, loop)
                self._nodes[loop] = _Node("split", (body, following))
                following = loop
            else:
                after = following
                for _ in range(most - least):
                    following = self._add("split", self._sequence(inner, flags, following), after)
            for _ in range(least):
                following = self._sequence(inner, flags, following)
            return following
        if kind is _constants.AT and value in (
            _constants.AT_BEGINNING,
            _constants.AT_BEGINNING_STRING,
        ):
            return self._add("begin", following)
        if kind is _constants.AT and value is _constants.AT_END:
            return self._add("end", following)
        if kind is _constants.AT and value is _constants.AT_END_STRING:
            return self._add("last", following)
        raise self._refuse(str(value if kind is _constants.AT else kind).lower())

    def _test(self, item: tuple, flags: int) -> int:
        """Returns the index of a character class, with the expression that tests it."""
        state = _parser.State()
        state.flags = flags & ~re.DEBUG
        single = _parser.SubPattern(state, [item])
        test = _compiler.compile(single, state.flags)
        self._tests.append(test)
        return len(self._tests) - 1

    def _refuse(self, what: str) -> PatternError:
        return PatternError(
            f"pattern {self.pattern!r} asks for {what}, which no automaton can read; leave it out, "
            "or give the term as a function of the text"
        )
