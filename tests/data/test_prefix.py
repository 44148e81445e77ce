"""The image as a judge reads it: the beginning of its own prompts, padded to sizes of its own."""

import numpy as np
import pytest

from emor3_jax.data import prompts
from emor3_jax.data.encode import Encoder, Skip
from emor3_jax.data.prefix import PrefixEncoder
from emor3_jax.data.sources import Row, Texts


@pytest.fixture
def encode(processor) -> PrefixEncoder:
    return PrefixEncoder(processor, (1, 2))


def test_a_prefix_is_what_all_prompts_about_the_image_begin_with(encode, processor, make):
    prefix = encode(make["png"](0))
    tokens = prompts.render_prompt(processor.tokenizer, "{question}", "which ?", (), 4)
    n = prompts.shared_length(processor.tokenizer, tokens)
    assert prefix.tokens.tolist() == tokens[:n]
    # 4 x 4 patches, of which four are a token.
    positions, _ = processor.layout.positions(np.asarray(tokens, np.int32), [(1, 4, 4)])
    assert prefix.positions.tolist() == positions[:n].tolist()
    assert prefix.next_position == positions[n, 0]
    start = prefix.image_start
    assert tokens[start - 1] != tokens[start] == tokens[start + 3] != tokens[start + 4]


def test_prefixes_are_padded_to_what_their_windows_hold(encode, processor, make):
    small, wide = encode(make["png"](0)), encode(make["png"](1, 16, 32))
    assert len(wide.tokens) == len(small.tokens) + 4 and wide.image.bucket == 2
    around = len(small.tokens) - 4
    found = encode.collate([small, wide], 2)
    # Two windows of four tokens.
    assert found.prompt.tokens.shape == (2, around + 8)
    assert found.images.mask.shape[:3] == (2, 1, 2)
    assert found.shared_length.tolist() == [around + 4, around + 8]
    assert found.prompt.mask.sum(axis=1).tolist() == found.shared_length.tolist()
    assert found.shared_position.tolist() == [small.next_position, wide.next_position]
    slots = found.prompt.image_slots
    assert slots[0, small.image_start :][:5].tolist() == [0, 1, 2, 3, -1]
    assert encode.collate([small], 1).prompt.tokens.shape == (1, around + 4)
    # Where it is longer, it is a multiple of what attention kernels read at once.
    assert encode.collate([small], 50).prompt.tokens.shape == (1, 256)


def test_rows_with_images_too_large_for_a_judge_are_left_out(processor, make):
    texts = Texts("which ?", "joy", "a")
    encoders = [
        Encoder(processor, "{question}", ("joy",), 99, 99, prefixes=prefixes)
        for prefixes in (PrefixEncoder(processor, (1,)), None)
    ]
    small, wide = (Row([make["png"](0, 16, width)], texts) for width in (16, 32))
    assert encoders[0]((0, wide)) == Skip("judge_image", "a")
    assert encoders[1]((0, wide)).prefix is None
    found, plain = (encode((0, small)) for encode in encoders)
    # What the policy reads is the same.
    np.testing.assert_array_equal(found.image.image.patches, plain.image.image.patches)
    assert found.tokens.tolist() == plain.tokens.tolist()
    assert found.prefix.tokens.tolist() == found.tokens[: found.shared_length].tolist()
    assert encoders[0]((0, Row([b"no image"], texts))) == Skip("unreadable_image", "a")
