"""The clipped losses, the KL term and imitation, by hand."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.rl import kl, losses, surrogates
from emor3_jax.rl.correction import Correction
from emor3_jax.rl.losses import ImitationLoss, PolicyLoss
from emor3_jax.rl.selection import Selection
from emor3_jax.rl.surrogates import Clip, GroupRatio, SequenceRatio, Tokens

MASK = jnp.asarray([[[1, 1, 1, 0], [1, 0, 0, 0]]], bool)


NO_KL = PolicyLoss(Clip(), kl="off")


def policy_loss(logprobs, old, advantages, weights, *, loss=NO_KL, ref=None, kl_coef=None):
    """Loss and metrics of given arrays."""
    tokens = Tokens(logprobs, old, sampler=old, ref=ref, advantages=advantages, weights=weights)
    return loss(tokens, kl_coef)


def single(ratio, advantage, **clips):
    """Loss and metrics of one token."""
    logprobs = jnp.log(jnp.full((1, 1, 1), ratio))
    return policy_loss(
        logprobs,
        jnp.zeros((1, 1, 1)),
        jnp.full((1, 1), advantage),
        jnp.ones((1, 1, 1)),
        loss=replace(NO_KL, surrogate=Clip(**clips)),
    )


def log_ratio(logprobs, old, mask, surrogate):
    """Logarithm of a surrogate's ratio for tokens that count alike."""
    weights = losses.token_weights(mask)
    return surrogate.log_ratio(Tokens(logprobs, old=old, weights=weights))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, None),
        # A good token: the ratio counts up to 1.3; below 0.8 it is not clipped.
        (1.2, 2.0, -2.4, None),
        (1.5, 2.0, -2.6, "high"),
        (0.5, 2.0, -1.0, None),
        # A bad token: the ratio counts from 0.8 on; above 1.3 it is not clipped, up to 3.
        (0.9, -2.0, 1.8, None),
        (0.5, -2.0, 1.6, "low"),
        (2.0, -2.0, 4.0, None),
        (5.0, -2.0, 6.0, "dual"),
        (5.0, 0.0, 0.0, None),
    ],
)
def test_clips_by_hand(ratio, advantage, loss, clipped):
    got, metrics = single(ratio, advantage)
    assert got == pytest.approx(loss, rel=1e-5)
    assert metrics["loss"] == got and metrics["kl"] == 0
    for name in ("low", "high", "dual"):
        assert metrics[f"clip_fraction_{name}"] == (name == clipped)


def test_clips_are_options():
    assert single(1.5, 1.0, clip_high=0.1)[0] == pytest.approx(-1.1, rel=1e-5)
    assert single(0.5, -1.0, clip_low=0.4)[0] == pytest.approx(0.6, rel=1e-5)
    assert single(9.0, -1.0, clip_dual=8.0)[0] == pytest.approx(8.0, rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.0, 2.0, -2.0), (1.5, 2.0, 0.0), (0.5, 2.0, -1.0), (0.5, -2.0, 0.0), (5.0, -2.0, 0.0)],
)
def test_gradient_by_hand(ratio, advantage, slope):
    """d loss / d logp is -A r where no clip binds, and 0 where one does."""

    def loss(logprob):
        logprobs = jnp.full((1, 1, 1), logprob)
        return policy_loss(
            logprobs, jnp.zeros((1, 1, 1)), jnp.full((1, 1), advantage), jnp.ones((1, 1, 1))
        )[0]

    assert jax.grad(loss)(jnp.log(ratio)) == pytest.approx(slope, rel=1e-5)


