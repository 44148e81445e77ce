"""The rollout against a plain forward pass: no cache, no groups, no padding inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from emor3_jax.models.quantisation import quantise_layers
from emor3_jax.rollout.generate import Opening, generate
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.types import Prompt

T = 10


@pytest.fixture(scope="module")
def plain(setting):
    """Logits float32[B, T, V] that follow each token of one response a prompt.

    Suppressed ids are at -inf.

    Every prompt, its last token and its response stand in one row of the ordinary causal pass.
    """
    lengths = np.asarray(setting.prompt.mask).sum(axis=1)

    @jax.jit
    def run(prompt, places):
        features = setting.policy.encode_images(setting.params, setting.images)
        hidden, _ = setting.policy.read_prompt(setting.params, prompt, features)
        hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
        logits = setting.policy.logits(setting.params, hidden)
        return jnp.where(setting.suppressed, -jnp.inf, logits)

    def logits(responses: np.ndarray) -> np.ndarray:
        rows = []
        for b, n in enumerate(lengths):
            inputs = [setting.last[b], *responses[b, :-1]]
            size = setting.prompt.tokens.shape[1] + T
            after = size - n - T
            tokens = np.pad([*setting.prompt.tokens[b, :n], *inputs], (0, after))
            slots = np.pad(setting.prompt.image_slots[b, :n], (0, T + after), constant_values=-1)
            positions = np.broadcast_to(np.arange(size)[:, None], (size, 3))
            rows.append((tokens, positions, np.arange(size) < n + T, slots))
        prompt = Prompt(*(np.stack(column) for column in zip(*rows, strict=True)))
        return np.asarray(run(prompt, lengths[:, None] + np.arange(T)))

    return logits


def test_greedy_is_the_repeated_argmax_of_the_plain_forward(setting, rule, plain):
    greedy = setting.roll_out(rule._replace(temperature=0.0), 0, 1)
    wanted = np.zeros((len(setting.last), T), np.int32)
    for t in range(T):
        wanted[:, t] = plain(wanted)[:, t].argmax(axis=-1)
    for row, tokens, length in zip(
        wanted, np.asarray(greedy.tokens)[:, 0], np.asarray(greedy.lengths)[:, 0], strict=True
    ):
        np.testing.assert_array_equal(tokens[:length], row[:length])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_recorded_log_probabilities_are_those_before_the_top_p_cut(
    setting, rule, plain, temperature, top_p
):
    samples = setting.roll_out(rule._replace(temperature=temperature, top_p=top_p), 3, 6)
    scored = setting.score(setting.params, samples.tokens, samples.lengths, temperature)
    np.testing.assert_allclose(
        np.where(samples.mask, scored, 0.0), np.asarray(samples.logprobs), atol=1e-4
    )
    for g in range(3):
        tokens = np.asarray(samples.tokens[:, g])
        logits = plain(tokens)
        # The logits spread, or agreement would say little.
        assert 1 < np.std(np.asarray(logits)[..., ~setting.suppressed]) < 4
        logprobs = jax.nn.log_softmax(logits / temperature)
        chosen = np.take_along_axis(np.asarray(logprobs), tokens[..., None], axis=-1)[..., 0]
        used = np.asarray(samples.mask[:, g])
        recorded = np.asarray(samples.logprobs[:, g])
        np.testing.assert_allclose(chosen[used], recorded[used], atol=1e-4)


def test_ragged_openings_give_what_each_gives_alone_without_padding(setting):
    rng = np.random.default_rng(1)
    start = rng.integers(8, 60, (2, 3, 5)).astype(np.int32)
    lengths = np.asarray([[1, 5, 3], [4, 1, 2]], np.int32)
    rule = Sampling(6, 0.0, 1.0, (7,))
    prefix = jax.jit(setting.prefix)()

    @jax.jit
    def run(prefix, start, lengths, positions):
        return generate(
            setting.policy,
            setting.params,
            Opening(prefix, start, lengths, positions),
            lambda t: jnp.zeros(lengths.shape),
            rule,
            setting.suppressed,
        )

    together = run(prefix, start, lengths, np.broadcast_to(setting.position[:, None], (2, 3)))
    for b, g in np.ndindex(2, 3):
        n = lengths[b, g]
        one = prefix._replace(
            k=prefix.k[:, b : b + 1], v=prefix.v[:, b : b + 1], mask=prefix.mask[b : b + 1]
        )
        opening, position = start[b : b + 1, g : g + 1, :n], setting.position[b : b + 1, None]
        alone = run(one, opening, lengths[b : b + 1, g : g + 1], position)
        np.testing.assert_array_equal(together.tokens[b, g], alone.tokens[0, 0])
        np.testing.assert_allclose(together.logprobs[b, g], alone.logprobs[0, 0], atol=1e-4)
        assert together.lengths[b, g] == alone.lengths[0, 0]


def test_log_probabilities_of_int8_weights_are_their_own(setting, rule):
    """Those of the policy that sampled, not of the one that it was rounded from."""
    rollout = Rollout(setting.policy, None, setting.suppressed, rule, 3, int8=True)
    _, samples = rollout.respond(setting.params, setting.batch, jax.random.key(6))

    quantised = jax.device_get(quantise_layers(setting.params))
    given = samples.tokens, samples.lengths, rule.temperature
    score = jax.jit(lambda params: setting.score(params, *given))
    own, before = (
        np.where(samples.mask, score(params) - samples.logprobs, 0.0)
        for params in (tiny.dequantised(quantised), setting.params)
    )
    assert np.abs(own).max() < 1e-4
    assert np.abs(before).max() > 1e-2
