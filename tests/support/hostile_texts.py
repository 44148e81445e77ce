"""Tokenizers, hostile texts and ways to spell them, for tests of the rewards."""

import functools
import random
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from emor3_jax import rewards
from emor3_jax.embedded.tokenizer import train_tokenizer

# Two words, prefixes of one another, marks, a final sigma, a character whose lower case is two.
LABELS = ("joy", "Anger", "anger x", "sky blue", "kelvin", "a?b", "sad/glad", "φόβος", "İzmir")
ROWS, WIDTH = 256, 224

SPACES = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\x1c",
    "\x85",
    "\xa0",
    "\u2003",
    "\u2028",
    "\u3000",
]
TAGS = [f"<{slash}step{i}>" for i in (1, 2, 3) for slash in ("", "/")]
NEAR = [
    *("< step1 >", "<\xa0/ step2\u2003>", "</\nstep1>", "<step 1>", "<Step1>", "<step1", "step2>"),
    *("<<step1>", "<step1><step1>", "<step11>", "/step2>", "</step2", "<step2 >", "<step3/>"),
]
BOXES = [
    *(
        "\\boxed{",
        "\\boxed {",
        "\\boxed\\boxed{",
        "\\boxed{{",
        "\\boxed{ ",
        "boxed{",
        "\\boxe",
        "}",
    ),
    *(
        "\\boxed{\\boxed{",
        "\\boxed{}",
        "\\text{",
        "{",
        "}}",
        "\\",
        "\\}",
        "$\\boxed{",
        "\\boxed{/ ",
    ),
]
WORDS = [
    *("joy", "anger", "ANGER", "anger x", "Anger\tX", "anger  x", "sky blue", "\u212aelvin", "a?b"),
    *("sad / glad", "sad/glad", "a\tb", "φόβος", "ΦΌΒΟΣ", "φόβοσ", "İZMIR", "i\u0307zmir", "izmir"),
    *("angerx", "jo", "joyful", "none", "None", "yes", "No", "YeS", "n", "o", "nyes", "é", "😀"),
    *("🙂\u200d", "\u2080", "€", "\u200b", "\ufeff", "a face", "/", "<", ">", "s", "step", "1"),
]


def well_formed(rng: random.Random) -> str:
    """A response in the wanted shape, with some whitespace where models put it."""

    def space() -> str:
        return rng.choice(["", "", " ", rng.choice(SPACES)])

    text = ""
    for i in (1, 2, 3):
        text += f"<step{i}>{space()}{rng.choice(WORDS)}{space()}</step{i}>{space()}"
        text += rng.choice(["", "", rng.choice(WORDS)]) + space()
    return f"{text}\\boxed{{{space()}{rng.choice(WORDS)}{space()}}}" + rng.choice(
        ["", ".", space()]
    )


def make_text(rng: random.Random) -> str:
    """A text that is nearly right, a heap of pieces, or letters of the tags alone."""
    kind = rng.random()
    pieces = [SPACES, TAGS, NEAR, BOXES, WORDS]
    if kind < 0.6:
        text = well_formed(rng)
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            a, b = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
            b = min(b, a + rng.choice([1, 1, 3, 10]))
            change = rng.randrange(4)
            if change == 0:
                text = text[:a] + text[b:]
            elif change == 1:
                text = text[:b] + text[a:]
            else:
                text = text[:a] + rng.choice(rng.choice(pieces)) + text[a:]
    elif kind < 0.85:
        text = "".join(rng.choice(rng.choice(pieces)) for _ in range(rng.randrange(14)))
    elif kind < 0.95:
        text = rng.choice(WORDS) + rng.choice(["", "", ".", " "])
    else:
        text = "".join(rng.choices("<>/step12 \xa0", k=rng.randrange(40)))
    while len(text.encode()) > WIDTH:
        text = text[: len(text) // 2]
    return text


class Speller:
    """Writes byte strings as tokens of one tokenizer, in any of the ways that there are."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.bytes = rewards.token_bytes(tokenizer)
        self.ids: dict[bytes, list[int]] = {}
        for i, code in enumerate(self.bytes):
            if code:
                self.ids.setdefault(code, []).append(i)
        self.longest = max(map(len, self.ids))
        self.silent = [i for i, code in enumerate(self.bytes) if not code]

    def spell(self, code: bytes, rng: random.Random) -> list[int]:
        """A random way to write `code`, sometimes with special or unknown ids in between."""
        greedy, noisy = rng.random(), rng.random() < 0.2
        out, at = [], 0
        while at < len(code):
            fits = [n for n in range(1, self.longest + 1) if code[at : at + n] in self.ids]
            size = fits[-1] if rng.random() < greedy else rng.choice(fits)
            size = min(size, len(code) - at)
            out.append(rng.choice(self.ids[code[at : at + size]]))
            at += size
            if noisy and rng.random() < 0.1 and len(out) + len(code) - at < WIDTH:
                out.append(rng.choice([*self.silent, -1, len(self.bytes), 10**6]))
        return out

    def read(self, ids: Sequence[int]) -> bytes:
        """The bytes of tokens; ids that stand for nothing are skipped."""
        return b"".join(self.bytes[i] for i in ids if 0 <= i < len(self.bytes))


def pad(rows: Sequence[Sequence[int]], filler: int = 0) -> tuple[jax.Array, jax.Array]:
    """Pads to [ROWS, WIDTH], one shape for all tests so that each tokenizer compiles once."""
    assert len(rows) <= ROWS and max(map(len, rows), default=0) <= WIDTH
    tokens = np.full((ROWS, WIDTH), filler, np.int32)
    lengths = np.zeros(ROWS, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return jnp.asarray(tokens), jnp.asarray(lengths)


@jax.jit
def read_all(tables, tokens, lengths):
    """Everything that the tables say of the texts."""
    coherence, consistency = rewards.cut_spans(tables, tokens, lengths)
    return {
        "response": rewards.score_response(tables, tokens, lengths),
        "label": rewards.read_reply(tables, "coherence", tokens, lengths),
        "yes_no": rewards.read_reply(tables, "consistency", tokens, lengths),
        "coherence": coherence,
        "consistency": consistency,
    }


def _corpus() -> list[str]:
    rng = random.Random(5)
    plain = "<step1>joy</step1> <step2>joy</step2> <step3>joy</step3> \\boxed{joy}"
    return [well_formed(rng) for _ in range(300)] + [plain] * 30


def _unsplit(vocab_size: int) -> PreTrainedTokenizerFast:
    """Merges run across spaces, tags and characters: `p1>\\n</st` may be one token."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(_corpus(), trainer)
    learner.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    learner.add_tokens(
        [AddedToken("<step", normalized=False), AddedToken("> </", normalized=False)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=learner, eos_token="<|im_end|>")


TOKENIZERS = {
    "bytes": lambda: train_tokenizer([], 270),
    "split": lambda: train_tokenizer(_corpus(), 520),
    "unsplit": lambda: _unsplit(700),
}


@functools.cache
def speller_of(name: str) -> Speller:
    """Returns the speller of one of `TOKENIZERS`."""
    return Speller(TOKENIZERS[name]())
