"""Rewards as token tables beside decoding and plain Python. python -m benchmarks.rewards

At Qwen's vocabulary size: how long the tables take to build and to read from disk, how large
they are; responses a second; time by length; ordinary text beside one that a backtracking regular
expression takes seconds for. The vocabulary is made of the words of this Python's own packages.
"""

import collections
import re
import resource
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from benchmarks.plain_rules import boxed, normalise
from emor3_jax import rewards
from emor3_jax.data.labels import label_set

VOCABULARY = 151_936
RESPONSES, TOKENS, RUNS = 4096, 256, 7
LABELS = label_set("mikels8")
_PIECES = re.compile(r" ?[^\W\d_]+|\d| ?[^\s\w]+[\r\n]*|\s+(?!\S)|\s+")


def qwen_sized_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer of Qwen's size: the commonest words, and pieces of words."""
    counts: collections.Counter[str] = collections.Counter()
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        if counts.total() > 40_000_000:
            break
        counts.update(_PIECES.findall(path.read_text(encoding="utf-8", errors="ignore")))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {char: i for i, char in enumerate(sorted(alphabet))}
    for piece, _ in counts.most_common():
        token = spell.pre_tokenize_str(piece)[0][0]
        for text in (token, token[: len(token) // 2 + 1]):
            if len(vocabulary) < VOCABULARY - 16 and len(text) < 32:
                vocabulary.setdefault(text, len(vocabulary))
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += [f"<|special_{i}|>" for i in range(VOCABULARY - len(vocabulary) - 3)]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


class Spelling:
    """Writes text as the longest tokens that fit."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids = {code: i for i, code in enumerate(rewards.token_bytes(tokenizer)) if code}
        self.longest = max(map(len, self.ids))

    def __call__(self, text: str) -> list[int]:
        code, out = text.encode(), []
        while code:
            size = next(n for n in range(self.longest, 0, -1) if code[:n] in self.ids)
            out.append(self.ids[code[:size]])
            code = code[size:]
        return out


def responses(spell: Spelling, count: int, length: int) -> np.ndarray:
    """Returns well-formed responses of exactly `length` tokens, int32[count, length]."""
    rng = np.random.default_rng(0)
    words = ["the", " light", " of", " a", " child", " quiet", " sea", " fear", " joy", " and", "."]
    prose = [spell(word) for word in words]
    rows = []
    for _ in range(count):
        label = LABELS[rng.integers(len(LABELS))]
        ends = [spell(f"<step{i}>") + spell(f"</step{i}>\n") for i in (1, 2, 3)]
        box = spell(f"\\boxed{{{label}}}")
        room = length - sum(map(len, ends)) - len(box)
        filler = [t for i in rng.integers(len(prose), size=room) for t in prose[i]][:room]
        cut = room // 3
        row = []
        for i in (1, 2, 3):
            part = filler[(i - 1) * cut : i * cut if i < 3 else room]
            row += spell(f"<step{i}>") + part + spell(f"</step{i}>\n")
        rows.append((row + box)[:length])
    return np.asarray(rows, np.int32)


def hostile(spell: Spelling, count: int, length: int) -> np.ndarray:
    """Returns repeated steps without a box, which the release's expression takes seconds for."""
    steps = spell("".join(f"<step{i}></step{i}>" for i in (1, 2, 3)))
    return np.tile((steps * (length // len(steps) + 1))[:length], (count, 1)).astype(np.int32)


_FORMAT = re.compile(
    r"<step1>.*</step1>.*<step2>.*</step2>.*<step3>.*</step3>.*\\boxed\{.*\}.*", re.DOTALL
)
_COHERENCE = re.compile("<step1>.*?</step2>", re.DOTALL)
_CONSISTENCY = re.compile("<step1>.*?(?=<step2>)", re.DOTALL)


def in_python(tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray) -> list[tuple]:
    """Returns format, boxed label and both spans of each response: decode, then the rules."""
    out = []
    for raw in tokenizer.batch_decode(tokens, skip_special_tokens=True):
        text = normalise(raw)
        spans = (_COHERENCE.search(raw), _CONSISTENCY.search(raw))
        found = tuple(span[0].strip() if span else None for span in spans)
        out.append((_FORMAT.fullmatch(text) is not None, boxed(text).lower(), *found))
    return out


@jax.jit
def on_device(tables: rewards.Tables, tokens: jax.Array, lengths: jax.Array) -> tuple:
    """Returns the same from tokens, the spans as tokens."""
    return (
        rewards.score_response(tables, tokens, lengths),
        *rewards.cut_spans(tables, tokens, lengths),
    )


def seconds(run: Callable[[], object], runs: int = RUNS) -> float:
    """Returns the median time of a call, after one to warm up."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    """Prints the tables."""
    tokenizer = qwen_sized_tokenizer()
    spell = Spelling(tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        times = []
        for _ in range(2):
            started = time.perf_counter()
            scorer = rewards.Scorer(tokenizer, LABELS, cache=cache)
            times.append(time.perf_counter() - started)
    build, read = times
    size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(scorer.tables))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{date.today()}, {jax.default_backend()}, {len(tokenizer):,} tokens\n")
    print(f"tables: {size / 1e6:.1f} MB, built in {build:.1f} s, read from disk in {read:.1f} s")
    print(f"peak of the process {peak:.1f} GiB")

    tables = jax.device_put(scorer.tables)

    def device(tokens: np.ndarray) -> Callable[[], object]:
        rows = jnp.asarray(tokens), jnp.full(len(tokens), tokens.shape[1], jnp.int32)
        return lambda: on_device(tables, *rows)

    tokens = responses(spell, RESPONSES, TOKENS)
    (format_, answer), *_ = device(tokens)()
    assert np.asarray(format_).all() and (np.asarray(answer) >= 0).all()
    plain = in_python(tokenizer, tokens)
    assert all(row[0] and LABELS[i] == row[1] for row, i in zip(plain, answer, strict=True))
    ours, theirs = seconds(device(tokens)), seconds(lambda: in_python(tokenizer, tokens), 3)
    print(f"\n{RESPONSES:,} responses of {TOKENS} tokens: format, box and both spans\n")
    print("| | seconds | responses a second |\n|---|---|---|")
    print(f"| token tables | {ours:.4f} | {RESPONSES / ours:,.0f} |")
    print(f"| decode and Python | {theirs:.3f} | {RESPONSES / theirs:,.0f} |")
    print(f"\nratio {theirs / ours:.1f}\n")

    print("| tokens | microseconds a response | hostile | ordinary, ns a token |")
    print("|---|---|---|---|")
    for length in (256, 1024, 4096, 8192):
        count = RESPONSES * TOKENS // length
        ordinary, bad = (
            seconds(device(make(spell, count, length)), 3) / count for make in (responses, hostile)
        )
        print(
            f"| {length} | {ordinary * 1e6:.1f} | {bad * 1e6:.1f} | {ordinary / length * 1e9:.1f} |"
        )


if __name__ == "__main__":
    main()