def test_kl_by_hand():
    # d = ref - logp = log 2: 2 - log 2 - 1; d = -log 2: 1/2 + log 2 - 1.
    logprobs = jnp.float32([-2.0, -2.0, -1.0, 0.0, -90.0, 0.0])
    reference = logprobs + jnp.float32([np.log(2), -np.log(2), 0.0, 30.0, 3.0, -50.0])
    got = kl.k3(logprobs, reference)
    # The difference is held to ±20, the estimate to 10.
    wanted = [1 - np.log(2), np.log(2) - 0.5, 0.0, 10.0, 10.0, 10.0]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_kl_pulls_towards_the_reference():
    slope = jax.grad(lambda x: kl.k3(x, jnp.float32(-1.0)))
    assert slope(jnp.float32(-1.0)) == 0
    # d/dlogp of exp(d) - d - 1 is 1 - exp(d).
    assert slope(jnp.float32(-2.0)) == pytest.approx(1 - np.e, rel=1e-5)
    assert slope(jnp.float32(0.0)) == pytest.approx(1 - 1 / np.e, rel=1e-5)


def test_kl_is_added_with_its_coefficient():
    logprobs = jnp.zeros((1, 1, 2)) - 1.0
    loss, metrics = policy_loss(
        logprobs,
        logprobs,
        jnp.ones((1, 1)),
        jnp.full((1, 1, 2), 0.5),
        loss=PolicyLoss(Clip(), kl="k3"),
        ref=logprobs + jnp.log(2.0),
        kl_coef=0.5,
    )
    assert metrics["kl"] == pytest.approx(1 - np.log(2), rel=1e-4)
    assert loss == pytest.approx(-1 + 0.5 * (1 - np.log(2)), rel=1e-4)


def test_weights_by_hand():
    np.testing.assert_allclose(
        losses.token_weights(MASK, "token"), [[[0.25, 0.25, 0.25, 0], [0.25, 0, 0, 0]]]
    )
    np.testing.assert_allclose(
        losses.token_weights(MASK, "seq"), [[[1 / 6, 1 / 6, 1 / 6, 0], [0.5, 0, 0, 0]]]
    )
    # A response of no tokens counts for nothing, a batch of none divides by nothing.
    empty = jnp.concatenate([MASK, jnp.zeros_like(MASK)])
    for mean in ("token", "seq"):
        weights = losses.token_weights(empty, mean)
        np.testing.assert_allclose(weights[:1], losses.token_weights(MASK, mean))
        assert not np.any(losses.token_weights(jnp.zeros((1, 2, 3), bool), mean))
    # By a constant, 6 tokens at most in each of 2 responses, or in the 4 of the second batch.
    constant = losses.token_weights(MASK, "constant", limit=6)
    np.testing.assert_allclose(constant, np.asarray(MASK) / 12)
    np.testing.assert_allclose(losses.token_weights(empty, "constant")[:1], MASK / 16)
    with pytest.raises(ValueError, match="mean='batch'"):
        losses.token_weights(MASK, "batch")


def test_padding_counts_for_nothing():
    """Not in the loss, not in the gradient, whatever stands there."""
    logprobs = jnp.where(MASK, -1.0, -1e30)
    weights = losses.token_weights(MASK)

    def loss(x, old):
        given = {"loss": PolicyLoss(Clip()), "ref": old, "kl_coef": 1e-2}
        return policy_loss(x, old, jnp.ones((1, 2)), weights, **given)[0]

    value, slope = jax.value_and_grad(loss)(logprobs, jnp.where(MASK, -1.0, 0.0))
    assert value == pytest.approx(-1.0)
    np.testing.assert_allclose(slope, -weights, atol=1e-7)


def test_ratio_of_a_response_by_hand():
    """Tokens twice and half as likely, then one four times as likely alone."""
    moved = jnp.log(jnp.float32([[[2.0, 0.5, 4.0, 9.0], [4.0, 9.0, 9.0, 9.0]]]))
    old = jnp.where(MASK, jnp.log(0.25), 0.0)
    found = log_ratio(old + moved, old, MASK, SequenceRatio())
    np.testing.assert_allclose(jnp.exp(found), [[[4 ** (1 / 3)], [4.0]]], rtol=1e-5)
    assert log_ratio(old + moved, old, MASK, Clip()).shape == MASK.shape
    with pytest.raises(KeyError, match="batch"):
        surrogates.SURROGATES["batch"]


