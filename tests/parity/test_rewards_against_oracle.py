"""Many texts: the token tables against plain Python, the box against the grader package.

As `tests/rewards`, which draws the same kinds of texts in the thousands: near misses of the tags,
broken nesting, Unicode spaces, several and nested boxes, escapes, characters cut in half, tokens in
an order that no text would give. `make parity TEXTS=1000000` reads a million.
"""

import os
import random

import jax
import numpy as np
import pytest
from mathruler.grader import extract_boxed_content
from support import hostile_texts as tools
from support import oracle

from emor3_jax import rewards

CASES = int(os.environ.get("TEXTS", "100000"))
ROWS, WIDTH = 4096, 224
_NOISE = [b"\xe2", b"\xe2\x80", b"\xc2", b"\xff", b"\x80", b"\xe2\x80 ", b"\xc2\xc2\xa0", b"\xed"]


def draw(speller, rng: random.Random, kind: float) -> list[int]:
    """Ids of one text."""
    if kind < 0.7:
        return speller.spell(tools.make_text(rng).encode(), rng)
    if kind < 0.9:
        code = bytearray(tools.make_text(rng).encode())
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(code) + 1)
            code[at : at + rng.randrange(2)] = rng.choice(_NOISE)
        return speller.spell(bytes(code[:WIDTH]), rng)
    return [rng.randrange(len(speller.bytes)) for _ in range(rng.randrange(50))]


def disagreements(speller, tables, rows) -> int:
    """How many of the texts are read otherwise than by plain Python, in whatever."""
    tokens, lengths = np.zeros((ROWS, WIDTH), np.int32), np.zeros(ROWS, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    said = jax.tree.map(np.asarray, tools.read_all(tables, tokens, lengths))
    bad = 0
    for i, ids in enumerate(rows):
        code = speller.read(ids)
        text = code.decode("utf-8", "replace")
        normal = oracle.normalise(text)
        # Each invalid byte is a character of its own here, so that bytes can be told apart.
        raw = code.decode("utf-8", "surrogateescape")
        same = said["response"][0][i] == oracle.format_score(text)
        same &= said["response"][1][i] == oracle._index(extract_boxed_content(normal), tools.LABELS)
        same &= said["label"][i] == oracle.reply_label(text, tools.LABELS)
        same &= said["yes_no"][i] == oracle.yes_no(text)
        for name in ("coherence", "consistency"):
            span, expected = said[name], getattr(oracle, f"{name}_text")(raw)
            same &= span.found[i] == (expected is not None)
            written = speller.read(span.tokens[i, : span.lengths[i]])
            same &= written == (expected or "").encode("utf-8", "surrogateescape")
        bad += not same
    return bad


@pytest.mark.parametrize("name", list(tools.TOKENIZERS))
def test_many_texts(name, enter):
    speller = tools.speller_of(name)
    tables = jax.device_put(rewards.Scorer(speller.tokenizer, tools.LABELS).tables)
    rng = random.Random(name)
    texts = bad = 0
    while texts < CASES / len(tools.TOKENIZERS):
        rows = [draw(speller, rng, rng.random()) for _ in range(ROWS)]
        rows = [row for row in rows if len(row) <= WIDTH]
        bad += disagreements(speller, tables, rows)
        texts += len(rows)
    enter(
        f"texts read otherwise than by Python, of {texts:,}, tokenizer {name}", bad, bad / texts, 0
    )
