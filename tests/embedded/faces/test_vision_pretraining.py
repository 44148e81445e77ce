"""Vision pretraining: the whitened embedding, the optimizer, and that it tells images apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.tiny import VISION, make_policy
from support.tiny_faces import collate

from emor3_jax.embedded import pretrain
from emor3_jax.embedded.faces import vision_pretraining
from emor3_jax.embedded.faces.captions import CaptionBatch
from emor3_jax.models import rope
from emor3_jax.rl.update import TrainState

# One program instead of one for each operation.
caption_logits = jax.jit(vision_pretraining.caption_logits, static_argnums=0)


def test_whitened_patches_have_unit_covariance_up_to_the_scale() -> None:
    rng = np.random.default_rng(0)
    patches = (rng.normal(size=(4000, 12)) @ rng.normal(size=(12, 12)) * 3).astype(np.float32)
    before = jnp.asarray(rng.normal(size=(12, 16)), jnp.float32)
    after = vision_pretraining.whiten_patches(before, patches)
    np.testing.assert_array_equal(after[:, 8:], before[:, 8:])
    seen = patches @ np.asarray(after[:, :8])
    np.testing.assert_allclose(seen.T @ seen / len(seen), 0.25 * np.eye(8), atol=5e-3)


def test_whitening_is_bounded_where_patches_do_not_vary() -> None:
    patches = np.zeros((100, 6), np.float32)
    patches[:, 0] = np.random.default_rng(0).normal(size=100)
    after = vision_pretraining.whiten_patches(jnp.zeros((6, 8)), patches)
    # At most 0.5 / sqrt(0.01) in each column.
    assert float(jnp.max(jnp.linalg.norm(after, axis=0))) == pytest.approx(5.0, rel=1e-5)
    variance = np.mean(patches[:, 0] ** 2)
    np.testing.assert_allclose(
        jnp.linalg.norm(after[:, 0]), 0.5 / np.sqrt(variance + 0.01), rtol=1e-5
    )


def test_each_head_starts_by_attending_to_one_neighbour() -> None:
    vision = dataclasses.replace(VISION, hidden_size=96, num_heads=6)
    policy = make_policy(vision=vision)
    rng = np.random.default_rng(0)
    before = {
        "kernel": jnp.asarray(rng.normal(size=(2, 96, 288)), jnp.float32),
        "bias": jnp.zeros((2, 288)),
    }
    after = vision_pretraining.init_local_attention(before, policy, seed=3)
    for layer in range(2):
        sought = set()
        rows, columns = np.meshgrid(np.arange(6), np.arange(6), indexing="ij")
        coords = jnp.asarray(np.stack([rows.ravel(), columns.ravel()], axis=-1))
        turn = rope.vision_table(coords, vision.head_dim)
        both = after["bias"][layer].reshape(6, 3, 16)[None]
        query, key = (
            rope.rotate(jnp.broadcast_to(both[:, :, i], (36, 6, 16)), *turn) for i in (0, 1)
        )
        scores = jnp.einsum("qhd,khd->hqk", query, key) * 16**-0.5
        for head in np.asarray(jax.nn.softmax(scores)).reshape(6, 6, 6, 6, 6):
            # Of a patch in the middle; its neighbour has most of the attention.
            place = np.unravel_index(head[2, 3].argmax(), (6, 6))
            assert head[2, 3].max() > 0.7
            sought.add((int(place[0]) - 2, int(place[1]) - 3))
            # And all patches attend in the same direction, within the image.
            for row, column in ((1, 1), (4, 4), (1, 4)):
                there = np.unravel_index(head[row, column].argmax(), (6, 6))
                assert (there[0] - row, there[1] - column) == (place[0] - 2, place[1] - 3)
        assert len(sought) == 6 and all(abs(x) <= 1 for offset in sought for x in offset)
    # Values stay; what queries and keys say of the content is smaller.
    old, new = (np.asarray(x["kernel"]).reshape(2, 96, 6, 3, 16) for x in (before, after))
    np.testing.assert_array_equal(new[:, :, :, 2], old[:, :, :, 2])
    np.testing.assert_allclose(new[:, :, :, :2], 0.3 * old[:, :, :, :2], rtol=1e-6)


def test_matrices_take_orthogonal_updates_and_the_rate_falls_to_nothing() -> None:
    params = {"kernel": jnp.ones((3, 4, 8)), "bias": jnp.ones(8), "embedding": jnp.ones((5, 8))}
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.ndim), x.shape), params)
    optimizer = vision_pretraining.make_muon(1e-2, warmup_steps=2, steps=10, weight_decay=0.0)
    state = optimizer.init(params)
    sizes = []
    for _ in range(11):
        updates, state = optimizer.update(grads, state, params)
        sizes.append(float(optax.tree.norm(updates)))
        if len(sizes) == 3:
            # Newton-Schulz brings singular values near 1; the scale is 0.2 * sqrt(max(4, 8)).
            found = np.linalg.svd(updates["kernel"], compute_uv=False) / (1e-2 * 0.2 * 8**0.5)
            assert found.shape == (3, 4) and np.all((found > 0.6) & (found < 1.3))
            # Adam's updates have entries near the rate.
            assert float(jnp.mean(jnp.abs(updates["embedding"]))) == pytest.approx(1e-2, rel=0.2)
    assert sizes[0] == 0 and sizes[1] < sizes[2] == pytest.approx(max(sizes), rel=1e-2)
    assert sizes[2] > sizes[6] > sizes[9] > 0 and sizes[10] == 0


@pytest.mark.long
def test_images_are_mixed_in_pairs() -> None:
    """The loss of a mixed batch, computed anew from the mixture; the same seed, the same shares."""
    policy = make_policy()
    rng = np.random.default_rng(0)
    images, slots = collate(
        policy,
        [rng.normal(size=(4, policy.shapes.vision.patch_dim)).astype(np.float32) for _ in range(4)],
    )
    targets = np.asarray([[11, 21], [12, 22], [13, 23], [14, 24]], np.int32)
    batch = CaptionBatch(images, targets)
    tokens = [9, policy.shapes.image_token_id, 10]
    prompt, _ = pretrain.make_prompt(tokens, (1, 2, 2), slots, policy)
    optimizer = optax.sgd(1e-2)

    def start() -> TrainState:
        return TrainState.create(policy.init(jax.random.key(0)), optimizer)

    def loss(mix: float, seed: int = 3) -> float:
        options = {"policy": policy, "optimizer": optimizer, "mix": mix, "seed": seed}
        return float(vision_pretraining.vision_step(start(), prompt, batch, **options)[1]["loss"])

    state = start()
    key = jax.random.fold_in(jax.random.key(3), 0)
    drawn = np.asarray(jax.random.beta(key, 0.5, 0.5, (4,)))
    shares = np.maximum(drawn, 1 - drawn)
    assert int(state.updates) == 0 and np.all(shares >= 0.5) and np.any(shares < 0.95)
    patches = batch.images.patches
    mixed = np.stack(
        [s * patches[i] + (1 - s) * patches[i - 1] for i, s in enumerate(shares.tolist())]
    )
    mixed = batch.images._replace(patches=mixed)
    logits = caption_logits(policy, state.params, prompt, mixed)
    # Here nothing follows the image's end, so both places are one.
    np.testing.assert_array_equal(logits[:, 0], logits[:, 1])
    logps = np.asarray(jax.nn.log_softmax(logits[:, 0]))
    expected = [
        s * logps[i, targets[i]] + (1 - s) * logps[i, targets[i - 1]]
        for i, s in enumerate(shares.tolist())
    ]
    assert loss(0.5) == loss(0.5) == pytest.approx(-np.mean(expected), rel=1e-5)
    assert loss(0.5, seed=4) != loss(0.5)
    plain = caption_logits(policy, state.params, prompt, batch.images)[:, 0]
    plain = np.take_along_axis(np.asarray(jax.nn.log_softmax(plain)), targets, axis=1)
    assert loss(0.0) == pytest.approx(-np.mean(plain), rel=1e-5)


def test_a_policy_learns_to_tell_two_kinds_of_image() -> None:
    policy = make_policy()
    grid = (1, 2, 2)
    rng = np.random.default_rng(0)
    dim = policy.shapes.vision.patch_dim
    kinds = rng.normal(size=(2, 4, dim)).astype(np.float32)

    def batch(seed: int) -> CaptionBatch:
        rng = np.random.default_rng(seed)
        which = rng.integers(0, 2, 16)
        rows = [kinds[k] + rng.normal(size=(4, dim)).astype(np.float32) for k in which]
        targets = np.asarray([[11, 11], [12, 12]], np.int32)[which]
        return CaptionBatch(collate(policy, rows)[0], targets)

    _, slots = collate(policy, kinds[:1])
    tokens = [9, policy.shapes.image_token_id, 10]
    prompt, _ = pretrain.make_prompt(tokens, grid, slots, policy)
    optimizer = vision_pretraining.make_muon(1e-2, 2, 20, 0.0)
    state = TrainState.create(policy.init(jax.random.key(0)), optimizer)
    for seed in range(20):
        state, metrics = vision_pretraining.vision_step(
            state, prompt, batch(seed), policy=policy, optimizer=optimizer
        )
    assert int(state.updates) == 20 and float(metrics["loss"]) < 0.5
    right = vision_pretraining.correct_captions(state.params, prompt, batch(99), policy=policy)
    assert right.shape == (16, 2) and float(jnp.mean(right)) > 0.9


def test_targets_are_predicted_where_the_image_ends_and_where_the_prompt_does() -> None:
    """Each place as a prompt that ends there gives it; the loss is the mean of both."""
    policy = make_policy()
    rng = np.random.default_rng(0)
    shape = (3, 4, policy.shapes.vision.patch_dim)
    images, slots = collate(policy, rng.normal(size=shape).astype(np.float32))
    targets = np.asarray([[11, 14], [12, 15], [13, 16]], np.int32)
    batch = CaptionBatch(images, targets)
    optimizer = optax.sgd(1e-2)
    state = TrainState.create(policy.init(jax.random.key(0)), optimizer)

    def logits(tokens: list[int]) -> jax.Array:
        prompt, _ = pretrain.make_prompt(tokens, (1, 2, 2), slots, policy)
        return caption_logits(policy, state.params, prompt, batch.images)

    tokens = [9, policy.shapes.image_token_id, 10, 21, 22]
    both = logits(tokens)
    assert both.shape == (3, 2, policy.shapes.vocab_size)
    np.testing.assert_allclose(both[:, 0], logits(tokens[:3])[:, 0], atol=1e-5)
    assert float(jnp.max(jnp.abs(both[:, 1] - both[:, 0]))) > 1e-2
    # What the prompt ends with is what the second place follows.
    assert float(jnp.max(jnp.abs(both[:, 1] - logits([*tokens[:4], 23])[:, 1]))) > 1e-2
    wrong = -np.take_along_axis(np.asarray(jax.nn.log_softmax(both)), targets[..., None], axis=-1)
    right = jnp.argmax(both, axis=-1) == targets
    prompt, _ = pretrain.make_prompt(tokens, (1, 2, 2), slots, policy)
    np.testing.assert_array_equal(
        vision_pretraining.correct_captions(state.params, prompt, batch, policy=policy), right
    )
    _, metrics = vision_pretraining.vision_step(
        state, prompt, batch, policy=policy, optimizer=optimizer
    )
    assert float(metrics["loss"]) == pytest.approx(float(np.mean(wrong)), rel=1e-5)
    assert float(metrics["right"]) == pytest.approx(float(jnp.mean(right)))
