"""Sampling in groups: what it records, what it may draw, when it ends."""

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.rl import losses

STOP, SUPPRESSED = 7, (70, 71, 72, 73)


def test_sampled_and_scored_log_probabilities_agree(setting, samples):
    scored = setting.score(setting.params, samples.tokens, samples.lengths, 0.8)
    difference = np.where(samples.mask, scored - samples.logprobs, 0.0)
    assert np.abs(difference).max() < 2e-5
    assert samples.mask.sum() > 30


def test_responses_end_at_the_stop_token_and_are_empty_after_it(samples):
    tokens, lengths = np.asarray(samples.tokens), np.asarray(samples.lengths)
    assert samples.ended.any() and not samples.ended.all()
    for row, length, ended in zip(
        tokens.reshape(-1, 10), lengths.ravel(), np.asarray(samples.ended).ravel(), strict=True
    ):
        assert (row[: length - 1] != STOP).all()
        assert (row[length - 1] == STOP) == ended
        assert ended or length == 10
        assert not row[length:].any()


def test_the_end_of_sequence_token_carries_loss(setting, samples):
    b, g = np.argwhere(np.asarray(samples.ended))[0]
    end = int(samples.lengths[b, g]) - 1
    weights = losses.token_weights(samples.mask)
    assert weights[b, g, end] > 0
    assert end + 1 == 10 or weights[b, g, end + 1] == 0

    def end_logprob(params):
        return setting.score(params, samples.tokens, samples.lengths)[b, g, end]

    slopes = jax.grad(end_logprob)(setting.params)
    assert np.abs(slopes["model"]["embed_tokens"]["embedding"][STOP]).max() > 0


def test_the_same_key_gives_the_same_responses_and_another_key_others(setting, rule, samples):
    again, other = setting.roll_out(rule, 3, 6), setting.roll_out(rule, 4, 6)
    np.testing.assert_array_equal(again.tokens, samples.tokens)
    assert (np.asarray(other.tokens) != np.asarray(samples.tokens)).any()
    # The responses of every group differ from each other, too, where the policy is sure of none.
    hot = setting.roll_out(rule._replace(temperature=5.0), 3, 6)
    assert all(len({tuple(row) for row in group}) > 1 for group in np.asarray(hot.tokens))


def test_suppressed_ids_are_never_drawn(setting, rule):
    hot = setting.roll_out(rule._replace(temperature=50.0), 0, 64)
    drawn = np.asarray(hot.tokens)[np.asarray(hot.mask)]
    assert not set(drawn) & set(SUPPRESSED)
    # Hot enough that nearly every other id was drawn, so that the suppressed ones would have been.
    assert len(set(drawn)) > 60


def test_greedy_is_the_repeated_best_token_of_scoring(setting, rule):
    greedy = setting.roll_out(rule._replace(temperature=0.0), 0, 1)
    for t in range(int(greedy.lengths.min())):
        prefix = np.asarray(greedy.tokens)[:, :, : t + 1]
        candidates = np.repeat(prefix, 80, axis=1)
        candidates[:, :, t] = np.arange(80)
        lengths = jnp.full(candidates.shape[:2], t + 1)
        scores = setting.score(setting.params, jnp.asarray(candidates), lengths)[:, :, t]
        np.testing.assert_array_equal(np.argmax(scores, axis=1), prefix[:, 0, t])
