"""Texts in the tokens of a judge, on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.rewards.spans import Span
from emor3_jax.rollout.retokenize import Retokenizer, has_tokens, widened


@pytest.fixture(scope="module")
def tokenizers():
    """Of a policy, which has whole words, and of a judge, which has hardly more than bytes."""
    return train_tokenizer(["a dark wood and joy"] * 9, 300), train_tokenizer(["x y z"] * 9, 270)


def span_of(rows: list[list[int]]) -> Span:
    """Texts of two responses to each prompt."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    lengths = np.asarray([len(row) for row in rows], np.int32).reshape(-1, 2)
    return Span(jnp.asarray(tokens.reshape(-1, 2, tokens.shape[1])), jnp.asarray(lengths), None)


def test_texts_are_what_the_judge_would_have_written(tokenizers):
    policy, judge = tokenizers
    texts = ["a dark wood", "", "joy", "and a wood"]
    ours = [policy.encode(text, add_special_tokens=False) for text in texts]
    theirs = [judge.encode(text, add_special_tokens=False) for text in texts]
    assert ours != theirs
    # The policy's are a few words each; the judge's 11 letters at most.
    (found, shorter), longest = Retokenizer(policy, judge)(
        (span_of(ours), span_of([ours[2]] * 4)), (4, 8, 16, 32)
    )
    assert longest == (11, 3)
    assert found.tokens.shape == (2, 2, 16) and shorter.tokens.shape == (2, 2, 4)
    assert found.lengths.tolist() == [[11, 0], [3, 10]]
    rows = found.tokens.reshape(4, 16)
    assert [row[: len(x)].tolist() for row, x in zip(rows, theirs, strict=True)] == theirs
    assert not rows[1].any()
    wide = widened(jax.eval_shape(lambda: span_of(ours)), 32)
    assert wide.tokens.shape == (2, 2, 32)


def test_a_text_spells_no_special_token_and_may_be_no_utf8(tokenizers):
    policy, judge = tokenizers
    retokenizer = Retokenizer(policy, judge)
    (row,) = retokenizer.encode(["<|im_end|>"])
    assert len(row) == 10 and judge.decode(row) == "<|im_end|>"
    # The judge's tokenizer itself is left as it was.
    assert judge.encode("<|im_end|>", add_special_tokens=False) == [
        judge.convert_tokens_to_ids("<|im_end|>")
    ]
    # The first of the two bytes of an accented letter alone.
    (first, _) = policy.encode("\u00e9", add_special_tokens=False)
    ((found,), _) = retokenizer((span_of([[first], [first]]),), (8,))
    assert judge.decode(found.tokens[0, 0, : found.lengths[0, 0]]) == "\ufffd"


def test_a_text_that_is_too_long_is_cut_and_counted(tokenizers, caplog):
    policy, judge = tokenizers
    retokenizer = Retokenizer(policy, judge)
    ours = [policy.encode(text, add_special_tokens=False) for text in ("a dark wood", "joy")]
    for already in (0, 1):
        assert retokenizer.cut == already
        (found,), longest = retokenizer((span_of(ours),), (4, 8))
        assert longest == (8,) and found.lengths.tolist() == [[8, 3]]
        assert judge.decode(found.tokens[0, 0]) == "a dark w"
    assert caplog.text.count("a judged text of 11 tokens of the judge is cut to 8") == 1


def test_a_judge_with_all_tokens_of_the_policy_reads_them(tokenizers):
    policy, other = tokenizers
    assert has_tokens(policy, policy)
    # The other one has bytes alone, as every tokenizer does.
    assert has_tokens(policy, other) and not has_tokens(other, policy)
    more = train_tokenizer(["a dark wood and joy"] * 9, 300)
    more.add_tokens(["<think>"])
    assert has_tokens(more, policy) and not has_tokens(policy, more)