def test_ratio_to_the_group_by_hand():
    # Geometric means of the old probabilities: sqrt(1/2 1/8) = 1/4, and 1/2.
    mask = jnp.asarray([[[1, 1], [1, 0]]], bool)
    old = jnp.log(jnp.float32([[[0.5, 0.125], [0.5, 7.0]]]))
    expected = (1 / 16 + 1 / 4) / (1 / 4 + 1 / 2)
    found = log_ratio(old, old, mask, GroupRatio())
    np.testing.assert_allclose(jnp.exp(found), [[[0.25 / expected], [0.5 / expected]]], rtol=1e-5)
    # Its gradient is the ratio, over the length.
    slope = jax.grad(lambda x: jnp.exp(log_ratio(x, old, mask, GroupRatio()))[0, 0, 0])(old)
    np.testing.assert_allclose(slope, [[[0.3, 0.3], [0, 0]]], rtol=1e-5)
    # A response that does not count is no part of the expectation, nor is an empty group.
    alone = log_ratio(old, old, mask.at[0, 0].set(False), GroupRatio())
    assert jnp.exp(alone[0, 1, 0]) == pytest.approx(1.0)
    nothing = jax.grad(lambda x: log_ratio(x, old, mask & False, GroupRatio()).sum())(old)
    np.testing.assert_array_equal(nothing, jnp.zeros_like(old))


def test_a_response_is_clipped_as_a_whole():
    """GSPO: the mean of log 1.5 and log 0.9 is over 1.1, so neither token has a gradient."""
    mask = jnp.asarray([[[1, 1]]], bool)
    moved = jnp.log(jnp.float32([[[1.5, 0.9]]]))
    gspo = PolicyLoss(SequenceRatio(clip_low=0.1, clip_high=0.1), kl="off", mean="seq")

    def loss(x, advantage):
        weights = gspo.weights(mask, jnp.ones((1, 1), bool))
        return policy_loss(x, jnp.zeros_like(x), jnp.full((1, 1), advantage), weights, loss=gspo)

    assert loss(moved, 2.0)[0] == pytest.approx(-2.2, rel=1e-5)
    assert loss(moved, 2.0)[1]["clip_fraction_high"] == 1
    assert not np.any(jax.grad(loss, has_aux=True)(moved, 2.0)[0])
    # A bad response is not clipped above: the ratio itself, and its gradient over the length.
    ratio = (1.5 * 0.9) ** 0.5
    assert loss(moved, -2.0)[0] == pytest.approx(2 * ratio, rel=1e-5)
    np.testing.assert_allclose(jax.grad(loss, has_aux=True)(moved, -2.0)[0], ratio, rtol=1e-5)


def test_infinite_bounds_clip_nothing():
    none = {"clip_low": 1.0, "clip_high": math.inf, "clip_dual": math.inf}
    for ratio in (0.01, 50.0):
        for advantage in (-2.0, 0.0, 2.0):
            loss, metrics = single(ratio, advantage, **none)
            assert loss == pytest.approx(-advantage * ratio, rel=1e-5)
            assert all(metrics[f"clip_fraction_{n}"] == 0 for n in ("low", "high", "dual"))


@pytest.mark.parametrize(("name", "value"), [("k2", np.log(2) ** 2 / 2), ("abs", np.log(2))])
def test_kl_of_the_loss_is_a_choice(name, value):
    x = jnp.zeros((1, 1, 1))
    with_kl = {"loss": PolicyLoss(Clip(), kl=name), "ref": x - np.log(2), "kl_coef": 0.5}
    loss, metrics = policy_loss(x, x, jnp.ones((1, 1)), x + 1, **with_kl)
    assert metrics["kl"] == pytest.approx(value, rel=1e-5)
    assert loss == pytest.approx(-1 + 0.5 * value, rel=1e-5)


