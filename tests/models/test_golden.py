"""Against files that torch and transformers made (`make parity` makes them anew)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax import models
from emor3_jax.models import weights

GOLDEN = Path(__file__).parents[1] / "golden" / "models"


@pytest.fixture(
    scope="module",
    params=sorted(GOLDEN.glob("*/*")),
    ids=lambda path: f"{path.parent.name}-{path.name}",
)
def folder(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def policy(folder) -> models.LoadedPolicy:
    policy = models.read_config(folder)
    return models.LoadedPolicy(policy, weights.read_params(folder, policy))


@pytest.fixture(scope="module")
def golden(folder) -> dict[str, np.ndarray]:
    with np.load(folder / "golden.npz") as file:
        return dict(file)


def _inputs(golden, side):
    return {
        "input_ids": golden[f"{side}_input_ids"],
        "attention_mask": golden[f"{side}_attention_mask"],
        "pixel_values": golden["pixel_values"],
        "image_grid_thw": golden["image_grid_thw"],
    }


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(policy, golden, side):
    inputs = _inputs(golden, side)
    logits = models.forward_logits(policy, **inputs)
    mask = inputs["attention_mask"].astype(bool)
    assert logits.dtype == np.float32 and logits.shape == (*mask.shape, policy.shapes.vocab_size)
    assert not logits[~mask].any()
    assert 3 < golden[f"{side}_logits"].std() < 5
    np.testing.assert_allclose(logits[mask], golden[f"{side}_logits"], atol=1e-4)


def test_logits_of_text_alone(policy, golden):
    inputs = _inputs(golden, "right")
    n = inputs["attention_mask"][2].sum()
    logits = models.forward_logits(
        policy, input_ids=inputs["input_ids"][2:, :n], attention_mask=np.ones((1, n))
    )
    np.testing.assert_allclose(logits[0], golden["right_logits"][-n:], atol=1e-4)


def test_greedy_continuation_by_prefill_and_decoding(policy, golden):
    policy, params = policy.policy, policy.params
    prompt, images, following = models.pack(policy, **_inputs(golden, "right"))
    lengths = prompt.mask.sum(axis=1)
    rows = np.arange(len(lengths))
    token = jnp.asarray(prompt.tokens[rows, lengths - 1])[:, None]
    prompt.mask[rows, lengths - 1] = False
    count = golden["continuation"].shape[1]

    @jax.jit
    def prefill(params):
        features = policy.encode_images(params, images)
        _, prefix = policy.read_prompt(params, prompt, features)
        hidden, cache = policy.extend(
            params,
            prefix,
            token[..., None],
            jnp.asarray(following)[:, None, None] - 1,
            jnp.ones((len(rows), 1, 1), bool),
            cache_size=count,
        )
        return hidden[:, :, 0], prefix, cache

    hidden, prefix, cache = prefill(params)
    step = jax.jit(policy.decode)
    tokens = []
    for t in range(1, count + 1):
        scores = policy.logits(params, hidden)[..., : policy.shapes.image_token_id]
        tokens.append(jnp.argmax(scores, axis=-1))
        if t < count:
            place = jnp.asarray(following)[:, None] + t - 1
            hidden, cache = step(params, prefix, cache, tokens[-1], place, jnp.int32(t))
    assert np.concatenate(tokens, axis=1).tolist() == golden["continuation"].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid_thw": np.array([[1, 4, 6]])}, "counts 24 patches, pixel_values has 112"),
        ({"pixel_values": None, "image_grid_thw": None}, "already placed"),
        ({"input_ids": np.zeros((3, 37), np.int32)}, "3 images are given, .* for 0"),
    ],
)
def test_images_that_do_not_fit_the_tokens_are_refused(policy, golden, changes, message):
    with pytest.raises(ValueError, match=message):
        models.forward_logits(policy, **(_inputs(golden, "right") | changes))
