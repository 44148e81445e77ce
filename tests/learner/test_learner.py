"""The update of whole groups in micro-batches: any cut, the same gradient; padding cut off."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval
from support import compiler_flags
from support.setting import build_setting
from support.tiny_flops import products

from emor3_jax.learner import learner, packing, scoring
from emor3_jax.learner.gradients import UpdateSpec
from emor3_jax.learner.learner import Learner
from emor3_jax.learner.logprobs import LogprobSpec, planned_logprobs
from emor3_jax.learner.micro_batches import (
    Buckets,
    MicroBatch,
    Packed,
    PlanSpec,
    Shape,
    StepPlan,
    plan_step,
)
from emor3_jax.learner.reference import FeatureCache, Reference
from emor3_jax.models.lora import Lora, init_adapters
from emor3_jax.models.params import cast_matrices
from emor3_jax.parallel.mesh import make_mesh
from emor3_jax.rl import entropy, kl
from emor3_jax.rl.losses import ImitationLoss, PolicyLoss
from emor3_jax.rl.surrogates import Clip, GroupRatio, SequenceRatio
from emor3_jax.rl.update import TrainState, make_optimizer
from emor3_jax.types import Batch, Experience, Images, Prompt, Samples, split, stack_parts, take

B, G, T = 4, 3, 6


@pytest.fixture(scope="module")
def setting():
    """The tiny policy of the rollout tests, with four prompts."""
    return build_setting(b=B)


@pytest.fixture(scope="module")
def batch(setting) -> Batch:
    return setting.batch


@pytest.fixture(scope="module")
def samples() -> Samples:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, T + 1, (B, G)).astype(np.int32)
    mask = np.arange(T) < lengths[..., None]
    tokens = np.where(mask, rng.integers(8, 60, (B, G, T)), 0).astype(np.int32)
    logprobs = np.where(mask, rng.normal(-4, 1, (B, G, T)), 0).astype(np.float32)
    return Samples(*map(jnp.asarray, (tokens, logprobs, lengths, lengths < T)))


LOSS = PolicyLoss(Clip(0.2, 0.3, 3.0), kl="k3", mean="token", entropy=True)
# One object, so that equal programs are compiled once.
SGD = optax.sgd(1.0)
SPEC = LogprobSpec(temperature=0.9, chunk=8)
NO_BUCKETS = Buckets()
# Packed rows may be twice as long as a response.
WIDE = Buckets(length=(2 * T,))


def plan_of(batch, samples, count=1, buckets=NO_BUCKETS, pack=False, updates=1) -> StepPlan:
    """Micro-batches of as many prompts each, `count` to an update."""
    windows = batch.images.mask.shape[2]
    largest = Shape(batch.prompt.tokens.shape[1], windows, samples.tokens.shape[-1])
    micro_prompts = len(samples.lengths) // (count * updates)
    sizes = jax.device_get(scoring.measure(batch, samples))
    packed = Packed.GROUPS if pack else Packed.APART
    return plan_step(sizes, largest, buckets, PlanSpec(updates, micro_prompts, packed=packed))


def scored(setting, params, batch, samples, features=None, **changes):
    """Log-probabilities in micro-batches, of a policy with another compute type."""
    policy = setting.policy.with_compute(dtype=changes.pop("dtype", jnp.float32))
    spec = SPEC._replace(**changes.pop("spec", {}))
    plan = changes.pop("plan", None) or plan_of(batch, samples)
    options = {"policy": policy, "spec": spec}
    score = planned_logprobs
    if changes.pop("as_users_do", False):
        # The tests' flags round further from the operations one by one.
        score = jax.jit(
            lambda params, batch, samples, suppressed, features, **options: planned_logprobs(
                params, batch, samples, plan, suppressed, features, **options
            ),
            static_argnames=("policy", "spec"),
            compiler_options=compiler_flags.DEFAULT,
        )
        return score(params, batch, samples, setting.suppressed, features, **options).logprobs
    assert not changes
    return score(params, batch, samples, plan, setting.suppressed, features, **options).logprobs


def update(setting, params, experience, loss=LOSS, plan=None, **changes):
    """One step of gradient descent; returns the state and the metrics."""
    optimizer = changes.pop("optimizer", SGD)
    how = {"remat": changes.pop("remat", "none"), "dtype": changes.pop("dtype", jnp.float32)}
    spec = UpdateSpec(
        setting.policy.with_compute(**how),
        optimizer,
        loss,
        SPEC._replace(**changes.pop("spec", {})),
        kl_coef=0.01,
        frozen=changes.pop("frozen", None),
    )
    state = changes.pop("state", None)
    if state is None:
        state = TrainState.create(jax.tree.map(jnp.array, params), optimizer)
    taught = learner_of(setting, spec, lora=changes.pop("lora", None))
    if "kl_coef" in changes:
        taught.kl_coef = changes.pop("kl_coef")
        taught.step = dataclasses.replace(taught.step, adapt_kl=lambda coef, kl, counted: coef)
    assert not changes
    plan = plan or plan_of(experience.batch, experience.samples)
    (part,) = taught.split(experience, plan)
    return taught.update(state, part)


def learner_of(setting, spec, buckets=NO_BUCKETS, updates=1, micro_prompts=B, lora=None) -> Learner:
    step = learner.StepSpec(updates, micro_prompts, buckets, pack=False)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    reference = Reference({}, "none")
    return Learner(spec, step, mesh, setting.suppressed, reference=reference, lora=lora)


def seen_with(batch, samples, advantages) -> Experience:
    """The part of an experience that an update reads."""
    return Experience(
        batch,
        samples,
        None,
        None,
        None,
        ref_logprobs=samples.logprobs - 0.3,
        advantages=advantages,
    )


def test_a_micro_batch_is_its_rows_and_their_images(batch):
    """Every image token finds the patches that it had in the whole batch."""

    def seen(part: Batch, row: int) -> np.ndarray:
        patches = np.asarray(part.images.patches)[row]
        features = patches.reshape(-1, 4, patches.shape[-1])
        slots = np.asarray(part.prompt.image_slots)[row]
        assert (slots >= 0).sum() == 4
        return features[slots[slots >= 0]]

    for count in (1, 2, 4):
        micro = stack_parts(jax.tree.map(jnp.asarray, batch), count)
        for row in range(B):
            part = jax.tree.map(lambda x, row=row, count=count: x[row % count], micro)
            place = row // count
            np.testing.assert_array_equal(part.prompt.tokens[place], batch.prompt.tokens[row])
            np.testing.assert_array_equal(part.last_token[place], batch.last_token[row])
            np.testing.assert_array_equal(seen(part, place), seen(batch, row))
            text = np.asarray(batch.prompt.image_slots[row]) < 0
            assert np.all(np.asarray(part.prompt.image_slots)[place][text] == -1)


@pytest.mark.parametrize("per_prompt", [1, 2])
@pytest.mark.parametrize("cut", ["micro", "part"])
def test_several_images_go_with_their_prompt(batch, per_prompt, cut):
    """With k images a prompt, patches hold the number of their image over all prompts."""
    slots = 4  # merged slots of an image: one window of 16 patches, 4 of them joined
    number = np.arange(B * per_prompt, dtype=np.float32).reshape(B, per_prompt)
    patches = np.broadcast_to(number[..., None, None, None], (B, per_prompt, 1, 16, 2))
    coords = np.zeros((*patches.shape[:4], 2), np.int32)
    images = Images(patches, coords, np.ones(patches.shape[:4], bool))
    # Each prompt: one text token, then the last slot of each of its images.
    own = np.tile(np.arange(per_prompt, dtype=np.int32) * slots + slots - 1, (B, 1))
    image_slots = np.concatenate([np.full((B, 1), -1, np.int32), own], axis=1)
    prompt = Prompt(*[np.zeros(image_slots.shape, np.int32)] * 3, image_slots)
    host = jax.tree.map(jnp.asarray, batch._replace(prompt=prompt, images=images))
    for count in (1, 2, 4):
        micro = stack_parts(host, count)
        for i in range(count):
            part = split(host, count)[i]
            if cut == "micro":
                part = jax.tree.map(lambda x, i=i: np.asarray(x[i]), micro)
            rows = np.arange(i, B, count)
            np.testing.assert_array_equal(part.last_token, batch.last_token[rows])
            of_slot = np.asarray(part.images.patches).reshape(len(rows), -1, 4, 2)[:, :, 0, 0]
            assert (part.prompt.image_slots[:, 0] == -1).all()
            seen = np.take_along_axis(of_slot, np.asarray(part.prompt.image_slots[:, 1:]), axis=1)
            np.testing.assert_array_equal(seen, number[rows])


def test_a_part_scores_as_its_rows_do_in_the_whole(setting, batch, samples):
    wanted = setting.score(setting.params, samples.tokens, samples.lengths, 0.9)
    for part, each in enumerate(split(batch, 2)):
        rows = slice(part, None, 2)
        own = jax.tree.map(lambda x, rows=rows: x[rows], samples)
        plan = plan_of(each, own, 2)
        found = scored(setting, setting.params, each, own, plan=plan, as_users_do=True)
        assert np.abs(np.where(own.mask, found - wanted[rows], 0.0)).max() < 1e-5


def test_reference_does_not_depend_on_the_cut(setting, batch, samples):
    wanted = setting.score(setting.params, samples.tokens, samples.lengths, 0.9)
    packed = [plan_of(batch, samples, 2, WIDE, pack=True)]
    assert all(micro.packing for plan in packed for micro in plan.updates[0])
    cut = [plan_of(batch, samples, count) for count in (1, 4)]
    for plan in cut + packed:
        found = scored(setting, setting.params, batch, samples, plan=plan, as_users_do=True)
        difference = np.where(samples.mask, found - wanted, 0.0)
        assert np.abs(difference).max() < 1e-5


@pytest.mark.parametrize(
    ("loss", "cut", "remat", "pack"),
    [
        (LOSS, 2, "none", True),
        (
            dataclasses.replace(LOSS, surrogate=SequenceRatio(0.2, 0.3, 3.0), mean="seq", kl="k2"),
            4,
            "layers",
            False,
        ),
        (
            dataclasses.replace(
                LOSS,
                surrogate=GroupRatio(0.2, 0.3, 3.0),
                mean="seq",
                mask_truncated=True,
                kl="abs",
            ),
            2,
            "activations",
            True,
        ),
    ],
)
def test_update_depends_on_neither_cut_nor_rows_nor_memory(
    setting, batch, samples, loss, cut, remat, pack
):
    advantages = jnp.asarray(np.random.default_rng(4).normal(size=(B, G)), jnp.float32)
    found = {}
    plans = {
        "plain": plan_of(batch, samples),
        "other": plan_of(batch, samples, cut, WIDE if pack else NO_BUCKETS, pack),
    }
    for case, plan in plans.items():
        experience = seen_with(batch, samples, advantages)
        how = {"remat": remat if case == "other" else "none"}
        state, metrics = update(setting, setting.params, experience, loss, plan, **how)
        step = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, setting.params)
        found[case] = step, jax.tree.map(float, metrics)
    moved, metrics = found["plain"]
    # Vision tower, decoder and embedding all learn.
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(moved["visual"]["blocks"]))
    assert np.abs(moved["model"]["embed_tokens"]["embedding"]).max() > 0
    assert metrics["skipped"] == 0 and metrics["entropy"] > 0 and metrics["kl"] > 0
    assert found["other"][1] == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    for a, b in zip(jax.tree.leaves(found["other"][0]), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1e-3, np.abs(b).max()) + 1e-6)


def test_weights_of_the_loss_options(samples):
    """Cut-off responses weigh nothing, and the others as if these were not there."""
    ended = np.asarray(samples.ended)
    assert 0 < ended.sum() < ended.size
    for mean in ("token", "seq"):
        loss = dataclasses.replace(LOSS, mean=mean, mask_truncated=True)
        weights = loss.weights(samples.mask, samples.ended)
        assert not np.any(weights[~ended])
        assert np.sum(weights) == pytest.approx(1.0)
    constant = dataclasses.replace(LOSS, mean="constant", limit=9)
    constant = constant.weights(samples.mask, samples.ended)
    np.testing.assert_allclose(np.max(constant), 1 / (B * G * 9))


def test_metrics_are_means_whatever_the_loss_divides_by(setting, batch, samples):
    """Of the constant mean too, whose weights do not sum to 1."""
    found = []
    # The weight of the KL may be an array, as where it adapts.
    constant = dataclasses.replace(LOSS, mean="constant", limit=60)
    experience = seen_with(batch, samples, jnp.ones((B, G)))
    for loss, kl_coef in ((LOSS, None), (constant, 0.01)):
        _, metrics = update(setting, setting.params, experience, loss, kl_coef=kl_coef)
        found.append(metrics)
    for name in ("kl", "moved", "entropy", "clip_fraction_low"):
        assert found[1][name] == pytest.approx(float(found[0][name]), rel=1e-5)
    tokens = int(np.sum(samples.lengths))
    scale = tokens / (B * G * 60)
    assert found[1]["loss"] == pytest.approx(float(found[0]["loss"]) * scale, rel=1e-4)
    assert found[1]["grad_norm"] == pytest.approx(float(found[0]["grad_norm"]) * scale, rel=1e-4)


def test_an_update_in_which_no_token_counts_is_empty(setting, batch, samples):
    experience = seen_with(batch, samples, jnp.ones((B, G)))
    cut = experience._replace(samples=samples._replace(ended=samples.ended & False))
    found = [
        update(setting, setting.params, each, dataclasses.replace(LOSS, mask_truncated=True))[1]
        for each in (experience, cut)
    ]
    assert [float(metrics["empty"]) for metrics in found] == [0.0, 1.0]
    assert found[0]["kl"] > 0 == found[1]["kl"]


def test_an_empty_update_moves_no_adaptive_weight(setting):
    taught = learner_of(setting, UpdateSpec(setting.policy, SGD, LOSS, SPEC, kl_coef=0.01))
    taught.step = dataclasses.replace(
        taught.step,
        adapt_kl=partial(kl.adapt, target=0.1, responses=30, horizon=300.0),
        adapt_entropy=partial(entropy.adapt, target=0.5, delta=0.1, most=0.25),
    )
    taught.kl_coef, taught.bonus = 0.01, entropy.EntropyBonus(0.1, 0.1)
    counts = {"kl": jnp.float32(0.101), "entropy": jnp.float32(0.4), "empty": jnp.float32(0)}
    empty = {"kl": jnp.float32(0), "entropy": jnp.float32(0), "empty": jnp.float32(1)}
    state = TrainState.create({}, SGD)
    taught.after_step(state, 1, {}, [empty, empty])
    assert (float(taught.kl_coef), *map(float, taught.bonus)) == pytest.approx((0.01, 0.1, 0.1))
    # The mean KL is that of the other update, 1 % over the target, the entropy below it.
    taught.after_step(state, 2, {}, [counts, empty])
    assert float(taught.kl_coef) == pytest.approx(0.01 * 1.001)
    assert tuple(map(float, taught.bonus)) == pytest.approx((0.2, 0.2))


def test_trim_keeps_every_token(setting, batch, samples):
    def trimmed(longest: int, sizes: tuple[int, ...]) -> Samples:
        lengths = jnp.minimum(samples.lengths, longest)
        taught = learner_of(
            setting, UpdateSpec(setting.policy, SGD, LOSS, SPEC), Buckets((), (), sizes)
        )
        given = Experience(batch, samples._replace(lengths=lengths), None, None, None)
        return taught.plan(given)[0].samples

    assert trimmed(3, (2, 4)).tokens.shape == (B, G, 4)
    assert trimmed(4, (2, 4)).logprobs.shape == (B, G, 4)
    # No size is enough, or one is larger than there are tokens: all stay.
    for sizes in ((2, 4), (2, 99), ()):
        whole = trimmed(5, sizes)
        np.testing.assert_array_equal(whole.tokens, samples.tokens)
        np.testing.assert_array_equal(whole.lengths, jnp.minimum(samples.lengths, 5))
    np.testing.assert_array_equal(trimmed(1, (2, 4)).tokens, samples.tokens[..., :2])


def widened(batch: Batch, real: int) -> Batch:
    """The batch with a second window of each image, real for the first few prompts."""
    rng = np.random.default_rng(6)
    images = batch.images
    patches = np.concatenate([images.patches, rng.normal(size=images.patches.shape)], axis=2)
    coords = np.concatenate([images.coords, np.asarray(images.coords) + np.asarray([0, 4])], axis=2)
    second = np.broadcast_to(np.arange(B)[:, None, None, None] < real, images.mask.shape)
    mask = np.concatenate([images.mask, second], axis=2)
    return batch._replace(images=Images(np.float32(patches), np.int32(coords), mask))


OWN_SIZES = Buckets(prompt=(7, 8, 9), windows=(1, 2), length=(2, 4, T))


def test_every_micro_batch_of_its_own_size_gives_the_update_of_one(setting, batch, samples):
    """Two updates of a step: loss, metrics and gradients are those of prompts padded alike."""
    batch = widened(batch, real=2)
    lengths = jnp.asarray([[1, 2, 1], [6, 3, 2], [3, 4, 1], [2, 2, 1]], jnp.int32)
    mask = jnp.arange(T) < lengths[..., None]
    samples = samples._replace(
        tokens=jnp.where(mask, 9 + jnp.arange(T), 0),
        logprobs=jnp.where(mask, -4.0, 0.0),
        lengths=lengths,
    )
    advantages = jnp.asarray(np.random.default_rng(4).normal(size=(B, G)), jnp.float32)
    experience = seen_with(batch, samples, advantages)
    spec = UpdateSpec(
        setting.policy, SGD, dataclasses.replace(LOSS, mean="token"), SPEC, kl_coef=0.01
    )
    found = []
    for buckets, micro_prompts in ((NO_BUCKETS, 2), (OWN_SIZES, 1)):
        taught = learner_of(setting, spec, buckets, 2, micro_prompts)
        state = TrainState.create(jax.tree.map(jnp.array, setting.params), SGD)
        trimmed, plan, padding = taught.plan(experience)
        metrics = []
        for part in taught.split(trimmed, plan):
            state, each = taught.update(state, part)
            metrics.append(jax.tree.map(float, each))
        found.append((state.params, metrics, plan, padding))
    (plain, wanted, _, padded), (own, seen, plan, less) = found
    shapes = [[micro.shape for micro in update] for update in plan.updates]
    # Prompts 0 and 2 in the first update, 1 and 3 in the second, by rising length.
    assert [[shape.length for shape in update] for update in shapes] == [[2, 4], [2, 6]]
    assert [[shape.windows for shape in update] for update in shapes] == [[2, 1], [1, 2]]
    assert len({shape.prompt for update in shapes for shape in update}) > 1
    for a, b in zip(seen, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for a, b, start in zip(*map(jax.tree.leaves, (own, plain, setting.params)), strict=True):
        step = np.abs(b - start).max()
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1e-3, step) + 1e-6)
    assert less["padding/efficiency"] > padded["padding/efficiency"]
    # 28 tokens in 12 rows of 6; of 2, 4, 2 and 6 for three each.
    assert padded["padding/response"] == pytest.approx(28 / 72)
    assert less["padding/response"] == pytest.approx(28 / 42)
    assert padded["padding/vision"] == pytest.approx(6 / 8) and less["padding/vision"] == 1.0
    assert (padded["padding/shapes"], less["padding/shapes"]) == (1, 4)


@pytest.mark.parametrize("backend", ["xla", "splash_interpret"])
def test_responses_to_two_prompts_may_share_a_row(setting, batch, samples, backend):
    """Log-probabilities and the update are those of prompts apart; each prompt has its image."""
    lengths = np.asarray(samples.lengths)
    shape = Shape(batch.prompt.tokens.shape[1], 1, T)
    rows = (np.asarray([2, 0, 3, 1], np.int32),)
    plan = StepPlan(
        T,
        (
            tuple(
                MicroBatch(own, shape, packing.join(lengths[own], len(own) // 2, T, 128))
                for own in rows
            ),
        ),
    )
    wanted = setting.score(setting.params, samples.tokens, samples.lengths, 0.9)
    policy = setting.policy.with_compute(attention=backend)
    setting = setting._replace(policy=policy)
    found = scored(setting, setting.params, batch, samples, plan=plan, as_users_do=True)
    assert np.abs(np.where(samples.mask, found - wanted, 0.0)).max() < 1e-5
    advantages = jnp.asarray(np.random.default_rng(4).normal(size=(B, G)), jnp.float32)
    experience = seen_with(batch, samples, advantages)
    both = []
    for each in (plan, plan_of(batch, samples)):
        state, metrics = update(setting, setting.params, experience, LOSS, each)
        both.append((jax.tree.leaves(state.params), jax.tree.map(float, metrics)))
    (ours, found), (theirs, wanted) = both
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    for a, b, start in zip(ours, theirs, jax.tree.leaves(setting.params), strict=True):
        step = np.abs(b - start).max()
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1e-3, step) + 1e-6)


def test_the_gap_to_the_sampler_is_the_mean_over_tokens(samples):
    assert scoring.mismatch_jitted(samples.logprobs, samples)["sampler_gap"] == 0
    # What stands after the end does not count.
    moved = jnp.where(samples.mask, samples.logprobs + 0.25, 9.0)
    found = scoring.mismatch_jitted(moved, samples)
    assert found["sampler_gap"] == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(("mean", "count", "pack"), [("token", 1, False), ("seq", 4, True)])
def test_imitation_is_the_mean_of_what_scoring_finds(setting, batch, samples, mean, count, pack):
    """Of the response tokens alone; a response that is not there counts for nothing."""
    lengths = np.asarray(samples.lengths).copy()
    lengths[1, 2] = 0
    given = samples._replace(lengths=jnp.asarray(lengths))
    plan = plan_of(batch, given, count, WIDE, pack)
    hot = {"temperature": 1.0}
    logprobs = scored(setting, setting.params, batch, given, spec=hot)
    mask = np.arange(T) < lengths[..., None]
    each = [logprobs[i, g][mask[i, g]] for i, g in np.ndindex(B, G) if lengths[i, g]]
    wanted = np.mean(np.concatenate(each)) if mean == "token" else np.mean([x.mean() for x in each])
    experience = Experience(batch, given, None, None, None)
    loss = ImitationLoss(mean=mean)
    how = {"optimizer": optax.sgd(0.1), "spec": hot}
    state, metrics = update(setting, setting.params, experience, loss, plan, **how)
    assert metrics["loss"] == pytest.approx(-float(wanted), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(-float(wanted)), rel=1e-5)
    _, after = update(setting, None, experience, loss, plan, state=state, **how)
    assert after["loss"] < metrics["loss"]


@pytest.mark.parametrize("limit", [10**6, 0, 300])
def test_cached_features_change_no_bit(setting, batch, samples, limit):
    """Over two epochs in other orders; within the bound, and with next to nothing kept."""
    cache = FeatureCache(setting.policy, limit, 2)
    ids = [f"row {i}" for i in range(B)]
    how = {"spec": {"temperature": 1.0}}
    for order in ([0, 1, 2, 3], [2, 0, 3, 1], [1, 1, 0, 3]):
        rows = take(batch, np.asarray(order))
        given = jax.tree.map(lambda x, order=order: x[np.asarray(order)], samples)
        features = cache.of(setting.params, rows, [ids[i] for i in order])
        how["plan"] = plan_of(rows, given, 2)
        np.testing.assert_array_equal(
            scored(setting, setting.params, rows, given, jnp.asarray(features), **how),
            scored(setting, setting.params, rows, given, **how),
        )
    assert cache.hits + cache.misses == 3 * B
    each = 4 * setting.policy.shapes.hidden_size * 4
    kept = min(limit // each, B)
    assert cache.bytes == kept * each
    # Every later use of an image that was kept is a hit.
    assert cache.counters()["reference/cache_hits"] == {4: 8, 0: 0}.get(kept, cache.hits)
    # Another padding is another image to the layout.
    assert (ids[0], 1) in cache._kept or not kept


def test_a_reference_in_bfloat16_computes_the_same_where_the_arithmetic_is(setting, batch, samples):
    found = [
        scored(setting, params, batch, samples, dtype=jnp.bfloat16)
        for params in (setting.params, cast_matrices(setting.params, jnp.bfloat16))
    ]
    np.testing.assert_array_equal(*found)


def test_only_adapters_learn(setting, batch, samples):
    """The state holds nothing else, and the loss is that of merged kernels."""
    lora = Lora(setting.params, jnp.float32(2.0))
    adapters = init_adapters(setting.params, ("q_proj", "up_proj"), 2, jax.random.key(0))
    noise = np.random.default_rng(5)
    adapters = jax.tree.map(lambda x: jnp.float32(noise.normal(0, 0.2, x.shape)), adapters)
    merged = lora.merge(jax.tree.map(jnp.copy, adapters))
    found = []
    for params, base in ((adapters, lora), (merged, None)):
        advantages = np.random.default_rng(4).normal(size=(B, G))
        experience = seen_with(batch, samples, jnp.asarray(advantages, jnp.float32))
        state, metrics = update(setting, params, experience, lora=base)
        found.append((state, metrics))
    state = found[0][0]
    assert jax.tree.structure(state.params) == jax.tree.structure(adapters)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, adapters)
    assert min(jax.tree.leaves(moved)) > 0
    for name in ("loss", "kl", "entropy"):
        assert found[0][1][name] == pytest.approx(float(found[1][1][name]), rel=1e-4)


def test_a_base_in_the_compute_type_teaches_adapters_the_same(setting, batch, samples):
    adapters = init_adapters(setting.params, ("q_proj", "up_proj"), 2, jax.random.key(0))
    noise = np.random.default_rng(5)
    adapters = jax.tree.map(lambda x: jnp.float32(noise.normal(0, 0.2, x.shape)), adapters)
    advantages = np.random.default_rng(4).normal(size=(B, G))
    experience = seen_with(batch, samples, jnp.asarray(advantages, jnp.float32))
    halved = cast_matrices(setting.params, jnp.dtype(jnp.bfloat16))
    found = [
        update(setting, adapters, experience, lora=Lora(base, jnp.float32(2.0)), dtype=jnp.bfloat16)
        for base in (setting.params, halved)
    ]
    (ours, metrics), (theirs, wanted) = found
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert float(metrics["loss"]) == float(wanted["loss"])


def in_tower(path: tuple) -> bool:
    return path[0].key == "visual"


def test_a_frozen_tower_costs_no_backward_pass(setting, batch, samples):
    """The update has fewer products by exactly those that the tower's backward pass has."""
    advantages = jnp.asarray(np.random.default_rng(4).normal(size=(B, G)), jnp.float32)
    experience = seen_with(batch, samples, advantages)
    count = 2
    plan = plan_of(batch, samples, count)

    def needed(function, *args) -> int:
        traced = jax.make_jaxpr(function)(*args)
        kept, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
        return products(kept)

    def trace(frozen):
        optimizer = make_optimizer(0.1, frozen=frozen)
        how = {"remat": "layers", "frozen": frozen, "optimizer": optimizer}
        return needed(
            lambda params: update(setting, params, experience, plan=plan, **how), setting.params
        )

    policy = setting.policy.with_compute(remat="layers")
    (images, _) = jax.tree.map(lambda x: x[0], stack_parts((batch.images, batch.answers), count))

    def tower(visual):
        return jnp.sum(policy.encode_images({"visual": visual}, images))

    visual = setting.params["visual"]
    forward, both = needed(tower, visual), needed(jax.value_and_grad(tower), visual)
    assert both > 2.5 * forward
    assert trace(None) - trace(in_tower) == count * (both - forward)


