"""Gradients in bfloat16 beside those in float32: no parameter's is biased, none is far off."""

from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.setting import Setting, build_setting

from emor3_jax.learner.logprobs import LogprobSpec, score_responses
from emor3_jax.models import decoder
from emor3_jax.models.layers import TokenEmbedding
from emor3_jax.models.params import leaves
from emor3_jax.types import Samples

B, G, T = 8, 8, 48
SEEDS = 6


@pytest.fixture(scope="module")
def setting() -> Setting:
    return build_setting(b=B)


@pytest.fixture(scope="module")
def samples() -> Samples:
    """Responses of 9 ids, of which one is met about 1,700 times and the others 80 times each."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(T // 2, T + 1, (B, G)).astype(np.int32)
    tokens = rng.integers(8, 17, (B, G, T)).astype(np.int32)
    tokens[rng.random((B, G, T)) < 0.7] = 9
    return Samples(tokens, np.zeros((B, G, T), np.float32), lengths, np.ones((B, G), bool))


def untied(setting: Setting) -> Setting:
    """The same policy, its head apart from its embedding."""
    policy = tiny.make_policy(tie_word_embeddings=False)
    head = setting.params["model"]["embed_tokens"]["embedding"].T
    return setting._replace(policy=policy, params={**setting.params, "lm_head": {"kernel": head}})


def drawn(seed: int) -> np.ndarray:
    """Advantages of either sign: contributions to a gradient largely cancel out."""
    return np.random.default_rng(seed).normal(size=(B, G, 1))


def ones(seed: int) -> np.ndarray:
    """As in supervised fine-tuning: contributions add up."""
    del seed
    return np.ones((B, G, 1))


def gradients(
    setting: Setting,
    samples: Samples,
    dtype: str,
    advantages: Sequence[np.ndarray],
    chunk: int = 64,
) -> dict[str, np.ndarray]:
    """Path → float64[len(advantages), ...], a gradient of the policy for each."""
    policy = setting.policy.with_compute(dtype=jnp.dtype(dtype))

    @jax.jit
    @jax.grad
    def gradient(params: dict, weights: jax.Array) -> jax.Array:
        spec = LogprobSpec(1.0, chunk)
        found = score_responses(policy, params, setting.batch, samples, spec, setting.suppressed)
        return -jnp.sum(weights * found.logprobs)

    share = np.float32(samples.mask / samples.lengths.sum())
    found = [
        jax.device_get(gradient(setting.params, np.float32(each) * share)) for each in advantages
    ]
    return dict(leaves(jax.tree.map(lambda *x: np.stack(x).astype(np.float64), *found)))


def errors(found: dict, wanted: dict) -> Iterator[tuple[str, float, float]]:
    """Yields path, relative error, and bias: the share by which the gradient is too long."""
    for path, exact in wanted.items():
        size = np.sum(exact**2)
        difference = found[path] - exact
        yield path, np.sqrt(np.sum(difference**2) / size), np.sum(difference * exact) / size


def test_4096_equal_contributions_are_all_summed():
    """In bfloat16 the sum stops growing at 4.0, where a contribution is half its last bit."""
    table = TokenEmbedding(4, 2, jnp.bfloat16)
    tokens = jnp.full(4096, 1)

    @jax.grad
    def gradient(params: dict) -> jax.Array:
        return jnp.sum(jnp.bfloat16(0.01) * table.apply({"params": params}, tokens))

    found = gradient({"embedding": jnp.ones((4, 2))})["embedding"]
    assert found.dtype == jnp.float32
    # 0.01 in bfloat16 is 41 / 4096.
    np.testing.assert_array_equal(found, [[0, 0], [41, 41], [0, 0], [0, 0]])


@pytest.mark.parametrize("kind", [drawn, ones])
def test_no_parameter_has_a_gradient_that_bfloat16_biases(setting, samples, kind):
    apart, advantages = untied(setting), [kind(seed) for seed in range(SEEDS)]
    exact = gradients(apart, samples, "float32", advantages)
    rough = gradients(apart, samples, "bfloat16", advantages)
    found = {path: (error, bias) for path, error, bias in errors(rough, exact)}
    # bfloat16 rounds to 0.4 %, many times on the way to the tower.
    assert all(error < 0.08 and abs(bias) < 0.025 for error, bias in found.values()), found
    for path in ("model/embed_tokens/embedding", "lm_head/kernel"):
        error, bias = found[path]
        assert error < 0.025 and abs(bias) < 0.004, path


def test_a_table_that_is_rounded_first_would_lose_a_quarter_of_its_gradient(
    setting, samples, monkeypatch
):
    """What is compared above is there to be seen."""
    path = "model/embed_tokens/embedding"
    apart, advantages = untied(setting), [ones(0)]
    exact = gradients(apart, samples, "float32", advantages)

    def rounded(tokens: int, features: int, dtype: str, name: str) -> nn.Module:
        return nn.Embed(tokens, features, dtype=dtype, name=name)

    monkeypatch.setattr(decoder, "TokenEmbedding", rounded)
    rough = gradients(apart, samples, "bfloat16", advantages)
    (bias,) = (bias for name, _, bias in errors(rough, exact) if name == path)
    assert bias < -0.2


def test_the_gradient_of_the_head_knows_nothing_of_chunks(setting, samples):
    """Of 48 chunks or of one: the products are the same, and their sum is not rounded between."""
    apart, advantages = untied(setting), [drawn(0)]
    whole, cut = (
        gradients(apart, samples, "bfloat16", advantages, chunk) for chunk in (B * G * T, B * G)
    )
    found = {path: error for path, error, _ in errors(cut, whole)}
    assert found["lm_head/kernel"] < 1e-5


def test_a_tied_table_has_both_gradients_in_full(setting, samples):
    advantages = [drawn(0)]
    table = "model/embed_tokens/embedding"
    tied = gradients(setting, samples, "bfloat16", advantages)
    apart = gradients(untied(setting), samples, "bfloat16", advantages)
    wanted = {table: apart[table] + np.swapaxes(apart["lm_head/kernel"], 1, 2)}
    ((_, error, _),) = errors(tied, wanted)
    # Were they added in bfloat16, it would be 1.1e-3; what is left is the order of other sums.
    assert error < 3e-4
