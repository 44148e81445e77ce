"""Run by test_sharding: what 8 fake devices of a CPU compute, beside what one of them does.

Prints a line of JSON for each comparison: its name, the sizes of the mesh and the largest
difference. An assertion that fails ends the program. With `--all`, on all meshes.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import compiler_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = compiler_flags.on_devices(8)

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from support import ring_cases, tiny, tiny_run
from support.setting import build_setting, in_order

from emor3_jax import models, prepare
from emor3_jax.learner.gradients import UpdateSpec
from emor3_jax.learner.learner import Learner, StepSpec
from emor3_jax.learner.logprobs import LogprobSpec, score_responses
from emor3_jax.learner.micro_batches import Buckets, MicroBatch, StepPlan
from emor3_jax.learner.packing import join
from emor3_jax.learner.reference import Reference
from emor3_jax.models import decode_kernel, weights
from emor3_jax.models.attention import Own, Shared, attend
from emor3_jax.models.params import cast_for_decoding, weight_sync
from emor3_jax.models.quantisation import SCALE
from emor3_jax.parallel.mesh import MeshError, make_mesh, param_shardings, shard_batch, share_heads
from emor3_jax.prepare.judge import load_judge
from emor3_jax.rl.losses import PolicyLoss
from emor3_jax.rl.surrogates import Clip
from emor3_jax.rollout.engine import Finished, Plan
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.types import Experience, Samples

# One object, so that equal programs are compiled once.
SGD = optax.sgd(1.0)


def cases(*all_of_them: Any, first: tuple[int, ...] = (0,)) -> list[Any]:
    """Returns the cases of `make test`, or with `--all` every one."""
    if "--all" in sys.argv:
        return list(all_of_them)
    return [all_of_them[i] for i in first]


def record(name: str, sizes: tuple[int, int, int], difference: float) -> None:
    print(json.dumps([name, sizes, float(difference)]), flush=True)


def score() -> None:
    """Loss and gradients, each relative to the largest of its array."""
    score_family("score", "qwen2_5_vl", cases((1, 2, 4), (1, 8, 1), (2, 2, 2)))
    score_family("score qwen3_vl", "qwen3_vl", cases((2, 2, 2), (1, 8, 1)))


def score_family(name: str, family: str, meshes: Sequence[tuple[int, int, int]]) -> None:
    setting = build_setting(8, family)
    rng = np.random.default_rng(0)
    responses = rng.integers(8, 60, (8, 2, 6)).astype(np.int32)
    lengths = rng.integers(1, 7, (8, 2)).astype(np.int32)
    samples = Samples(responses, np.zeros((8, 2, 6), np.float32), lengths, np.ones((8, 2), bool))
    used = np.arange(6) < lengths[..., None]

    @jax.jit
    def loss_and_gradient(params, rows):
        def loss(params):
            found = score_responses(
                setting.policy, params, *rows, LogprobSpec(1.0, 8), setting.suppressed
            )
            return np.float32(1 / used.sum()) * (found.logprobs * used).sum()

        return jax.value_and_grad(loss)(params)

    rows = setting.batch, samples
    wanted = jax.device_get(loss_and_gradient(setting.params, rows))
    for sizes in meshes:
        mesh = make_mesh(*sizes)
        params = jax.device_put(setting.params, param_shardings(setting.params, mesh))
        with jax.set_mesh(mesh):
            found = jax.device_get(loss_and_gradient(params, shard_batch(rows, mesh)))
        errors = jax.tree.map(
            lambda a, b: float(np.abs(a - b).max() / (np.abs(a).max() + 1e-6)), wanted, found
        )
        record(name, sizes, np.max(jax.tree.leaves(errors)))


def together(plan: StepPlan, lengths: np.ndarray) -> StepPlan:
    """Puts the responses to the two prompts that each of four parts has in a micro-batch in a row.

    They are so few that the planner would leave them apart.
    """

    def joined(micro: MicroBatch) -> MicroBatch:
        rows = micro.rows + np.repeat(np.arange(4) * len(lengths) // 4, 2)
        return micro._replace(packing=join(lengths[rows], 4, micro.shape.length, 128))

    return plan._replace(updates=tuple(tuple(map(joined, each)) for each in plan.updates))


def update() -> None:
    """Two updates of a step, each micro-batch of its own size, against prompts padded alike on one.

    Every device learns from its own prompts: none move.
    """
    b, g, t = 16, 2, 6
    setting = build_setting(b)
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, t + 1, (b, g)).astype(np.int32)
    tokens = rng.integers(8, 60, (b, g, t)).astype(np.int32)
    samples = Samples(tokens, np.full((b, g, t), -4.0, np.float32), lengths, lengths < t)
    given = Experience(
        setting.batch,
        samples,
        None,
        None,
        None,
        ref_logprobs=samples.logprobs,
        advantages=rng.normal(size=(b, g)).astype(np.float32),
    )
    loss = PolicyLoss(Clip(), kl="k3", entropy=True)

    def learn(sizes, devices, buckets, attention="xla", **how):
        mesh = make_mesh(*sizes, devices)
        with jax.set_mesh(mesh):
            spec = UpdateSpec(
                setting.policy.with_compute(attention=attention),
                SGD,
                loss,
                LogprobSpec(1.0, 8),
                kl_coef=0.1,
            )
            step = StepSpec(2, 8, buckets, pack=False, **how)
            learner = Learner(spec, step, mesh, setting.suppressed, reference=Reference({}, "none"))
            shardings = param_shardings(setting.params, mesh)
            # Updates give their state away.
            state = learner.init(jax.device_put(jax.tree.map(np.copy, setting.params), shardings))
            experience, plan, _ = learner.plan(shard_batch(given, mesh))
            if attention != "xla":
                plan = together(plan, lengths)
            found = []
            for part in learner.split(experience, plan):
                state, metrics = learner.update(state, part)
                found.append(metrics)
            return jax.device_get((state.params, found)), plan

    wanted, _ = learn((1, 1, 1), jax.devices()[:1], Buckets())
    own = Buckets((7, 8), (1,), (2, 4))
    for sizes, attention in cases(
        ((1, 8, 1), "xla"), ((2, 2, 2), "xla"), ((2, 2, 2), "splash_interpret"), first=(0, 2)
    ):
        found, plan = learn(sizes, None, own, attention)
        errors = jax.tree.map(
            lambda a, b: float(np.abs(a - b).max() / (np.abs(a).max() + 1e-6)), wanted, found
        )
        name = "update" if attention == "xla" else "packed update"
        record(name, sizes, np.max(jax.tree.leaves(errors)))
    if "--all" not in sys.argv:
        return
    # With other prompts in each update, it is another step, and as finite.
    found, plan = learn((2, 2, 2), None, own, balance=True)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    assert sorted(plan.rows(4).reshape(2, 4, 2).swapaxes(0, 1).reshape(4, 4)[0]) == [0, 1, 2, 3]


def rollout() -> None:
    """The number of tokens that differ in a greedy rollout, with prompts in turns."""
    # The first has more parts of `tensor` than key heads, which it repeats.
    roll_out("rollout", "qwen2_5_vl", cases((1, 2, 4), (8, 1, 1), (2, 2, 2)))
    roll_out("rollout qwen3_vl", "qwen3_vl", cases((2, 2, 2)))


def roll_out(name: str, family: str, meshes: Sequence[tuple[int, int, int]]) -> None:
    one = build_setting(16, family)
    rule = Sampling(10, 0.0, 1.0, (7, 20, 31, 42, 58))
    plan = Plan(slots=8, refill=8, block=4, halvings=1)
    wanted = one.roll_out_in(plan, rule, 0, 4)
    for sizes in meshes:
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            params = jax.device_put(one.params, param_shardings(one.params, mesh))
            finished = list(one._replace(params=params).finish(plan, rule, 0, 4))
            for each in finished:
                for x, axis in ((each.prefix.k, 1), (each.samples.tokens, 0)):
                    held = x.sharding.shard_shape(x.shape)[axis]
                    assert held == x.shape[axis] // (sizes[0] * sizes[1]), x.sharding
            found = in_order(finished)
        record(name, sizes, np.sum(found.tokens != wanted.tokens))


def judge() -> None:
    """Replies of a judge of another family, cut as the policy is; one that cannot be is named."""
    meshes = cases((2, 2, 2), (1, 4, 2), first=())
    if not meshes:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_run.write_policy(folder / "policy", parts=2)
        tiny_run.write_policy(folder / "judge", "qwen3_vl", words=400, parts=2)
        tiny_run.write_rows(folder / "train.parquet", 16, 0)
        wanted = judged(folder, (1, 1, 1))
        for sizes in meshes:
            found = judged(folder, sizes)
            errors = [np.abs(found[name] - probs).max() for name, probs in wanted.items()]
            record("judge", sizes, max(errors))
        tiny_run.write_policy(folder / "judge", "qwen3_vl", words=400)
        rule = r"config\.reflect\.judge='.*judge': mesh\.tensor=2: does not divide"
        with pytest.raises(MeshError, match=rule):
            judged(folder, (2, 2, 2))


def judged(folder: Path, sizes: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """What the judge says of a text that all policies have written, by question."""
    config = tiny_run.make_config(folder)
    config.data.train.path, config.evaluate.sets = str(folder / "train.parquet"), ConfigDict()
    config.rollout.prompts, config.data.prompt_lengths = 8, (256,)
    config.reflect.soft, config.reflect.judge = True, str(folder / "judge")
    config.reflect.text_lengths = (32,)
    mesh = make_mesh(*sizes, jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
        policy = prepare.load_policy(config, print_nothing, mesh)
        judge = load_judge(
            config, "reflect.judge", config.reflect.judge, policy, print_nothing, mesh
        )
        judge = judge._replace(params=cast_for_decoding(judge.params, judge.policy.dtype))
        judges = prepare.JudgeProcessors(training=judge.processor)
        data = prepare.open_data(config, policy, mesh, judges=judges)
        rollout = prepare.make_rollout(config, policy, data.labels["train"], mesh, judge.processor)
        text = "<step1> a dark wood </step1> <step2> uneasy </step2>"
        ids = policy.processor.tokenizer.encode(text, add_special_tokens=False)
        tokens = np.broadcast_to(np.int32(ids), (8, 3, len(ids)))
        lengths = np.full((8, 3), len(ids), np.int32)
        samples = Samples(tokens, np.zeros(tokens.shape, np.float32), lengths, lengths > 0)
        batch, samples = shard_batch((next(data.train).batch, samples), mesh)
        asked = Finished(np.arange(8), None, samples)
        found = jax.device_get(rollout.reflect({}, batch, asked, jax.random.key(0), judge))
        data.train.close()
    assert all(x.all() for x in found.found.values())
    return found.probs


def print_nothing(text: str) -> None:
    """Announces no stages."""


def attention() -> None:
    """Results and gradients of Splash attention."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    arrays = draw(4, 2, 128, 4, 8), draw(4, 2, 2, 8, 128), draw(4, 2, 2, 128, 8)
    prefix = Shared(
        draw(4, 2, 8, 40), draw(4, 2, 40, 8), jnp.arange(40) < jnp.array([[40], [3], [20], [39]])
    )

    @partial(jax.jit, static_argnums=0)
    @partial(jax.grad, argnums=(1, 2, 3), has_aux=True)
    def gradients(backend, q, k, v):
        k, v = (share(x, heads=2) for x in (k, v))
        before = Shared(share(prefix.k, heads=1), share(prefix.v, heads=1), prefix.mask)
        own = Own(k, v, jnp.ones((4, 2, 128), bool), causal=True)
        out = attend(q, [before, own], backend)
        return jnp.sum(jnp.sin(out)), out

    def share(x, heads):
        return jnp.moveaxis(share_heads(jnp.moveaxis(x, heads, -2)), -2, heads)

    wanted = jax.device_get(gradients("xla", *arrays))
    # The first cuts heads more finely than there are key heads; 8 parts of 4 prompts cannot be.
    for sizes in cases((1, 2, 4), (1, 8, 1), (2, 2, 2), (4, 1, 2), first=(0, 1)):
        with jax.set_mesh(make_mesh(*sizes)):
            found = jax.device_get(gradients("splash_interpret", *arrays))
        # As np.testing.assert_allclose: relative to what is large.
        errors = jax.tree.map(
            lambda a, b: float((np.abs(a - b) - 1e-7 * np.abs(b)).max()), found, wanted
        )
        record("attention", sizes, np.max(jax.tree.leaves(errors)))