def test_a_frozen_tower_changes_neither_the_other_gradients_nor_their_norm(setting, batch, samples):
    advantages = jnp.asarray(np.random.default_rng(4).normal(size=(B, G)), jnp.float32)
    experience, found = seen_with(batch, samples, advantages), {}
    plan = plan_of(batch, samples, 2)
    for frozen in (None, in_tower):
        # Steps of plain descent are the gradient.
        optimizer = optax.multi_transform(
            {"trained": optax.sgd(1.0), "frozen": optax.set_to_zero()},
            lambda params, frozen=frozen: jax.tree_util.tree_map_with_path(
                lambda path, _: "frozen" if frozen and frozen(path) else "trained", params
            ),
        )
        how = {"optimizer": optimizer, "frozen": frozen}
        state, metrics = update(setting, setting.params, experience, plan=plan, **how)
        moved = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, setting.params)
        found[frozen] = moved, metrics["grad_norm"]
    (free, whole), (held, norm) = found.values()
    assert not any(x.any() for x in jax.tree.leaves(held["visual"]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), held["model"], free["model"]
    )
    assert norm == pytest.approx(float(optax.tree.norm(free["model"])), rel=1e-4)
    assert whole == pytest.approx(float(optax.tree.norm(free)), rel=1e-4) and whole > norm
