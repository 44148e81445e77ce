"""The loss of QA examples: its terms and their weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.tiny import make_policy
from support.tiny_faces import collate

from emor3_jax.embedded import pretrain
from emor3_jax.embedded.pretrain import Prefixes, QATokens, Size
from emor3_jax.types import Images, Prompt

POLICY = make_policy()
PARAMS = POLICY.init(jax.random.key(0))
SIZE = Size(6, 3)


def _images(count: int) -> tuple[Images, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (count, 4, POLICY.shapes.vision.patch_dim)
    return collate(POLICY, rng.normal(size=shape).astype(np.float32))


def _examples(rows: int, count: int, seed: int, weight: float) -> QATokens:
    rng = np.random.default_rng(seed)
    shape = (rows, count)
    return QATokens(
        rng.integers(1, 60, (*shape, SIZE.tokens)).astype(np.int32),
        np.full(shape, 5, np.int32),
        np.full(shape, 3, np.int32),
        np.full(shape, weight, np.float32),
    )


def _loss(labels: np.ndarray | None) -> tuple[float, list, jax.Array]:
    images, slots = _images(2)
    prompt, position = pretrain.make_prompt([5, 9, 70, 10], (1, 2, 2), slots, POLICY)
    text = Prompt(
        np.asarray([[5, 6]], np.int32),
        np.repeat(np.arange(2, dtype=np.int32)[None, :, None], 3, axis=-1),
        np.ones((1, 2), bool),
        np.full((1, 2), -1, np.int32),
    )
    prefixes = Prefixes(prompt, position, text)
    about_images = ((_examples(2, 1, 1, 1.0), SIZE), (_examples(2, 3, 2, 2.0), SIZE))
    about_text = (_examples(2, 1, 3, 4.0), SIZE)

    # One program instead of one for each operation.
    @jax.jit
    def find(params: dict) -> tuple:
        value, metrics = pretrain.loss(
            POLICY, params, prefixes, images, about_images, about_text, labels
        )
        hidden, _ = pretrain.forward_images(POLICY, params, prompt, images)
        return value, metrics["exact"], POLICY.logits(params, hidden[:, -1])

    value, exact, logits = find(PARAMS)
    return float(value), exact, logits


# Replies of two tokens: 2 of weight 1, 6 of weight 2 and 2 of weight 4.
WEIGHT = 2 * (2 * 1 + 6 * 2 + 2 * 4)


def test_a_fresh_policy_knows_nothing_and_every_kind_of_example_is_reported() -> None:
    value, exact, _ = _loss(None)
    assert value == pytest.approx(np.log(80), rel=0.05)
    assert [x.shape for x in exact] == [(1,), (3,), (1,)]


def test_labels_are_predicted_at_the_end_of_the_image_with_their_weight() -> None:
    labels = np.asarray([33, 44], np.int32)
    without, exact, logits = _loss(None)
    value, same, _ = _loss(labels)
    wrong = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    total = WEIGHT * without + pretrain.LABEL_WEIGHT * float(jnp.sum(wrong))
    assert value == pytest.approx(total / (WEIGHT + 2 * pretrain.LABEL_WEIGHT), rel=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(exact, same, strict=True))
