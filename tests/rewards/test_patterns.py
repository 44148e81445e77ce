"""Expressions as automata against `re.search`, on texts and on bytes that are no text."""

import random
import re

import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.rewards import automaton
from emor3_jax.rewards.patterns import PatternError, PatternRule

PATTERNS = [
    r"joy",
    r"^joy$",
    r"\Ajoy\Z",
    r"(?i)joy|FEAR",
    r"(?i)straße|ſ",
    r"\w+ \w+",
    r"^\w{3,5}$",
    r"(a|b)*c",
    r"(?:ab){2,3}?x",
    r"a.c",
    r"(?s)a.c",
    r"[^a-c\s]",
    r"[é-ü]\d",
    r"\d+[.,]\d*\s?€",
    r"(?i:A)b",
    r"^$",
    r"",
    r"a*?$",
    r"x|^b|c$",
    r"(?a)\w\W",
    r"^.{4}$",
    r"(?s)^.{2,6}$",
]
PIECES = [
    *(
        "1.5 €",
        "abab",
        "joy",
        "JOY",
        "fear",
        "a",
        "b",
        "c",
        "x",
        "ab",
        " ",
        "\n",
        "\t",
        ".",
        ",",
        "1",
        "12",
        "٣",
    ),
    *("é", "ü", "€", "ß", "ẞ", "ſ", "STRASSE", "straße", "\u00a0", "\u2003", "漢", "😀", "_"),
]
NOISE = [b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\x80", b"\xed\xa0\x80", b"\xf4\x90"]


def read(rule, codes: list[bytes]) -> list[int]:
    """The rule's results, through the table over bytes."""
    table, outputs = automaton.over_bytes(rule)
    single = [bytes([b]) for b in range(256)]
    machine = automaton.Automaton(
        (automaton.compose(table, single),), np.arange(257, dtype=np.int32), (outputs,)
    )
    tokens = np.zeros((len(codes), 64), np.int32)
    for i, code in enumerate(codes):
        tokens[i, : len(code)] = list(code)
    lengths = jnp.asarray([len(code) for code in codes], jnp.int32)
    return np.asarray(automaton.run_automaton(machine, jnp.asarray(tokens), lengths)[0]).tolist()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_search(pattern):
    rng = random.Random(0)
    codes = [b"", b"\n", b"joy\n", b"joy\n\n"]
    for i in range(1500):
        code = "".join(rng.choice(PIECES) for _ in range(rng.randrange(7))).encode()
        if i % 3 == 0:
            at = rng.randrange(len(code) + 1)
            code = code[:at] + rng.choice(NOISE) + code[at + rng.randrange(2) :]
        codes.append(code[:64])
    wanted = [int(re.search(pattern, c.decode("utf-8", "replace")) is not None) for c in codes]
    assert read(PatternRule(pattern), codes) == wanted
    assert 0 < sum(wanted) < len(codes) or pattern in ("", "a*?$")


class CountRule:
    """How many characters a text has, at most 9."""

    start = 0
    alphabet = ("é", "€", "\u3000", "😀")

    def step(self, state, char):
        return min(state + 1, 9)

    def output(self, state):
        return state


def test_bytes_that_are_no_text_are_as_many_characters_as_for_python():
    rng = random.Random(1)
    alphabet = [
        b"a",
        "é".encode(),
        "€".encode(),
        "😀".encode(),
        "漢".encode(),
        "𝄞".encode(),
        *NOISE,
    ]
    alphabet += [bytes([b]) for b in (0xC0, 0xC2, 0xE0, 0xE1, 0xED, 0xF0, 0xF1, 0xF4, 0xF5, 0x9F)]
    codes = [b"".join(rng.choices(alphabet, k=rng.randrange(9)))[:64] for _ in range(20_000)]
    codes = [c[rng.randrange(2) : len(c) - rng.randrange(2)] for c in codes]
    wanted = [min(len(c.decode("utf-8", "replace")), 9) for c in codes]
    assert read(CountRule(), codes) == wanted


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"(a)\1", "groupref"),
        (r"a(?=b)", "assert"),
        (r"(?<!a)b", "assert_not"),
        (r"\bjoy", "at_boundary"),
        (r"(?m)^a", r"\(\?m\)"),
        (r"(?>a)b", "atomic_group"),
        (r"a++", "possessive_repeat"),
        (r"a{2000}", "over 1000 times"),
        (r"(a", "missing \\)"),
    ],
)
def test_what_no_automaton_can_read_is_refused(pattern, named):
    with pytest.raises(PatternError, match=named):
        PatternRule(pattern)
