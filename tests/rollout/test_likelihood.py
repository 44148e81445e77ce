"""Probabilities of candidates against whole forward passes, and against sampled replies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.rollout.generate import Opening, generate
from emor3_jax.rollout.likelihood import Candidates, make_candidates, probabilities
from emor3_jax.rollout.sampling import Sampling

END = 7
CANDIDATES = Candidates(
    np.array([[11, END, 0], [12, 13, END], [12, END, 0], [14, 15, END]], np.int32),
    np.array([2, 3, 2, 3], np.int32),
    np.array([0, 1, 0, 2], np.int32),
)


@pytest.fixture
def question(setting):
    """Two ragged questions about each of two prompts."""
    rng = np.random.default_rng(3)
    start = rng.integers(16, 60, (2, 2, 4)).astype(np.int32)
    lengths = np.array([[4, 2], [1, 3]], np.int32)
    return start, lengths, np.broadcast_to(setting.position[:, None], (2, 2))


@pytest.fixture
def found(setting, question):
    return np.asarray(
        jax.jit(
            lambda prefix: probabilities(
                setting.policy,
                setting.params,
                Opening(prefix, *map(jnp.asarray, question)),
                CANDIDATES,
                3,
                setting.suppressed,
            )
        )(setting.prefix())
    )


def test_each_candidate_is_scored_as_a_response_of_its_own(setting, question, found):
    """A question and a candidate in one row, as `score_responses` reads a response."""
    start, lengths, _ = question
    logprobs = np.zeros((2, 2, 4))
    for i in range(4):
        n = CANDIDATES.lengths[i]
        rows = np.zeros((2, 2, 8), np.int32)
        for b, g in np.ndindex(2, 2):
            row = [*start[b, g, 1 : lengths[b, g]], *CANDIDATES.tokens[i, :n]]
            rows[b, g, : len(row)] = row
        for g in range(2):
            # The first token of the question takes the place of the prompt's last one.
            asked = setting._replace(last=start[:, g, 0])
            scored = np.asarray(
                asked.score(setting.params, rows[:, g : g + 1], lengths[:, g : g + 1] - 1 + n)
            )
            for b in range(2):
                at = lengths[b, g] - 1
                logprobs[b, g, i] = scored[b, 0, at : at + n].sum()
    share = np.exp(logprobs) / np.exp(logprobs).sum(axis=-1, keepdims=True)
    wanted = np.stack([share[..., 0] + share[..., 2], share[..., 1], share[..., 3]], axis=-1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)


def test_sampled_replies_are_as_frequent(setting, question):
    """Among sampled replies that are candidates, each meaning occurs as often as it is likely."""
    # A quiet head, so that every reply is drawn at times.
    params = jax.tree.map(lambda x: x, setting.params)
    quieter = 0.1 * params["model"]["embed_tokens"]["embedding"]
    params["model"]["embed_tokens"]["embedding"] = quieter
    start, lengths, positions = question
    quiet = setting._replace(params=params)
    copies = 4000
    rule = Sampling(3, 1.0, 1.0, (END,))
    # All but the candidates' tokens are suppressed, so that replies are often candidates.
    suppressed = ~np.isin(np.arange(len(setting.suppressed)), [11, 12, 13, 14, 15, END])
    repeat = lambda x: jnp.asarray(np.repeat(x, copies, axis=1))  # noqa: E731

    @jax.jit
    def sample(prefix):
        return generate(
            setting.policy,
            params,
            Opening(prefix, repeat(start), repeat(lengths), repeat(positions)),
            lambda t: jax.random.uniform(jax.random.key(t), repeat(lengths).shape),
            rule,
            suppressed,
        )

    soft = jax.jit(
        lambda prefix: probabilities(
            setting.policy,
            params,
            Opening(prefix, *map(jnp.asarray, question)),
            CANDIDATES,
            3,
            suppressed,
        )
    )(quiet.prefix())
    tokens = np.asarray(sample(quiet.prefix()).tokens).reshape(2, 2, copies, 3)
    for b, g in np.ndindex(2, 2):
        counts = np.zeros(3)
        for row, meaning in zip(CANDIDATES.tokens, CANDIDATES.meaning, strict=True):
            counts[meaning] += (tokens[b, g] == row).all(axis=-1).sum()
        total = counts.sum()
        assert total > 100
        deviation = np.sqrt(soft[b, g] * (1 - soft[b, g]) / total)
        assert (np.abs(counts / total - soft[b, g]) < 4 * deviation + 1e-9).all()


def test_candidates_are_spelled_with_their_end():
    from emor3_jax.embedded.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["yes no"] * 9, 300)
    found = make_candidates(tokenizer, [["yes", "Yes", "yes"], ["no"]])
    assert found.meaning.tolist() == [0, 0, 1]
    for row, size, text in zip(found.tokens, found.lengths, ("yes", "Yes", "no"), strict=True):
        assert tokenizer.decode(row[:size]) == f"{text}<|im_end|>"