def decode() -> None:
    """Results of the kernel of decoded tokens."""
    # Emulated, larger batches take long to compile.
    decode_kernel._CHAINS = 2
    case = ring_cases.make_case(4, 2, 2, 4, 8, 256, 256, 1, seed=2)
    wanted = ring_cases.by_xla(case, 0)
    for sizes in cases((2, 2, 2), (1, 2, 4), (1, 8, 1), (4, 1, 2), first=(0, 1)):
        with jax.set_mesh(make_mesh(*sizes)):
            found = jax.device_get(jax.jit(ring_cases.ragged)(case, jnp.int32(0)))
        record("decode", sizes, np.abs(found - wanted).max())


def quantise() -> None:
    """Weights for decoding in int8: integers and scales are those of one device."""
    policy = tiny.make_policy()
    params = tiny.strong_params(policy)
    wanted = jax.device_get(weight_sync(params, jnp.bfloat16, int8=True))
    for sizes in cases((2, 2, 2), (1, 8, 1), (1, 4, 2)):
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            given = jax.device_put(params, param_shardings(params, mesh))
            found = weight_sync(given, jnp.bfloat16, int8=True)
        cut = param_shardings(found, mesh, gathered=True)
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found, cut)
        assert all(jax.tree.leaves(same))
        # Whole but for `tensor`, and the scale as the outputs of its kernel.
        layers = found["model"]["layers"]
        for module, axis in ((layers["mlp"]["up_proj"], "tensor"), (layers["mlp"]["down_proj"], 0)):
            held = [x.sharding.shard_shape(x.shape) for x in (module["kernel"], module[SCALE])]
            parts = mesh.shape["tensor"] if axis else 1
            assert [shape[-1] for shape in held] == [module[SCALE].shape[-1] // parts] * 2
        differences = jax.tree.map(
            lambda a, b: np.abs(np.float32(a) - np.float32(b)).max(), jax.device_get(found), wanted
        )
        record("quantise", sizes, np.max(jax.tree.leaves(differences)))


def checkpoint() -> None:
    """Reads a policy onto the devices, each its own part, and writes it; all bit for bit."""
    equal = partial(jax.tree.map, np.testing.assert_array_equal)
    for sizes, family in cases(
        ((1, 2, 4), "qwen2_5_vl"), ((1, 8, 1), "qwen2_5_vl"), ((2, 2, 2), "qwen3_vl"), first=(0, 2)
    ):
        policy = tiny.make_policy(family, tie_word_embeddings=False)
        params = tiny.strong_params(policy)
        mesh = make_mesh(*sizes)
        with tempfile.TemporaryDirectory() as folder:
            models.save(models.LoadedPolicy(policy, params), folder)
            read = weights.read_params(
                folder, policy, shardings=lambda shapes, mesh=mesh: param_shardings(shapes, mesh)
            )
            equal(read, params)
            wanted = param_shardings(params, mesh)
            cut = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), read, wanted)
            assert all(jax.tree.leaves(cut))
            assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(read))
            # What lies on several devices is written as well, and bit for bit.
            models.save(models.LoadedPolicy(policy, read), folder)
            equal(weights.read_params(folder, policy), params)
        record("checkpoint", sizes, 0.0)


if __name__ == "__main__":
    assert jax.device_count() == 8
    for part in (score, update, rollout, judge, attention, decode, quantise, checkpoint):
        part()