@pytest.mark.parametrize(
    ("mean", "ratio"),
    [
        *(("token", name) for name in ("clip", "cispo", "sapo", "dppo_tv", "dppo_kl", "ipo")),
        *(("seq", name) for name in ("gspo", "gepo", "gmpo")),
        ("constant", "clip"),
    ],
)
def test_parts_of_a_batch_add_up(mean, ratio):
    kind = surrogates.SURROGATES[ratio]
    surrogate = kind(*(0.2, 0.3, 3.0)[: len(kind.fields)])
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    lengths = rng.integers(1, 6, (6, 4, 1))
    weights = losses.token_weights(jnp.arange(6) < lengths, mean)
    new, old, ref = draw(6, 4, 6) * 0.3, draw(6, 4, 6) * 0.3, draw(6, 4, 6) * 0.3
    advantage = draw(6, 4)
    options = {"loss": PolicyLoss(surrogate, mean=mean), "kl_coef": 1e-2}
    whole, metrics = policy_loss(new, old, advantage, weights, ref=ref, **options)
    for cut in (1, 2, 3):
        parts = [
            policy_loss(
                new[i : i + cut],
                old[i : i + cut],
                advantage[i : i + cut],
                weights[i : i + cut],
                ref=ref[i : i + cut],
                **options,
            )
            for i in range(0, 6, cut)
        ]
        np.testing.assert_allclose(sum(loss for loss, _ in parts), whole, rtol=1e-5)
        for name, value in metrics.items():
            np.testing.assert_allclose(sum(m[name] for _, m in parts), value, rtol=1e-5, atol=1e-7)


def test_shapes_are_checked():
    x = jnp.zeros((1, 2, 3))
    with pytest.raises(AssertionError):
        policy_loss(x, x, jnp.zeros((2, 1)), x)
    with pytest.raises(AssertionError):
        policy_loss(x, x[..., :2], jnp.zeros((1, 2)), x)
    with pytest.raises(AssertionError):
        ImitationLoss()(Tokens(x, weights=x[..., :2]))


def test_a_missing_array_is_named():
    x = jnp.zeros((1, 2, 3))
    assert PolicyLoss(Clip()).needs == {"old", "advantages", "ref"}
    assert NO_KL.needs == {"old", "advantages"} and not ImitationLoss().needs
    with pytest.raises(ValueError, match=r"the loss needs tokens\.ref, got None"):
        policy_loss(x, x, jnp.zeros((1, 2)), x, loss=PolicyLoss(Clip()), kl_coef=0.1)
    with pytest.raises(ValueError, match=r"needs tokens\.advantages, tokens\.weights, got"):
        policy_loss(x, x, None, None)
    with pytest.raises(ValueError, match=r"tokens\.weights"):
        ImitationLoss()(Tokens(x))


def test_losses_are_static_arguments():
    """Equal settings share one compiled program; other surrogates do not."""
    assert {PolicyLoss(Clip()), PolicyLoss(Clip()), ImitationLoss()} == {
        PolicyLoss(Clip(0.2, 0.3, 3.0), "k3"),
        ImitationLoss(mean="token"),
    }
    kinds = surrogates.SURROGATES.values()
    assert len({kind(*(1.0, math.inf, 3.0)[: len(kind.fields)]) for kind in kinds}) == len(kinds)
    x = jnp.log(jnp.full((1, 1, 1), 1.5))
    loss = jax.jit(policy_loss, static_argnames="loss")
    for surrogate, wanted in (
        (Clip(), -2.6),
        (Clip(clip_high=1.0), -3.0),
        (SequenceRatio(), -2.0008),
    ):
        given = {"loss": replace(NO_KL, surrogate=surrogate)}
        found, _ = loss(x, jnp.zeros_like(x), jnp.full((1, 1), 2.0), jnp.ones_like(x), **given)
        assert found == pytest.approx(wanted, rel=1e-5)


