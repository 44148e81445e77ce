"""Learning to look: the whitened embedding, the optimizer, and that two kinds of picture part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from emor3_jax.embedded import look, pretrain, tasks
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models.qwen2_5_vl import layout, model
from emor3_jax.rl.update import TrainState


def test_whitened_patches_have_unit_covariance_up_to_the_scale() -> None:
    rng = np.random.default_rng(0)
    patches = (rng.normal(size=(4000, 12)) @ rng.normal(size=(12, 12)) * 3).astype(np.float32)
    before = jnp.asarray(rng.normal(size=(12, 16)), jnp.float32)
    after = look.whitened(before, patches)
    np.testing.assert_array_equal(after[:, 8:], before[:, 8:])
    seen = patches @ np.asarray(after[:, :8])
    np.testing.assert_allclose(seen.T @ seen / len(seen), 0.25 * np.eye(8), atol=5e-3)


def test_whitening_is_bounded_where_patches_do_not_vary() -> None:
    patches = np.zeros((100, 6), np.float32)
    patches[:, 0] = np.random.default_rng(0).normal(size=100)
    after = look.whitened(jnp.zeros((6, 8)), patches)
    # At most 0.5 / sqrt(0.01) in each column.
    assert float(jnp.max(jnp.linalg.norm(after, axis=0))) == pytest.approx(5.0, rel=1e-5)
    variance = np.mean(patches[:, 0] ** 2)
    np.testing.assert_allclose(
        jnp.linalg.norm(after[:, 0]), 0.5 / np.sqrt(variance + 0.01), rtol=1e-5
    )


def test_labels_with_one_first_token_are_refused_by_name() -> None:
    tokenizer = train_tokenizer(tasks.text_corpus(20), 400)
    first = look.first_tokens(tokenizer, {"anger", "sadness", "joy"})
    assert len(set(first.values())) == 3
    with pytest.raises(ValueError, match=r"'zqqa', 'zqqb'.*vocab_size"):
        look.first_tokens(tokenizer, {"zqqa", "zqqb"})


def test_matrices_take_orthogonal_updates_and_the_rate_falls_to_nothing() -> None:
    params = {"kernel": jnp.ones((3, 4, 8)), "bias": jnp.ones(8), "embedding": jnp.ones((5, 8))}
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.ndim), x.shape), params)
    optimizer = look.make_muon(1e-2, warmup_steps=2, steps=10, weight_decay=0.0)
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


def test_a_policy_learns_to_tell_two_kinds_of_picture() -> None:
    config = tiny.make_config()
    grid = (1, 2, 2)
    rng = np.random.default_rng(0)
    dim = config.vision.patch_dim
    kinds = rng.normal(size=(2, 4, dim)).astype(np.float32)

    def batch(seed: int) -> look.Looks:
        rng = np.random.default_rng(seed)
        which = rng.integers(0, 2, 16)
        rows = [
            layout.window_layout(
                kinds[k] + rng.normal(size=(4, dim)).astype(np.float32), grid, config.vision
            )
            for k in which
        ]
        return look.Looks(layout.pad_images(rows, 1), np.asarray([11, 12], np.int32)[which])

    slots = layout.window_layout(kinds[0], grid, config.vision).slot_of_token
    tokens = [9, config.image_token_id, 10]
    prompt, _ = pretrain.make_prompt(tokens, grid, slots, config)
    optimizer = look.make_muon(1e-2, 2, 20, 0.0)
    state = TrainState.create(model.init_params(config, jax.random.key(0)), optimizer)
    for seed in range(20):
        state, metrics = look.look_step(
            state, prompt, batch(seed), config=config, optimizer=optimizer
        )
    assert int(state.updates) == 20 and float(metrics["loss"]) < 0.5
    right = look.named_right(state.params, prompt, batch(99), config=config)
    assert right.shape == (16,) and float(jnp.mean(right)) > 0.9
