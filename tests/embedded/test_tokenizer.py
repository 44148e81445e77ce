import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from emor3_jax.embedded.emoscenes import scene as scenes
from emor3_jax.embedded.emoscenes import tasks, words
from emor3_jax.embedded.tokenizer import SPECIAL_TOKENS, train_tokenizer

TOKENIZER = train_tokenizer(tasks.text_corpus(scenes_per_style=60), 1200)


def _pieces(text):
    return TOKENIZER.convert_ids_to_tokens(TOKENIZER(text).input_ids)


def test_special_tokens_are_single():
    for token in SPECIAL_TOKENS:
        ids = TOKENIZER(token).input_ids
        assert len(ids) == 1
        assert ids[0] in TOKENIZER.all_special_ids
    assert TOKENIZER.eos_token == "<|im_end|>"
    assert TOKENIZER.pad_token == "<|endoftext|>"
    assert TOKENIZER.unk_token is None
    assert len(TOKENIZER) <= 1200


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(text):
    normal = TOKENIZER.backend_tokenizer.normalizer.normalize_str(text)
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == normal


def test_all_bytes_have_a_token():
    vocabulary = TOKENIZER.get_vocab()
    assert sum(len(token) == 1 for token in vocabulary) == 256
    assert all(letter in vocabulary for letter in string.ascii_letters)


def test_words_are_single_tokens_and_responses_short():
    for style in scenes.STYLES:
        for cue in scenes.CUES:
            for value in scenes.values(style, cue):
                assert len(_pieces(f" {value}")) == 1, value
        for label in scenes.labels(style):
            assert len(_pieces(label)) == 1
            assert len(_pieces(f" {label}")) == 1
    rng = np.random.default_rng(0)
    scene = scenes.sample("drawn", rng)
    response = words.set_response(
        words.describe(scene), words.feeling("fear", rng), words.arousal("fear"), "fear"
    )
    assert 40 <= len(_pieces(response)) <= 55


def test_pieces_split_as_qwen_splits():
    tokenizer = train_tokenizer(["it's a1b22  x\n\ny <step1> (z)"] * 50, 400)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("it's a1b22  x\n\ny <step1> (z)").input_ids)
    joined = [p.replace("Ġ", " ").replace("Ċ", "\n") for p in pieces]
    expected = ["it", "'s", " a", "1", "b", "2", "2", " ", " x", "\n\n", "y", " <", "step", "1"]
    assert joined == [*expected, ">", " (", "z", ")"]


def test_chat_of_text_and_image():
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "why ?"}]}]
    assert TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>why ?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_chat_of_many_turns():
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": " a\n"},
        {"role": "assistant", "content": "b"},
        {
            "role": "user",
            "content": [{"type": "video"}, {"type": "image"}, {"text": "c", "type": ""}],
        },
    ]
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    start = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n a\n<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\n"
    )
    assert TOKENIZER.apply_chat_template(turns, tokenize=False) == (
        f"{start}{video}{image}c<|im_end|>\n"
    )
    assert TOKENIZER.apply_chat_template(turns, tokenize=False, add_vision_id=True) == (
        f"{start}Video 1: {video}Picture 1: {image}c<|im_end|>\n"
    )


def test_save_and_load(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(TOKENIZER)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.chat_template == TOKENIZER.chat_template
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    text = "<|im_start|>user\nit's  naïve <step1> 123 \\boxed{joy}<|im_end|>"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids


def test_training_is_repeatable_and_needs_room():
    corpus = tasks.text_corpus(scenes_per_style=60)
    assert train_tokenizer(corpus, 1200).get_vocab() == TOKENIZER.get_vocab()
    with pytest.raises(ValueError, match=r"vocab_size is 256; .* at least 270"):
        train_tokenizer([], 256)