def test_conflicts_name_the_field_to_change():
    assert Clip().conflict("token") is Clip().conflict("constant") is None
    assert SequenceRatio().conflict("seq") is GroupRatio().conflict("seq") is None
    for surrogate in (SequenceRatio(), GroupRatio()):
        assert "policy_update.mean='token'" in surrogate.conflict("token")
    assert "policy_update.clip_low=0.2" in SequenceRatio(0.2, 0.1).conflict("seq")
    assert "policy_update.clip_high=0.3" in GroupRatio(1.0, 0.3).conflict("seq")


def test_mismatch_to_the_old_policy_by_hand():
    """Mean absolute difference over the tokens that count."""
    old = jnp.where(MASK, -1.0, 0.0)
    new = jnp.where(MASK, old + jnp.float32([0.1, -0.3, 0.0, 9.0]), 99.0)
    weights = losses.token_weights(MASK)
    _, metrics = policy_loss(new, old, jnp.ones((1, 2)), weights)
    assert metrics["moved"] == pytest.approx((0.1 + 0.3 + 0.0 + 0.1) / 4, rel=1e-5)


@pytest.mark.parametrize("loss", [NO_KL, ImitationLoss()])
def test_truncated_responses_weigh_nothing_where_masked(loss):
    ended = jnp.asarray([[False, True]])
    np.testing.assert_array_equal(loss.weights(MASK, ended), losses.token_weights(MASK))
    masked = replace(loss, mask_truncated=True)
    np.testing.assert_array_equal(masked.weights(MASK, ended), [[[0, 0, 0, 0], [1, 0, 0, 0]]])
    constant = replace(masked, mean="constant", limit=5)
    np.testing.assert_allclose(constant.weights(MASK, ended)[0, 1], [0.1, 0, 0, 0])


def test_summary_turns_sums_into_means_but_keeps_the_loss():
    sums = {"loss": jnp.float32(3.0), "kl": jnp.float32(0.5)}
    assert NO_KL.summarise(sums, jnp.float32(1.0)) is sums
    constant = replace(NO_KL, mean="constant").summarise(sums, jnp.float32(0.25))
    assert constant == {"loss": 3.0, "kl": 2.0}
    # Of a batch without any token.
    assert replace(NO_KL, mean="constant").summarise({"kl": 0.0}, jnp.zeros(())) == {"kl": 0.0}


def test_imitation_by_hand():
    logprobs = jnp.where(MASK, jnp.float32([-1.0, -2.0, -3.0, 0.0]), -1e30)
    for mean, wanted in (("token", 7 / 4), ("seq", (2.0 + 1.0) / 2), ("constant", 7 / 8)):
        loss = ImitationLoss(mean=mean)
        weights = loss.weights(MASK, jnp.ones((1, 2), bool))
        found, metrics = loss(Tokens(logprobs, weights=weights), None)
        assert found == metrics["loss"] == pytest.approx(wanted)
        summary = loss.summarise(metrics, weights.sum())
        # Perplexity is that of a mean over tokens, whatever the weights sum to.
        per_token = wanted if mean == "seq" else 7 / 4
        assert summary["perplexity"] == pytest.approx(np.exp(per_token), rel=1e-5)
        assert summary["loss"] == found


