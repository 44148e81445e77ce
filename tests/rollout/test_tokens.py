"""Which tokens a response may contain."""

import pytest
from transformers import AddedToken

from emor3_jax.data.prompts import special_token_in
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models.errors import ProcessorError
from emor3_jax.rewards.automaton import token_bytes
from emor3_jax.rollout.tokens import stop_ids, suppressed_tokens


def test_special_tokens_are_suppressed_and_tokens_added_as_text_are_text() -> None:
    tokenizer = train_tokenizer(["a quiet street"] * 4, 300)
    plain = suppressed_tokens(len(tokenizer) + 3, tokenizer)
    special = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special]
    assert set(plain.nonzero()[0]) == {*special, *range(len(tokenizer), len(tokenizer) + 3)} - set(
        stop_ids(tokenizer)
    )
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<x>", special=True)])
    think, x = tokenizer.convert_tokens_to_ids(["<think>", "<x>"])
    now = suppressed_tokens(len(tokenizer), tokenizer)
    assert not now[think] and now[x]
    assert token_bytes(tokenizer)[think] == b"<think>" and token_bytes(tokenizer)[x] == b""
    assert special_token_in(tokenizer, "so <think> first") is None
    assert special_token_in(tokenizer, "so <x> first") == "<x>"


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused() -> None:
    tokenizer = train_tokenizer(["a quiet street"] * 4, 300)
    size = len(tokenizer)
    tokenizer.add_tokens(["<mine>"])
    message = rf"has the id {size} \('<mine>'\), but the policy's vocab_size={size}: "
    with pytest.raises(ProcessorError, match=message):
        suppressed_tokens(size, tokenizer)
