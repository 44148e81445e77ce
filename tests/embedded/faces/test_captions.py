"""Caption targets and their loader: targets, gaps before the prefix, augmented images."""

import numpy as np
import pytest
from support.tiny_faces import COUNT, HELD_OUT, labels_of

from emor3_jax.embedded.emoscenes import tasks as scene_tasks
from emor3_jax.embedded.faces import tasks
from emor3_jax.embedded.faces.captions import CaptionLoader, caption_targets, first_tokens
from emor3_jax.embedded.tokenizer import train_tokenizer


def test_labels_with_one_first_token_are_refused_by_name() -> None:
    tokenizer = train_tokenizer(scene_tasks.text_corpus(20), 400)
    first = first_tokens(tokenizer, {"a": "anger", "b": " anger", "c": "joy"})
    assert set(first) == {"a", "b", "c"} and len(set(first.values())) == 3
    with pytest.raises(ValueError, match=r"'zqqa', 'zqqb'.*vocab_size"):
        first_tokens(tokenizer, {"a": "zqqa", "b": "zqqb"})


def test_training_images_are_warped_and_held_out_ones_are_not(captions: CaptionLoader) -> None:
    rows = captions.rows
    dataset, processor = rows.dataset, rows.processor
    assert len(dataset.images) == COUNT and dataset.held_out == HELD_OUT
    captions = captions._replace(rows=rows._replace(warp=1.0))
    label = labels_of(captions)
    assert rows.train_rows == COUNT - HELD_OUT

    def plain(wanted: range) -> list[np.ndarray]:
        return [processor.encode(dataset.images[row]).image.patches[None] for row in wanted]

    learned = plain(range(rows.train_rows))
    batches = [x for x, _ in zip(captions.batches(16, seed=0), range(5), strict=False)]
    for found in batches:
        assert not any(np.allclose(x, y, atol=1e-3) for x in found.images.patches for y in learned)
    # Each row once in 40 before any comes again, as the labels tell.
    drawn = np.concatenate([x.targets[:, 0] for x in batches])[: rows.train_rows]
    assert sorted(label[int(x)] for x in drawn) == sorted(dataset.labels[: rows.train_rows])
    again = next(captions.batches(16, seed=0))
    np.testing.assert_array_equal(again.images.patches, batches[0].images.patches)
    np.testing.assert_array_equal(again.targets, batches[0].targets)

    held_out = list(captions.held_out_batches(300))
    assert [len(x.targets) for x in held_out] == [300, 300, 300, 124]
    wanted = plain(range(rows.train_rows, rows.train_rows + 300))
    np.testing.assert_allclose(held_out[0].images.patches, wanted, atol=1e-5)
    named = [label[int(x)] for x in held_out[0].targets[:, 0]]
    assert named == list(dataset.labels[rows.train_rows :][:300])


def test_caption_targets_are_the_words_that_descriptions_continue_with(
    captions: CaptionLoader,
) -> None:
    dataset, tokenizer = captions.rows.dataset, captions.rows.processor.tokenizer
    prompt = tokenizer.decode(captions.prompt().tokens[0])
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    assert prompt == image + "a face with"
    rng = np.random.default_rng(0)
    replies = [x.reply for row in range(7) for x in dataset.examples(row, rng)]
    # Of five examples per face one describes it, and one is a response, which describes it first.
    begun = [prompt.removeprefix(image) in reply for reply in replies]
    assert np.mean(begun) == pytest.approx(2 / 5)
    # The target at the end of the prompt is the next token of a description.
    prefix = tokenizer(dataset.caption_prefix, add_special_tokens=False).input_ids
    label = labels_of(captions)
    begins = {name: set() for name in tasks.LABELS}
    for each in tasks.LABELS:
        for seed in range(20):
            told = tasks.describe(each, np.random.default_rng(seed))
            tokens = tokenizer(told, add_special_tokens=False).input_ids
            assert tokens[: len(prefix)] == prefix
            begins[each].add(tokens[len(prefix)])
    seen = {name: set() for name in tasks.LABELS}
    for name, target in np.concatenate([x.targets for x in captions.held_out_batches(256)]):
        seen[label[int(name)]].add(int(target))
    assert seen == begins and all(len(tokens) == 1 for tokens in begins.values())
    assert len(set.union(*begins.values())) == len(tasks.LABELS)
    # Without caption targets, both positions predict the label.
    bare = dataset._replace(caption_prefix="", caption_targets={})
    targets = caption_targets(bare, tokenizer)
    plain = captions._replace(rows=captions.rows._replace(dataset=bare), targets=targets)
    batch = next(plain.held_out_batches(256))
    np.testing.assert_array_equal(batch.targets[:, 1], batch.targets[:, 0])


def test_the_caption_prefix_is_as_far_from_the_image_as_questions_put_it(
    captions: CaptionLoader,
) -> None:
    """Its three tokens move together, by up to 87 positions, and nothing else does."""
    bare = captions.prompt()
    prompts = captions.shifted_prompts(seed=0)
    moved = np.stack([next(prompts).positions[0] - bare.positions[0] for _ in range(400)])
    assert not moved[:, :-3].any() and (moved[:, -3:] == moved[:, -1:, :1]).all()
    gaps = moved[:, -1, 0]
    assert gaps.min() >= 0 and 80 < gaps.max() < 88 and len(set(gaps.tolist())) > 40