FOUR = jnp.log(jnp.float32([[[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]]))
RATIOS = jnp.float32([[[1.0, 1.1, 0.9, 1.0], [0.5, 0.4, 0.5, 1.0]]])
WHOLE = jnp.full((1, 2, 4), 1 / 8)


def masked(loss, **arrays):
    """Loss and metrics of two responses, a good and a bad one, of four tokens each."""
    given = {"sampler": FOUR, "ref": FOUR, "advantages": jnp.float32([[1, -1]]), "weights": WHOLE}
    return loss(Tokens(FOUR + jnp.log(RATIOS), FOUR, **{**given, **arrays}), 0.5)


def test_bad_responses_far_off_the_policy_are_left_out():
    """The bad one has become less likely by 0.57 nats a token."""
    without = PolicyLoss(Clip(1.0, math.inf, math.inf), kl="off")
    total, metrics = masked(without)
    assert "off_policy_masked" not in metrics
    found, metrics = masked(replace(without, off_policy=0.5))
    assert metrics["off_policy_masked"] == pytest.approx(0.5)
    # What is left is the good one: minus the sum of its ratios.
    assert found == pytest.approx(-4.0 / 8) and total == pytest.approx((-4.0 + 2.4) / 8)
    assert masked(replace(without, off_policy=0.7))[0] == total
    # The same response as a good one stays.
    swapped = masked(replace(without, off_policy=0.5), advantages=jnp.float32([[-1, 1]]))
    assert swapped[1]["off_policy_masked"] == 0


def test_the_kl_is_multiplied_by_the_ratio():
    advantages = jnp.zeros((1, 2))
    plain = PolicyLoss(Clip(), kl="k3")
    each = 1 / RATIOS - 1 + jnp.log(RATIOS)
    found, metrics = masked(plain, advantages=advantages)
    assert found == pytest.approx(0.5 * float(each.mean()), rel=1e-5)
    found, weighed = masked(replace(plain, kl_ratio=True), advantages=advantages)
    assert found == pytest.approx(0.5 * float((RATIOS * each).mean()), rel=1e-5)
    assert weighed["kl"] != metrics["kl"]


def test_selected_tokens_by_hand():
    selected = jnp.asarray([[[1, 0, 0, 0], [0, 1, 0, 0]]], bool)
    loss = PolicyLoss(Clip(1.0, math.inf, math.inf), kl="off")
    each = -jnp.float32([[[1], [-1]]]) * RATIOS
    for kind, wanted in (
        ("top_entropy", (each * selected).sum() / 8),
        ("clip_cov", (each * ~selected).sum() / 8),
        ("kl_cov", (each + 2 * selected * jnp.abs(jnp.log(RATIOS))).sum() / 8),
    ):
        chosen = replace(loss, selection=Selection(kind, 0.25, coef=2.0))
        found, metrics = masked(chosen, selected=selected)
        assert found == pytest.approx(float(wanted), rel=1e-5), kind
        assert metrics["selected"] == pytest.approx(0.25)
        with pytest.raises(ValueError, match=r"tokens\.selected"):
            masked(chosen)


def test_the_correction_weighs_the_surrogate_but_not_the_kl():
    sampler = FOUR - jnp.log(2.0)
    loss = PolicyLoss(Clip(1.0, math.inf, math.inf), kl="k3")
    kl = 0.5 * float((1 / RATIOS - 1 + jnp.log(RATIOS)).mean())
    plain, _ = masked(loss, sampler=sampler)
    found, _ = masked(replace(loss, correction=Correction("token_truncate")), sampler=sampler)
    assert found == pytest.approx(kl + 2 * (float(plain) - kl), rel=1e-5)
    masking = replace(loss, correction=Correction("token_mask", 0.5, 1.5))
    found, metrics = masked(masking, sampler=sampler)
    assert found == pytest.approx(kl, rel=1e-5) and metrics["correction_masked"] == 1


def test_groups_without_variance_have_no_part_in_the_loss():
    mask, ended = jnp.ones((2, 2, 3), bool), jnp.ones((2, 2), bool)
    loss = PolicyLoss(Clip(), mask_equal=True)
    weights = loss.weights(mask, ended, jnp.asarray([True, False]))
    np.testing.assert_allclose(weights, np.float32([[[0] * 3] * 2, [[1 / 6] * 3] * 2]))
